"""Samples n responses to every problem into a file, from which all numbers are computed.

    out/samples.json     the settings: model, data, prompts, decoding, seed
    out/samples.jsonl    one response a line (`rows.Sample`), n consecutive lines for each problem

Lines are written a batch of whole problems at a time. A killed run resumes after its last whole batch. Each
batch has its own seed, so the file is the same as that of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .._files import flush, write_whole
from ..errors import ConfigError, TrainerError, short
from ..models.loading import load_config, load_tokenizer
from ..tasks import verify as verification
from ..tasks.base import Item, Task, digest, item_of, question_text
from ..tasks.pool import Limits
from ..trainer.config import TrainerConfig
from ..trainer.sampling import render
from .engines import Decoding, Engine, Response, check_prompts, load_engine
from .rows import Sample, is_right, read_line, without_texts, write_line

# Keys of the trainer's configuration that change what a model answers; the others are ignored here.
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
    source: str  # where the problems came from, to show and to record
    task: Task
    template: str | None = None  # prompt template, used unless the configuration has its own
    limit: int | None = None  # only the first `limit` problems; None: all

    def __len__(self) -> int:
        return len(self.task) if self.limit is None else min(self.limit, len(self.task))

    def items(self) -> list[Item]:
        from tqdm import tqdm

        indices = tqdm(range(len(self)), f"problems of {self.name}", delay=3, leave=False, dynamic_ncols=True)
        return [item_of(self.task, index) for index in indices]


@dataclass(frozen=True)
class Settings:
    """How to sample: model and prompts (the trainer's configuration), decoding, engine."""

    config: TrainerConfig
    decoding: Decoding
    engine: str = "transformers"
    batch_size: int = 64  # responses generated at once

    def to_dict(self) -> dict[str, Any]:
        """Everything but the data that the responses depend on, for samples.json.

        Reads the files in the model's directory (`model_files`).
        """
        mine = {key: getattr(self.config, key) for key in SAMPLING_KEYS}
        mine[MODEL_FILES] = model_files(self.config.model)
        return {**mine, **asdict(self.decoding), "engine": self.engine, "batch_size": self.batch_size}


@dataclass(frozen=True)
class Problem:
    """One item of a data set, with its prompt for one model."""

    id: str  # <data set>/<index>
    data: DataSet
    item: Item
    prompt: str  # the text that the model sees
    tokens: list[int]  # the token ids of `prompt`
    special: bool  # whether the tokenizer added special tokens to the text


def sample(
    data: Sequence[DataSet],
    settings: Settings,
    out: Path,
    engine: Engine | None = None,
    overwrite: bool = False,
) -> list[Sample]:
    """Samples and verifies n responses to every problem into `out`; resumes a run that was killed.

    Args:
        data: the data sets, under different names.
        settings: model, prompts and decoding; n is settings.decoding.n.
        out: folder of samples.json and samples.jsonl, made where it is missing.
        engine: a loaded model, e.g. TransformersEngine(model, tokenizer, config, decoding). None: loads
            settings.config.model, unless every problem has been sampled.
        overwrite: start over. Old files are removed once the first new batch has been sampled.

    Returns:
        All lines of samples.jsonl, those of an earlier run included.

    Raises:
        ConfigError: a setting is wrong, or `out` holds samples of other settings.
        TrainerError: samples.jsonl in `out` is damaged.
        RewardError: a user's score raised, or was not a finite number.
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
    # A batch holds whole problems of one data set, so that it depends neither on other data sets nor on
    # where a run was killed.
    size = max(settings.batch_size // n, 1)
    batches = [mine[at : at + size] for mine in problems for at in range(0, len(mine), size)]
    rows = [] if overwrite else _rewind(file, batches, n)
    total = sum(map(len, problems))
    with tqdm(total=total, initial=len(rows) // n, desc="problems", dynamic_ncols=True) as bar:
        start = 0
        for batch in batches:
            start += len(batch)
            if start * n <= len(rows):
                continue
            if engine is None:
                prompts = {problem.id: problem.tokens for mine in problems for problem in mine}
                check_prompts(prompts, load_config(config), tokenizer, config)
                longest = max(map(len, prompts.values()))
                engine = load_engine(
                    settings.engine, tokenizer, _engine_config(settings, longest), settings.decoding
                )
            seeds = [_seed(config.seed, problem.id) for problem in batch]
            answers = engine.sample([problem.tokens for problem in batch], seeds)
            new = [
                _row(problem, index, response)
                for problem, responses in zip(batch, answers)
                for index, response in enumerate(responses)
            ]
            items = [(problem.data.task, problem.item) for problem in batch for _ in range(n)]
            new = _verified(new, items, config.limits())
            if overwrite and not rows:  # only now: the model may fail to load, or run out of memory
                for name in ("samples.jsonl", "results.json"):
                    (out / name).unlink(missing_ok=True)
                _check_header(out, header)
            with file.open("a", encoding="utf-8") as lines:
                lines.writelines(write_line(row) for row in new)
            flush(file)
            rows += new
            right = sum(is_right(row, config.score_gate) for row in rows)
            bar.set_postfix_str(f"pass@1 {right / len(rows):.3f}", refresh=False)
            bar.update(len(batch))
    return rows


def model_files(model: str) -> str | None:
    """A digest of a local model directory that changes when another model is saved there; None for hub names.

    It covers name, size and modification time of the weights, and the bytes of configuration and tokenizer.
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


def unfinished(rows: Sequence[Sample], header: dict[str, Any]) -> str:
    """The incomplete data sets of samples.json, as "2 of 4 problems of aime25, ..."; "" for a whole run."""
    n = header.get("settings", {}).get("n", 1)
    samples = Counter(row["problem"] for row in rows)
    there = Counter(problem.rpartition("/")[0] for problem, count in samples.items() if count >= n)
    wanted = {name: about.get("problems", 0) for name, about in header.get("data", {}).items()}
    lacking = [name for name in wanted if there[name] < wanted[name]]
    return ", ".join(f"{there[name]} of {wanted[name]} problems of {name}" for name in lacking)


def verify(rows: Sequence[Sample], data: Sequence[DataSet], limits: Limits | None = None) -> list[Sample]:
    """The samples with score and answer computed again by these tasks.

    limits: of verification; None: the defaults. Raises ConfigError for a sample whose problem is not in
    `data`, or has another question there.
    """
    named, items = {d.name: d for d in data}, list[tuple[Task, Item]]()
    for row in rows:
        name, _, index = row["problem"].rpartition("/")
        number = index.isascii() and index.isdigit()
        if name not in named or not number or int(index) >= len(named[name].task):
            known = ", ".join(named)
            raise ConfigError(
                f"samples: problem {row['problem']} is not in the data ({known}): give its --data"
            )
        item = named[name].task[int(index)]
        if question_text(item["question"]) != row["question"]:
            raise ConfigError(f"samples: problem {row['problem']} is another one in {named[name].source}")
        items.append((named[name].task, item))
    return _verified(rows, items, limits)


def read_samples(path: Path, texts: bool = True) -> list[Sample]:
    """The samples in a samples.jsonl, or in the one of a folder; a half-written last line is left out.

    texts=False leaves out prompts and responses (`without_texts`). Raises TrainerError for a file that cannot
    be read, or has a line that is not a `Sample`.
    """
    file = path / "samples.jsonl" if path.is_dir() else path
    rows = []
    try:
        with file.open("rb") as lines:  # line by line: files of long responses are large
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    row = read_line(line, f"samples: {file}, line {number}")
                    rows.append(row if texts else without_texts(row))
    except OSError as error:
        raise TrainerError(f"samples: {file}: {error.strerror}") from None
    return rows


def write_samples(out: Path, rows: Sequence[Sample], header: dict[str, Any]) -> None:
    """Writes samples.json and samples.jsonl, over any files of these names in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "samples.json", json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    write_whole(out / "samples.jsonl", "".join(map(write_line, rows)))


def read_settings(path: Path) -> dict[str, Any]:
    """samples.json in a folder or beside a file: {"data": ..., "settings": ...}; {} if it cannot be read."""
    folder = path if path.is_dir() else path.parent
    try:
        found: dict[str, Any] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        mappings = found.get("settings", {}), *found.get("data", {}).values()
    except (OSError, ValueError, AttributeError):
        return {}
    return found if all(isinstance(one, dict) for one in mappings) else {}


def prompt_tokens(row: Sample, tokenizer: Any) -> list[int]:
    """The prompt's token ids, as the model saw them."""
    special = bool(row.get("add_special_tokens"))
    ids: list[int] = tokenizer(row["prompt"], add_special_tokens=special)["input_ids"]
    return ids


def _problems(data: DataSet, config: TrainerConfig, tokenizer: Any) -> list[Problem]:
    if data.template is not None and config.prompt_template == "{question}":
        config = replace(config, prompt_template=data.template)
    found = []
    for index, item in enumerate(data.items()):
        try:
            text, special = render(item["question"], tokenizer, config)
        except ConfigError as error:
            raise ConfigError(f"data: problem {data.name}/{index}: {error}") from error
        tokens = tokenizer(text, add_special_tokens=special)["input_ids"]
        if not tokens:
            raise ConfigError(
                f"data: problem {data.name}/{index} is a prompt without tokens: it has no question"
            )
        found.append(Problem(f"{data.name}/{index}", data, item, text, tokens, special))
    return found


def _engine_config(settings: Settings, longest: int) -> TrainerConfig:
    """The configuration that an engine is loaded with: its batch size, and room for the longest prompt."""
    return replace(
        settings.config,
        max_prompt_tokens=longest,
        temperature=settings.decoding.temperature or 1.0,  # the engine itself handles 0, greedy decoding
        generate_batch_size=settings.batch_size,
        truncated="keep",  # a recipe may drop truncated responses from training; here each one counts
    )


def _row(problem: Problem, index: int, response: Response) -> Sample:
    return {
        "problem": problem.id,
        "sample": index,
        "data": problem.data.name,
        "question": question_text(problem.item["question"]),
        "prompt": problem.prompt,
        "add_special_tokens": problem.special,
        "completion": response.text,
        "tokens": response.tokens,
        "truncated": response.truncated,
        "score": None,
        "answer": None,
    }


def _verified(
    rows: Sequence[Sample], items: Sequence[tuple[Task, Item]], limits: Limits | None
) -> list[Sample]:
    """The samples with their verdicts; items: the task and the item of each.

    Equal answers to a problem get one text, as votes need it.
    """
    asked = [(task, item, row["completion"]) for row, (task, item) in zip(rows, items)]
    verdicts = verification.verify(asked, limits=limits)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["problem"], []).append(place)
    groups = [
        (getattr(items[mine[0]][0], "judge", None), [verdicts[place].answer for place in mine])
        for mine in places.values()
    ]
    answers: dict[int, str | None] = {}
    for mine, unified in zip(places.values(), verification.unify(groups, limits)):
        answers.update(zip(mine, unified))
    found = list[Sample]()
    for place, (row, verdict) in enumerate(zip(rows, verdicts)):
        new: Sample = {**row, "score": verdict.score, "answer": answers[place]}
        new.pop("failure", None)
        if verdict.failure is not None:
            new["failure"] = verdict.failure
        found.append(new)
    return found


