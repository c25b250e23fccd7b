"""vLLM itself behind our engine: seeds, decoding, ends of responses, limits, and a run that was killed."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serve import PROMPTS, SEEDS, TEMPERATURE, make_config, tokens_of
from tiny import LetterTask

from g2rl_kernels.evaluation.engines import Decoding
from g2rl_kernels.evaluation.samples import DataSet, Settings, sample
from g2rl_kernels.models.loading import load_model
from g2rl_kernels.trainer import ConfigError, TrainerError
from g2rl_kernels.versions import UntestedVersionWarning

END = 1  # </s> of the tiny tokenizer


@pytest.fixture(scope="module")
def probabilities(model: str) -> Any:
    """log p of the next token, [V], after the prompt, by transformers at the engine's temperature."""
    ours, _ = load_model(make_config(model))

    @torch.no_grad()
    def of(tokens: list[int], temperature: float = TEMPERATURE) -> torch.Tensor:
        return (ours(torch.tensor([tokens])).logits[0, -1] / temperature).log_softmax(0)

    return of


def ids(engine: Any, text: str) -> list[int]:
    return engine.tokenizer(text)["input_ids"]


def test_the_same_seeds_give_the_same_samples(engine):
    first = tokens_of(engine)
    assert tokens_of(engine) == first
    assert [len(responses) for responses in first] == [4] * len(PROMPTS)
    assert len({tuple(one) for responses in first for one in responses}) > 10  # drawn, each by itself
    others = engine.sample([ids(engine, PROMPTS[0])], [SEEDS[0] + 1000])
    assert [one.tokens for one in others[0]] != first[0]


def test_a_prompt_has_its_own_seed_whatever_is_in_a_batch_with_it(engine):
    together = tokens_of(engine)
    alone = [engine.sample([ids(engine, text)], [seed])[0] for text, seed in zip(PROMPTS, SEEDS)]
    assert [[one.tokens for one in responses] for responses in alone] == together


def test_tokens_are_drawn_from_the_softmax_at_this_temperature(remade, probabilities):
    engine = remade(decoding=Decoding(n=2000, temperature=TEMPERATURE), max_new_tokens=1)
    prompt = ids(engine, PROMPTS[0])
    counts = Counter(one.tokens[0] for one in engine.sample([prompt], [5])[0])
    expected = 2000 * probabilities(prompt).exp()
    likely = (expected >= 5).nonzero().flatten().tolist()
    chi = sum((counts[token] - float(expected[token])) ** 2 / float(expected[token]) for token in likely)
    freedom = len(likely)
    assert freedom > 4
    assert chi < freedom + 4 * math.sqrt(2 * freedom)  # 4 standard deviations


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(n=1, temperature=0),
        Decoding(n=1, temperature=1.0, top_k=1),
        Decoding(n=1, temperature=1.0, top_p=1e-6),
        Decoding(n=1, temperature=0.01),
    ],
    ids=["greedy", "top_k", "top_p", "the least temperature"],
)
def test_the_likeliest_token(remade, probabilities, decoding):
    engine = remade(decoding=decoding)
    for text in PROMPTS:
        prompt = ids(engine, text)
        ((response,),) = engine.sample([prompt], [3])
        for at, token in enumerate(response.tokens):
            assert token == int(probabilities(prompt + response.tokens[:at]).argmax())


def test_top_k_keeps_the_k_likeliest(remade, probabilities):
    engine = remade(decoding=Decoding(n=300, temperature=TEMPERATURE, top_k=3), max_new_tokens=1)
    prompt = ids(engine, PROMPTS[1])
    found = {one.tokens[0] for one in engine.sample([prompt], [8])[0]}
    assert found == {*probabilities(prompt).topk(3).indices.tolist()}


def test_the_settings_that_the_model_brings_are_not_used(engine, model):
    """Its generation_config.json asks for top_k=1, a low temperature and a penalty of repetition."""
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(model).top_k == 1
    assert len({one.tokens[0] for one in engine.sample([ids(engine, PROMPTS[0])], [1])[0]}) > 1


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0.001, r"temperature=0\.001: vLLM would sample with 0\.01: give that or more"),
        (2.5, r"engine=vllm: temperature must be in \[0, 2\], got 2\.5.*use engine=transformers"),
    ],
)
def test_a_temperature_that_vllm_changes_or_refuses(model, monkeypatch, temperature, message):
    import vllm
    from serve import make_engine

    monkeypatch.setattr(vllm, "LLM", None)  # said before the model is loaded
    with pytest.raises(ConfigError, match=message):
        make_engine(model, Decoding(n=2, temperature=temperature))


