"""Sampling n responses to every problem into a file, from which all numbers are computed.

    out/samples.json     the settings: model, data, prompts, decoding, seed
    out/samples.jsonl    one response a line, n in a row for each problem:

    {"problem": "math500/12", "sample": 0, "data": "math500", "question": ..., "prompt": what the model saw,
     "add_special_tokens": false, "completion": ..., "tokens": [ids, the end token too], "truncated": false,
     "score": 1.0, "answer": "7"}

Lines are written a chunk of whole problems at a time. A killed run goes on after its last whole chunk; each
chunk has a seed of its own, so that the file will be that of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .._files import flush, write_whole
from ..errors import ConfigError, TrainerError
from ..models.loading import load_tokenizer
from ..tasks.base import Item, Task, final_answer, item_of, score_completion
from ..trainer.config import TrainerConfig
from ..trainer.sampling import render
from .engines import Decoding, Engine, Response, load_engine

# Keys of the trainer's configuration that decide what a model answers; the others have no say here.
SAMPLING_KEYS = (
    "model",
    "dtype",
    "autocast",
    "system_prompt",
    "prompt_template",
    "chat_template",
    "chat_template_args",
    "pad_token",
    "stop_tokens",
    "max_new_tokens",
    "seed",
)


MODEL_FILES = "model_files"  # the key of `model_files` in headers
SMALL = ("config.json", "generation_config.json", "*token*", "vocab*", "merges.txt", "chat_template*")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class DataSet:
    """Problems with a verifier, under a name that is unique in a run."""

    name: str
    source: str  # where they came from, for people
    task: Task
    template: str | None = None  # of its prompts, where the configuration has none of its own
    limit: int | None = None  # the first so many problems; None: all

    def __len__(self) -> int:
        return len(self.task) if self.limit is None else min(self.limit, len(self.task))

    def items(self) -> list[Item]:
        return [item_of(self.task, index) for index in range(len(self))]


@dataclass(frozen=True)
class Settings:
    """How to sample: prompts and model as the trainer's configuration has them, and how to decode."""

    config: TrainerConfig
    decoding: Decoding
    engine: str = "transformers"
    batch_size: int = 64  # responses generated at once

    def to_dict(self) -> dict[str, Any]:
        """Everything that the responses depend on, but for the data; looks at the model's directory."""
        mine = {key: getattr(self.config, key) for key in SAMPLING_KEYS}
        mine[MODEL_FILES] = model_files(self.config.model)
        return {**mine, **asdict(self.decoding), "engine": self.engine, "batch_size": self.batch_size}


@dataclass(frozen=True)
class Problem:
    id: str  # <data set>/<index>
    data: DataSet
    item: Item
    prompt: str  # as the model sees it
    tokens: list[int]  # the same
    special: bool  # whether the tokenizer added special tokens to the text


