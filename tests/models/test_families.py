"""find_head on tiny random models of families that do more than a product before their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tool import load_tool
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.models.lm_head import backbone_of, check_logits, frozen_copy

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'"
)

tiny = load_tool("tiny_models")


def make(family: str, **settings: Any) -> Any:
    if family not in tiny.FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    return tiny.tiny_model(family, **settings)


# family: scale, softcap, entries of the vocabulary
SUPPORTED = {
    "llama": (1.0, None, 64),
    "falcon_h1": (0.25, None, 64),
    "hyperclovax": (4.0, None, 64),
    "minicpm3": (0.25, None, 64),
    "inkling_text": (0.25, None, 60),
    "inkling2_text": (1.0, 0.5, 60),
    "recurrent_gemma": (1.0, 0.5, 64),
    "xlstm": (1.0, 0.5, 64),
    "nanochat": (1.0, 0.5, 64),
    "llama4_text": (1.0, None, 64),
    "mllama": (1.0, None, 64),
    "gemma3": (1.0, None, 64),
    "phi": (1.0, None, 64),
}


@pytest.mark.parametrize("family", SUPPORTED)
def test_its_log_probs_are_those_of_the_model(family: str) -> None:
    model = make(family)
    head = g2.find_head(model)
    scale, softcap, entries = SUPPORTED[family]
    assert (head.logit_scale, head.logit_softcap) == (scale, softcap)
    weight, _ = head.weights(torch.float32)
    assert len(weight) == entries
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    assert_agree(head, model, ids, temperature=0.7)


def assert_agree(head: Any, model: Any, ids: Tensor, temperature: float) -> None:
    """linear_logprobs agrees with the softmax of the model's logits, computed in float64, to 1e-5 nats."""
    with torch.no_grad():
        hidden = head.backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).double()
        tokens = ids[:, 1:].flatten()
        ours = g2.linear_logprobs(hidden, tokens=tokens, **head.arguments(temperature))
    theirs = (logits / temperature).log_softmax(-1)
    chosen = theirs.gather(1, tokens[:, None])[:, 0]
    assert chosen.std() > 0.1
    torch.testing.assert_close(ours.logprobs.double(), chosen, rtol=1e-5, atol=1e-5)
    entropy = -(theirs.exp() * theirs.clamp(min=-1e30)).sum(-1)
    torch.testing.assert_close(ours.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["falcon_h1", "inkling2_text", "minicpm3"])
def test_its_gradients_are_those_of_the_model(family: str) -> None:
    model = make(family)
    head = g2.find_head(model)
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden = head.backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    tokens = ids[:, 1:].flatten()
    ours = g2.linear_logprobs(hidden, tokens=tokens, **head.arguments()).logprobs
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    theirs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(x.sum(), parameters, allow_unused=True, retain_graph=True) for x in (ours, theirs)
    )
    assert sum(x is not None for x in expected) > 3
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_copy_keeps_the_arithmetic() -> None:
    head = g2.find_head(make("inkling2_text"))
    copied = frozen_copy(head, autocast=False)
    assert (copied.logit_softcap, copied.rows) == (0.5, 60)
    assert copied.output is not head.output


def test_backbones_at_another_name() -> None:
    model = make("llama4_text")
    assert model.base_model is model
    assert backbone_of(model) is model.model
    assert backbone_of(torch.nn.Linear(2, 2)) is None


def test_entries_that_a_configuration_takes_out() -> None:
    """Chameleon writes the lowest number at an image's tokens, which its vocabulary_map names."""
    if not hasattr(transformers, "ChameleonForConditionalGeneration"):
        pytest.skip("no Chameleon")
    torch.manual_seed(0)
    config = transformers.ChameleonConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocabulary_map={"<image>": 50, "IMGIMGAZ": 51, "IMGIMGBZ": 53, **{f"t{i}": i for i in range(50)}},
        vq_config={"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32},
    )
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    head = g2.find_head(model)
    assert head.masked == (51, 53)
    assert head.arguments()["bias"].isinf().nonzero()[:, 0].tolist() == [51, 53]
    ids = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    assert_agree(head, model, ids, temperature=1.0)


# --- refused ------------------------------------------------------------------------------------------------


