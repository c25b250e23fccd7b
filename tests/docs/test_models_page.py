"""docs/models.md: its table holds every family, and what it says of some heads is so."""

import re
from pathlib import Path

import pytest
from tool import load_tool

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
VERDICT = re.compile(
    r"(right( with router_aux_loss_coef=0)?|refused(: [\w() ]+)?|fails: .+|wrong( under padding)?)?"
)

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'"
)


@pytest.fixture(scope="module")
def families():
    return load_tool("families")


@pytest.fixture(scope="module")
def rows(families):
    """family: its row."""
    return {family: families.Row(*cells) for family, cells in families.read(TEXT).items()}


def test_every_family_has_a_row(families, rows):
    version = re.search(r"causal language models in transformers ([\d.]+\d),", TEXT)
    assert version is not None
    if not transformers.__version__.startswith(f"{version[1]}."):
        pytest.skip(f"the table is of transformers {version[1]}")
    assert rows.keys() == families.FAMILIES.keys()


def test_no_row_says_that_we_train_on_wrong_log_probs(rows):
    for family, row in rows.items():
        assert row.head
        for cell in (row.ours, row.trl, row.grpo):
            assert VERDICT.fullmatch(cell), f"{family}: {cell}"
        assert not row.ours.startswith("wrong"), family
        assert not row.trl.startswith("wrong"), family


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "gemma2", "granite", "cohere", "phi", "falcon_h1", "inkling2_text", "bert", "xlnet"],
)
def test_the_head_of_a_family(families, rows, family):
    if family not in families.FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    from g2rl_kernels.models.lm_head import find_head

    found = families.verdict(lambda: families.describe(find_head(families.build(family))))
    assert found == rows[family].head


def test_a_verdict_says_why(families):
    def fail():
        raise ValueError("one | two\nthree")

    assert families.verdict(fail) == "fails: one / two three"
    assert families.verdict(lambda: "right") == "right"


def test_the_table_shares_lines(families):
    plain, wrong = (families.Row("plain", "right", "right", grpo) for grpo in ("right", "wrong by 0.5 nats"))
    refused = families.Row("refused: not causal", "refused: not causal", "", "fails: x")
    rows = {"a": plain, "b": wrong, "d": refused, "c": plain}
    rows = {family: families.cells(row) for family, row in rows.items()}
    text = families.table(rows)
    assert text.endswith(
        "| a, c | plain | right | right | right |\n"
        "| b | plain | right | right | wrong |\n"
        "| d | refused: not causal | refused |  | fails: x |\n"
    )
    page = families.BLOCK.sub(lambda found: found[1] + text + found[3], TEXT)
    assert families.read(page) == rows
    assert families.table(families.read(TEXT)) in TEXT