def _seed(seed: int, problem: str) -> int:
    """A seed of 31 bits for each problem, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {problem}".encode()).digest()[:4], "big") >> 1


def describe(data: Sequence[DataSet]) -> dict[str, dict[str, Any]]:
    """{data set: source, number of problems, template, digest}: what must be the same to resume a run."""
    found = {}
    for one in data:
        about = {"source": one.source, "problems": len(one), "template": one.template}
        found[one.name] = {**about, "sha256": digest(one.items())}
    return found


def _check_header(out: Path, header: dict[str, Any]) -> None:
    """Writes samples.json for a new run; ConfigError names the settings that differ from an earlier one's."""
    header = json.loads(json.dumps(header))  # as a later run will read it
    if not (out / "samples.jsonl").exists():
        write_whole(out / "samples.json", json.dumps(header, indent=2, ensure_ascii=False) + "\n")
        return
    old = read_settings(out)
    changed = [
        (key, old.get(section, {}).get(key), header[section].get(key))
        for section in ("settings", "data")
        for key in {**header[section], **old.get(section, {})}
        if old.get(section, {}).get(key) != header[section].get(key)
    ]
    if not changed:
        return
    if [key for key, _, _ in changed] == [MODEL_FILES]:
        what = f"of another model: the files in {header['settings']['model']} have changed since"
    else:
        what = "with " + ", ".join(f"{key}={short(was)} (now {short(now)})" for key, was, now in changed)
    raise ConfigError(f"{out} has samples {what}: choose another --out, or --overwrite to start over")


def _rewind(file: Path, batches: Sequence[Sequence[Problem]], n: int) -> list[Sample]:
    """Cuts the file after its last whole batch; returns the samples before it."""
    if not file.exists():
        return []
    rows = read_samples(file)
    expected = [(problem.id, index) for batch in batches for problem in batch for index in range(n)]
    if [(row["problem"], row["sample"]) for row in rows] != expected[: len(rows)]:
        raise TrainerError(f"samples: {file} is damaged: its lines are not in order; --overwrite starts over")
    whole = 0
    for batch in batches:
        if whole + len(batch) * n > len(rows):
            break
        whole += len(batch) * n
    with file.open("rb") as lines:
        os.truncate(file, sum(map(len, itertools.islice(lines, whole))))
    return rows[:whole]