REFUSED = {
    "bert": (True, "BertLMHeadModel does something unknown .*, before its LM head"),
    "modernbert-decoder": (None, "does something unknown .*, before its LM head"),
    "bert-generation": (False, "is not causal: later tokens .*; set is_decoder: true in its configuration"),
    "xlnet": (None, "is not causal: later tokens change the log-probs of earlier ones by .* nats"),
    "musicgen": (None, "the LM head is a ModuleList"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_it_is_refused_with_the_reason(family: str) -> None:
    decoder, message = REFUSED[family]
    model = make(family, **({} if decoder is None else {"is_decoder": decoder}))
    with pytest.raises(RuntimeError, match=message):
        g2.find_head(model)


class Doubling(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclasses_of_linear() -> None:
    model = make("llama")
    model.lm_head.__class__ = type("Named", (torch.nn.Linear,), {})  # computes the plain product
    assert g2.find_head(model).output is model.lm_head
    model.lm_head.__class__ = Doubling
    with pytest.raises(RuntimeError, match=r"the LM head is a Doubling; only a plain nn\.Linear"):
        g2.find_head(model)


def test_a_model_that_fails_at_text_alone_is_refused() -> None:
    model = make("llama")
    model.model.forward = lambda **_: {}["images"]
    with pytest.raises(RuntimeError, match=r"for token ids alone \(KeyError: 'images'\)"):
        g2.find_head(model)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "inv_sqrt_d_model", True])
def test_a_scale_that_is_no_positive_number_is_refused(value: Any) -> None:
    model = make("cohere")
    vars(model.config)["logit_scale"] = value  # past its own check of types
    with pytest.raises(RuntimeError, match=r"has logit_scale=.*; needs a positive number"):
        g2.find_head(model)


def changed(change: Any) -> Any:
    """A tiny Llama whose logits go through `change`."""
    model = make("llama")
    forward = model.forward

    def changed_forward(*args: Any, **inputs: Any) -> Any:
        out = forward(*args, **inputs)
        out.logits = change(out.logits)
        return out

    model.forward = changed_forward
    return model


def at(entries: list[int], value: float) -> Any:
    return lambda z: z.index_fill(-1, torch.tensor(entries), value)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at([5, 17], -torch.inf), r"masks 2 entries of its vocabulary \(ids 5, 17, ...\)"),
        (at([5], LOWEST), r"masks 1 entries of its vocabulary \(ids 5, ...\)"),
        (at([5], -30.0), "does something unknown .*, after its LM head"),
        (at([5], torch.nan), "gives logits that are NaN or infinite"),
        (at([5], torch.inf), "gives logits that are NaN or infinite"),
        (lambda z: at([5], -torch.inf)(1.5 * z), "masks 1 entries"),
        (lambda z: 0.0195 * z, "its logits are 0.0195 times those, by a setting that is unknown here"),
        (lambda z: z[..., :60], "gives 60 logits, but its configuration implies 64"),
        (lambda z: at([5], 1e4)(z), "does something unknown"),
    ],
)
def test_changed_logits_are_refused(change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        g2.find_head(changed(change))


def test_a_constant_for_every_entry_changes_no_log_prob() -> None:
    assert g2.find_head(changed(lambda z: z + 3.0)).logit_scale == 1.0


# --- the comparison -----------------------------------------------------------------------------------------


@pytest.fixture
def logits() -> Tensor:
    return 2 * torch.randn(2, 8, 300, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("large", [1e3, 1e4, -1e4, -torch.inf])
def test_a_large_entry_hides_no_error(logits: Tensor, large: float) -> None:
    """The tolerance was a share of the largest logit: 10 nats beside an entry of 1e4."""
    logits[..., 0] = large
    wrong = logits.clone()
    wrong[1, 3, 100] += 0.1
    check_logits(None, logits, logits.clone(), torch.float32)
    with pytest.raises(RuntimeError, match=r"by 0\.1 nats"):
        check_logits(None, wrong, logits, torch.float32)


@pytest.mark.parametrize("offset", [0.0, -100.0])  # GPT-2's logits are about -100
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_error(logits: Tensor, offset: float, dtype: torch.dtype) -> None:
    check_logits(None, logits + offset, (logits + offset).to(dtype), dtype)
    check_logits(None, logits + offset, (logits + offset).to(dtype), torch.float32)  # under autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_beyond_rounding_are_found(logits: Tensor, dtype: torch.dtype) -> None:
    for wrong in (1.2 * logits, 3 * torch.tanh(logits / 3)):
        with pytest.raises(RuntimeError, match="does something unknown"):
            check_logits(None, logits, wrong.to(dtype), dtype)