def test_responses_end_at_the_first_end_token(engine):
    responses = [
        one for many in engine.sample([ids(engine, text) for text in PROMPTS], SEEDS) for one in many
    ]
    ended = [one for one in responses if not one.truncated]
    assert 0 < len(ended) < len(responses)
    for one in responses:
        assert one.truncated == (END not in one.tokens)
        assert END not in one.tokens[:-1]
        assert len(one.tokens) == 8 or not one.truncated
        assert one.text == engine.tokenizer.decode([t for t in one.tokens if t not in (0, END)])


def test_an_end_token_may_be_a_part_of_the_text(remade):
    """stop_tokens may name any token: the response ends with it, and keeps it."""
    engine = remade(stop_tokens=["c"], decoding=Decoding(n=60, temperature=TEMPERATURE))
    (responses,) = engine.sample([ids(engine, PROMPTS[0])], [4])
    stopped = [one for one in responses if one.tokens[-1] == engine.tokenizer.convert_tokens_to_ids("c")]
    assert stopped
    assert all(one.text.endswith("c") and not one.truncated for one in stopped)
    assert not any("c" in one.text[:-1] for one in responses)
    assert any(one.tokens[-1] == END for one in responses)


def test_the_end_tokens_of_generation_config(model, remade, tmp_path, monkeypatch):
    """A model may end its turns with other tokens than its tokenizer says."""
    from transformers import GenerationConfig

    own = GenerationConfig(eos_token_id=[END, 5, 6])
    monkeypatch.setattr(GenerationConfig, "from_pretrained", lambda _: own)
    engine = remade(decoding=Decoding(n=60, temperature=TEMPERATURE))
    (responses,) = engine.sample([ids(engine, PROMPTS[0])], [4])
    assert {one.tokens[-1] for one in responses if not one.truncated} == {END, 5, 6}
    assert not any({END, 5, 6} & {*one.tokens[:-1]} for one in responses)


def test_more_prompts_than_vllm_takes_in_one_step(engine):
    """It would split one of them, and on a CPU fail for its seed."""
    limit = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = [[4 + i % 8] * 31 for i in range(limit // (4 * 31) + 8)]
    answers = engine.sample(prompts, range(0, 10 * len(prompts), 10))
    assert [len(responses) for responses in answers] == [4] * len(prompts)


def test_an_over_long_prompt(engine):
    longest = [4] * 32
    assert all(len(one.tokens) == 8 or not one.truncated for one in engine.sample([longest], [1])[0])
    with pytest.raises(ConfigError, match=r"prompts: number 1 has 33 tokens.*max_prompt_tokens=32: raise it"):
        engine.sample([longest, [4] * 33], [1, 2])  # vLLM alone would answer with up to 7 tokens


def test_a_model_that_vllm_cannot_load(model, tmp_path):
    from serve import make_engine
    from tiny import make_model, make_tokenizer

    make_model(head_dim=32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TrainerError, match="engine=vllm: vLLM cannot load"):
        make_engine(str(tmp_path))


def test_an_untested_version_is_warned_of(remade, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "99.1.0")
    with pytest.warns(UntestedVersionWarning, match=r"vllm 99\.1\.0 is newer than .* \(0\.32\)"):
        remade()


# --- a run of `g2rl eval` -----------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bytes(engine, model, tmp_path):
    settings = Settings(make_config(model), Decoding(n=4, temperature=TEMPERATURE), "vllm", batch_size=8)
    data = [DataSet("letters", "tiny.py", LetterTask(), limit=5)]
    calls: list[Any] = []

    def killed(*arguments: Any) -> Any:
        if len(calls) == 2:
            raise Killed
        calls.append(arguments)
        return engine.sample(*arguments)

    sample(data, settings, tmp_path / "once", engine)
    with pytest.raises(Killed):
        sample(
            data, settings, tmp_path / "killed", SimpleNamespace(tokenizer=engine.tokenizer, sample=killed)
        )
    written = (tmp_path / "killed" / "samples.jsonl").read_bytes()
    rows = sample(data, settings, tmp_path / "killed", engine)
    once = (tmp_path / "once" / "samples.jsonl").read_bytes()
    assert 0 < len(written) < len(once)
    assert (tmp_path / "killed" / "samples.jsonl").read_bytes() == once
    assert len(rows) == 20