def sample(
    data: Sequence[DataSet],
    settings: Settings,
    out: Path,
    engine: Engine | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Samples and verifies n responses to every problem, or goes on with it; returns the lines of the file.

    engine: a model that is loaded already, e.g. TransformersEngine(model, tokenizer, config, decoding); else
    settings.config.model is loaded, if there is anything left to sample. Raises ConfigError for an `out` made
    with other settings and for wrong settings, TrainerError for a damaged file. overwrite=True starts over:
    what is in `out` goes when the first chunk is there to take its place.
    """
    from tqdm import tqdm

    settings.decoding.check()
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size={settings.batch_size}: must be at least 1")
    config, n = settings.config, settings.decoding.n
    tokenizer = engine.tokenizer if engine is not None else load_tokenizer(config)
    problems = [_problems(one, config, tokenizer) for one in data]
    out.mkdir(parents=True, exist_ok=True)
    file = out / "samples.jsonl"
    header = {"data": describe(data), "settings": settings.to_dict()}
    if not overwrite:
        _check_header(out, header)
    # Whole problems of one data set: neither other data nor where a run was killed has a say in a chunk.
    size = max(settings.batch_size // n, 1)
    chunks = [mine[at : at + size] for mine in problems for at in range(0, len(mine), size)]
    rows = [] if overwrite else _rewind(file, chunks, n)
    total = sum(map(len, problems))
    with tqdm(total=total, initial=len(rows) // n, desc="problems", dynamic_ncols=True) as bar:
        start = 0
        for chunk in chunks:
            start += len(chunk)
            if start * n <= len(rows):
                continue
            if engine is None:
                longest = max(len(problem.tokens) for mine in problems for problem in mine)
                engine = load_engine(
                    settings.engine, tokenizer, _engine_config(settings, longest), settings.decoding
                )
            seeds = [_seed(config.seed, problem.id) for problem in chunk]
            answers = engine.sample([problem.tokens for problem in chunk], seeds)
            new = [
                _row(problem, index, response)
                for problem, responses in zip(chunk, answers)
                for index, response in enumerate(responses)
            ]
            if overwrite and not rows:  # not before: the model may not load, or run out of memory
                for name in ("samples.jsonl", "results.json"):
                    (out / name).unlink(missing_ok=True)
                _check_header(out, header)
            with file.open("a", encoding="utf-8") as lines:
                lines.writelines(_line(row) for row in new)
            flush(file)
            rows += new
            right = sum(row["score"] >= config.score_gate for row in rows)
            bar.set_postfix_str(f"pass@1 {right / len(rows):.3f}", refresh=False)
            bar.update(len(chunk))
    return rows


def model_files(model: str) -> str | None:
    """A digest of a local model directory, which another training into it changes; None for other models.

    Of weights, which are large: name, size and time of the last change; of what else decides answers: bytes.
    """
    folder = Path(model).expanduser()
    if not model or not folder.is_dir():
        return None
    found: list[Any] = []
    for file in _globbed(folder, SMALL):
        found.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
    for file in _globbed(folder, WEIGHTS):
        found.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _globbed(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def unfinished(rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> str:
    """What a run's file lacks by its samples.json, as "2 of 4 problems of aime25, ..."; "" for nothing."""
    n = header.get("settings", {}).get("n", 1)
    samples = Counter(row["problem"] for row in rows)
    there = Counter(problem.rpartition("/")[0] for problem, count in samples.items() if count >= n)
    wanted = {name: about.get("problems", 0) for name, about in header.get("data", {}).items()}
    lacking = [name for name in wanted if there[name] < wanted[name]]
    return ", ".join(f"{there[name]} of {wanted[name]} problems of {name}" for name in lacking)


def verify(rows: Sequence[dict[str, Any]], data: Sequence[DataSet]) -> list[dict[str, Any]]:
    """Stored samples with score and answer by these tasks; ConfigError where the problems are others."""
    named, verified = {d.name: d for d in data}, []
    for row in rows:
        name, _, index = row["problem"].rpartition("/")
        number = index.isascii() and index.isdigit()
        if name not in named or not number or int(index) >= len(named[name].task):
            known = ", ".join(named)
            raise ConfigError(
                f"samples: problem {row['problem']} is not in the data ({known}): give its --data"
            )
        item = named[name].task[int(index)]
        if item["question"] != row["question"]:
            raise ConfigError(f"samples: problem {row['problem']} is another one in {named[name].source}")
        verified.append({**row, **_verdict(named[name].task, row["completion"], item)})
    return verified


def read_samples(path: Path, texts: bool = True) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl, or of the one in a folder; a half-written last line is left out.

    texts=False: what numbers are made of, in a fraction of the memory: neither prompts nor responses, but
    "length", a response's tokens. Raises TrainerError for a file that is none, or has a line of other fields.
    """
    file = path / "samples.jsonl" if path.is_dir() else path
    rows = []
    try:
        with file.open("rb") as lines:  # line by line: files of long responses are large
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    row = _read_line(line, f"samples: {file}, line {number}")
                    rows.append(row if texts else _numbers(row))
    except OSError as error:
        raise TrainerError(f"samples: {file}: {error.strerror}") from None
    return rows


# What a line must hold, and may; a score of null: not verified yet.
NEEDED = {
    "problem": (str,),
    "sample": (int,),
    "question": (str,),
    "completion": (str,),
    "score": (int, float, type(None)),
    "answer": (str, type(None)),
}
KNOWN = {**NEEDED, "data": (str,), "prompt": (str,), "tokens": (list,)}


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        missing = [key for key in NEEDED if key not in row]
    except (ValueError, TypeError):
        raise TrainerError(f"{where} is no sample of g2rl eval") from None
    if missing:
        raise TrainerError(f"{where} is no sample of g2rl eval: it has no {missing[0]!r}")
    for key in KNOWN:
        if key in row and not _fits(key, row[key]):
            raise TrainerError(f"{where} is no sample of g2rl eval: {key}={_short(row[key])}")
    return row


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in ("prompt", "completion", "tokens")}
    # n samples have one question
    return {**kept, "question": sys.intern(row["question"]), "length": len(row.get("tokens", ()))}


def _fits(key: str, value: Any) -> bool:
    if isinstance(value, list) and not {int}.issuperset(map(type, value)):
        return False
    return isinstance(value, KNOWN[key]) and not (isinstance(value, float) and not math.isfinite(value))


def write_samples(out: Path, rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> None:
    """Both files of a run, in place of what is there."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "samples.json", json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    write_whole(out / "samples.jsonl", "".join(map(_line, rows)))


def read_settings(path: Path) -> dict[str, Any]:
    """samples.json in a folder or beside a file: {"data": ..., "settings": ...}; {} if none is there."""
    folder = path if path.is_dir() else path.parent
    try:
        found: dict[str, Any] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        parts = found.get("settings", {}), *found.get("data", {}).values()
    except (OSError, ValueError, AttributeError):
        return {}
    return found if all(isinstance(part, dict) for part in parts) else {}


def prompt_tokens(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """The prompt of a stored sample as the token ids that the model saw."""
    special = bool(row.get("add_special_tokens"))
    ids: list[int] = tokenizer(row["prompt"], add_special_tokens=special)["input_ids"]
    return ids


def _problems(data: DataSet, config: TrainerConfig, tokenizer: Any) -> list[Problem]:
    if data.template is not None and config.prompt_template == "{question}":
        config = replace(config, prompt_template=data.template)
    found = []
    for index, item in enumerate(data.items()):
        try:  # templates are programs of the model's authors; some refuse a system role
            text, special = render(item["question"], tokenizer, config)
        except Exception as error:
            what = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"chat template: {what}: drop system_prompt, or set chat_template: never"
            ) from error
        tokens = tokenizer(text, add_special_tokens=special)["input_ids"]
        if not tokens:
            raise ConfigError(
                f"data: problem {data.name}/{index} is a prompt without tokens: it has no question"
            )
        found.append(Problem(f"{data.name}/{index}", data, item, text, tokens, special))
    return found


def _engine_config(settings: Settings, longest: int) -> TrainerConfig:
    """What an engine is loaded with: its batch size, and room for the longest prompt."""
    return replace(
        settings.config,
        max_prompt_tokens=longest,
        temperature=settings.decoding.temperature or 1.0,  # 0, greedy, is the engine's business
        generate_batch_size=settings.batch_size,
        truncated="keep",  # recipes may drop such responses from training; here each of them counts
    )


def _row(problem: Problem, index: int, response: Response) -> dict[str, Any]:
    return {
        "problem": problem.id,
        "sample": index,
        "data": problem.data.name,
        "question": problem.item["question"],
        "prompt": problem.prompt,
        "add_special_tokens": problem.special,
        "completion": response.text,
        "tokens": response.tokens,
        "truncated": response.truncated,
        **_verdict(problem.data.task, response.text, problem.item),
    }


def _verdict(task: Task, completion: str, item: Item) -> dict[str, Any]:
    return {
        "score": score_completion(task, completion, item),
        "answer": final_answer(task, completion, item),
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _seed(seed: int, problem: str) -> int:
    """31 bits that differ from problem to problem, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {problem}".encode()).digest()[:4], "big") >> 1


def describe(data: Sequence[DataSet]) -> dict[str, dict[str, Any]]:
    """What must not change under a run: where the problems came from, how many, and a digest of them."""
    found = {}
    for one in data:
        text = json.dumps(one.items(), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        about = {"source": one.source, "problems": len(one), "template": one.template, "sha256": digest}
        found[one.name] = about
    return found


def _check_header(out: Path, header: dict[str, Any]) -> None:
    """Writes samples.json, or compares: ConfigError names the settings in which an earlier run differs."""
    header = json.loads(json.dumps(header))  # as it will be read
    if not (out / "samples.jsonl").exists():
        write_whole(out / "samples.json", json.dumps(header, indent=2, ensure_ascii=False) + "\n")
        return
    old = read_settings(out)
    changed = [
        (key, old.get(part, {}).get(key), header[part].get(key))
        for part in ("settings", "data")
        for key in {**header[part], **old.get(part, {})}
        if old.get(part, {}).get(key) != header[part].get(key)
    ]
    if not changed:
        return
    if [key for key, _, _ in changed] == [MODEL_FILES]:
        what = f"of another model: the files in {header['settings']['model']} have changed since"
    else:
        what = "with " + ", ".join(f"{key}={_short(was)} (now {_short(now)})" for key, was, now in changed)
    raise ConfigError(f"{out} has samples {what}: choose another --out, or --overwrite to start over")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _rewind(file: Path, chunks: Sequence[Sequence[Problem]], n: int) -> list[dict[str, Any]]:
    """Cuts the file after its last whole chunk, where a killed run left more; returns its lines."""
    if not file.exists():
        return []
    rows = read_samples(file)
    expected = [(problem.id, index) for chunk in chunks for problem in chunk for index in range(n)]
    if [(row["problem"], row["sample"]) for row in rows] != expected[: len(rows)]:
        raise TrainerError(f"samples: {file} is damaged: its lines are not in order; --overwrite starts over")
    whole = 0
    for chunk in chunks:
        if whole + len(chunk) * n > len(rows):
            break
        whole += len(chunk) * n
    with file.open("rb") as lines:
        os.truncate(file, sum(map(len, itertools.islice(lines, whole))))
    return rows[:whole]
