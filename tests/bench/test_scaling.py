"""docs/scaling.md and the cost model behind it."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import run, scaling
from benchmarks.scaling import GPU, GPUS, MODELS, SHORT, Model, Setting

TEXT = scaling.DOCUMENT.read_text(encoding="utf-8")


def test_the_document_has_the_tables_of_the_script():
    assert {block[2] for block in scaling.BLOCK.finditer(TEXT)} == set(scaling.tables())
    assert scaling.written(TEXT) == TEXT, "python -m benchmarks.scaling writes it anew"


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (scaling.DOCUMENT.parent / target).exists()


def steps(response: int | None = None) -> list[tuple[str, int, scaling.Step]]:
    found = []
    for model in MODELS.values():
        s = scaling.paper(model) if response is None else Setting(response=response)
        found += [
            (model.name, gpus, scaling.step(model, s, gpus, GPU()))
            for gpus in GPUS
            if scaling.fits(model, gpus, GPU())
        ]
    return found


def test_what_it_says_in_short():
    for name, gpus, t in steps():
        whole = t.generation + t.training
        assert t.two_passes / whole < 0.0035
        assert t.known / whole < 1e-4
        assert t.known / t.training < 0.0025
        small, large = (0.015, 0.018) if name == "1.7B" else (0, 0.008)
        assert small <= t.two_passes / t.training <= large
        assert (t.forward + t.two_passes) / (whole - t.forward) < (0.05 if gpus < 256 else 0.016)

    def largest(response: int | None) -> float:
        """Share of an old forward pass that G2RL alone needs."""
        return max(
            (t.forward + t.two_passes) / (t.generation + t.training - t.forward) for *_, t in steps(response)
        )

    assert 0.045 < largest(None) < 0.05
    assert 0.11 < largest(SHORT) < 0.12


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("1.7B", 1.72, 1.41),
        ("4B", 4.02, 3.63),
        ("8B", 8.19, 6.95),
        ("14B", 14.8, 13.2),
        ("32B", 32.8, 31.2),
        ("30B-A3B", 30.5, 2.7),
        ("235B-A22B", 235.1, 20.9),
    ],
)
def test_the_models_have_their_published_sizes(name, billions, active):
    """Parameters, and those of the layers that a token meets."""
    model = MODELS[name]
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.forward(0) / 2e9 == pytest.approx(active, rel=0.02)


def test_flops_of_a_forward_pass_are_those_of_the_model(monkeypatch):
    """transformers' Qwen3, counted by torch."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(scaling, "V", 1000)
    model = Model("small", 256, 2, heads=2, kv_heads=1, f=512, tied=False)
    config = transformers.Qwen3Config(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    net = transformers.Qwen3ForCausalLM(config)
    norms = sum(p.numel() for name, p in net.named_parameters() if "norm" in name)
    assert sum(p.numel() for p in net.parameters()) - norms == model.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 24, dtype=torch.int64), use_cache=False)
    assert counter.get_total_flops() == 24 * (model.forward(24) + model.head)  # all 24 see all 24


def test_g2rl_bench_scaling(capsys):
    assert run.main(["scaling", "--models", "4B", "--gpus", "8", "16", "--response", "1024"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\| 4B \| (8|16) \|", out, re.MULTILINE) == ["8", "16"]
    with pytest.raises(SystemExit):
        run.main(["scaling", "--gpus", "0"])
    assert "--gpus" in capsys.readouterr().err
