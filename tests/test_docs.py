"""docs/: the code runs as written, links lead somewhere, tables are those of the scripts that made them."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def code(page: str, number: int = 0) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[number]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    for target in re.findall(r"\]\(([^):#]+)", text):
        assert (page.parent / target).exists(), target


def tiny_model() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=300, tie_word_embeddings=False, **sizes, **heads))


def test_own_loop():
    source = code("own-loop.md")
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith(("import", "@"))]
    assert len(lines) <= 15
    names: dict = {}
    exec(compile(source, "own-loop.md", "exec"), names)
    model = tiny_model()
    ids = torch.randint(300, (6, 12))
    response = torch.arange(12)[None] >= torch.tensor([4, 4, 4, 6, 6, 6])[:, None]
    batch = ids, torch.ones_like(ids), response
    rewards = torch.tensor([1.0, -1, 1, 1, 1, -1])
    old, advantages = names["measure"](model, batch, rewards, 3)
    assert old.shape == advantages.shape == (int(response.sum()),)

    def plain_loss():  # as one would write it with logits
        log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        ratio = (log_p[response[:, 1:]] - old).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    ours = names["policy_loss"](model, batch, old, advantages)
    torch.testing.assert_close(ours, plain_loss())
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain_loss(), parameters)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
