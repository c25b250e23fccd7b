"""Which families of causal language models the trainers take: writes the table of docs/models.md.

    python tools/families.py                 every family that transformers knows; 10 minutes
    python tools/families.py llama gemma2    the rows of these

For a tiny random model of each family: what find_head says of its head, one step of `g2rl train` and of
G2RLTrainer, and the largest error in nats of the log-probs that they train on, and of those of TRL's own head
(GRPOTrainer's), on a left-padded pair of sequences, against the model's logits for each prefix alone.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before these packages are imported
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
PAGE = ROOT / "docs" / "models.md"
BLOCK = re.compile(r"(<!-- table: tools/families.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_models import FAMILIES, VOCABULARY, model_class, tiny_model  # noqa: E402
from torch import Tensor  # noqa: E402

from g2rl_kernels.errors import TrainerError, one_line  # noqa: E402
from g2rl_kernels.models.lm_head import LMHead, find_head  # noqa: E402

LIMIT = 120  # seconds that one trainer may take for a family
EXACT = 1e-3  # nats
PROMPTS = ([5, 9, 12, 7, 30], [8, 21])
RESPONSES = ([11, 17, 40, 23], [33, 6, 19, 14])

# What the errors of find_head and of the trainers come to.
REASONS = {
    r"before its LM head": "changes hidden states before its head",
    r"after its LM head": "changes logits after its head",
    r"something unknown": "logits of another kind",
    r"ignores attention_mask": "ignores the mask",
    r"padding on the left changes": "padding changes its logits",
    r"after padding on the left, generate": "samples otherwise after padding",
    r"generate\(\), with its cache": "its cache changes its logits",
    r"is not causal": "not causal",
    r"LM head is a ModuleList": "several heads",
    r"not a transformers causal": "no backbone",
    r"for token ids alone": "needs more than text",
    r"generate\(\) fails": "generate() fails",
}
NOT_TRIED = {
    "gemma3n": "not tried: needs timm; its language model is gemma3n_text",
    "gemma4_assistant": "not tried: a draft model, which reads the states of another",
    "gemma4_unified_assistant": "not tried: a draft model, which reads the states of another",
}


@dataclass(frozen=True)
class Row:
    """What the table says of a family."""

    head: str  # what it does between hidden states and logits, or why it is refused
    ours: str  # g2rl train
    trl: str  # G2RLTrainer
    grpo: str  # the log-probs of TRL's own head


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _late)
    text = PAGE.read_text(encoding="utf-8")
    rows = read(text) if sys.argv[1:] else {}
    for family in sys.argv[1:] or sorted(FAMILIES):
        row = sweep(family)
        print(" | ".join((family, *astuple(row))), flush=True)
        rows[family] = cells(row)
    text = BLOCK.sub(lambda found: found[1] + table(rows) + found[3], text)
    PAGE.write_text(text, encoding="utf-8")


def read(text: str) -> dict[str, tuple[str, ...]]:
    """The cells of each family on docs/models.md."""
    found = BLOCK.search(text)
    assert found is not None
    rows: dict[str, tuple[str, ...]] = {}
    for line in found[2].splitlines()[2:]:
        families, *others = (cell.strip() for cell in line.strip("|").split("|"))
        rows |= dict.fromkeys(families.split(", "), tuple(others))
    return rows


def table(rows: dict[str, tuple[str, ...]]) -> str:
    """The text between the markers of docs/models.md: families with the same cells share a line."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in sorted(rows):
        groups.setdefault(rows[family], []).append(family)
    lines = [
        "| families | the head | `g2rl train` | `G2RLTrainer` | TRL's own head |",
        "|---|---|---|---|---|",
    ]
    for group, families in sorted(groups.items(), key=lambda item: (-len(item[1]), item[1])):
        lines.append(f"| {' | '.join((', '.join(families), *group))} |")
    return "\n".join(lines) + "\n"


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells on the page: errors of random weights have no meaning beyond their being there."""
    head, *others = astuple(row)
    found = ["refused" if cell == head else re.sub(r"wrong by \S+ nats", "wrong", cell) for cell in others]
    return head, *found


def sweep(family: str) -> Row:
    try:
        build(family)
    except Exception as error:  # whatever a family's construction raises
        return Row(NOT_TRIED.get(family, f"not tried: {one_line(error, 60)}"), "", "", "")
    return Row(
        verdict(lambda: describe(find_head(build(family)))),
        verdict(lambda: ours(build(family))),
        verdict(lambda: trl(build(family))),
        verdict(lambda: own_head(build(family))),
    )


def build(family: str) -> Any:
    """A tiny model of the family; one that may be an encoder is a decoder."""
    usual = model_class(family).config_class()
    return tiny_model(family, **{key: True for key in ("is_decoder", "causal") if hasattr(usual, key)})


def verdict(check: Callable[[], str]) -> str:
    """What `check` returns, or the reason why it refuses or fails, in a few words."""
    signal.alarm(LIMIT)
    try:
        with quiet():
            return check()
    except Exception as error:
        text = one_line(error, 500)
        for pattern, reason in REASONS.items():
            if re.search(pattern, text):
                return f"refused: {reason}"
        kind = "refused" if isinstance(error, TrainerError) else "fails"
        return f"{kind}: {text.replace('|', '/')[:100]}"
    finally:
        signal.alarm(0)


# --- what is tried ------------------------------------------------------------------------------------------


def describe(head: LMHead) -> str:
    parts = ["bias"] if head.output.bias is not None else []
    parts += ["scale"] if head.logit_scale != 1 else []
    parts += ["softcap"] if head.logit_softcap is not None else []
    parts += ["part of the rows"] if head.rows is not None else []
    return ", ".join(parts + (["masked entries"] if head.masked else [])) or "plain"


def ours(model: Any) -> str:
    """One step of `g2rl train`, and the error of its log-probs on the padded pair."""
    import g2rl_kernels as g2
    from g2rl_kernels.models.responses import response_hidden
    from g2rl_kernels.trainer import Trainer, TrainerConfig

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "batch_size": 4,
            "group_size": 2,
            "max_prompt_tokens": 16,
            "max_new_tokens": 4,
            "steps": 1,
        }
        trainer = Trainer(model, tokenizer(), Letters(), TrainerConfig.from_dict(settings))
        trainer.step()
    model.eval()
    ids, attention = padded()
    mask = torch.ones(2, len(RESPONSES[0]), dtype=torch.bool)
    with torch.no_grad():
        hidden, tokens, _ = response_hidden(trainer.head, ids, attention, mask)
        found = g2.linear_logprobs(hidden, tokens=tokens, **trainer.head.arguments()).logprobs
    return judged(found, truth(model))


def trl(model: Any) -> str:
    """One step of G2RLTrainer, and the error of its log-probs on the padded pair."""
    fresh = copy.deepcopy(model)
    try:
        return trained(model)
    except (AttributeError, IndexError):  # TRL's load-balancing loss does not know every configuration
        if not hasattr(model.config.get_text_config(), "output_router_logits"):
            raise
        return f"{trained(fresh, router_aux_loss_coef=0.0)} with router_aux_loss_coef=0"


def trained(model: Any, **settings: Any) -> str:
    from datasets import Dataset

    from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = G2RLConfig(
            folder,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            max_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        )
        prompts = Dataset.from_dict({"prompt": ["abc" + "+1" * (i % 3) for i in range(8)]})
        trainer = G2RLTrainer(model, parity, args, prompts, processing_class=tokenizer())
        trainer.train()
    return scored(trainer.model)


def own_head(model: Any) -> str:
    """The error of TRL's own head on the padded pair, and where that is wrong, without padding."""
    from trl.trainer.utils import add_fused_lm_head

    expected = truth(model)
    add_fused_lm_head(model)
    found = scored(model, expected)
    if not found.startswith("wrong"):
        return found
    alone = torch.cat([fused(model, torch.tensor([p + r]), None) for p, r in zip(PROMPTS, RESPONSES)])
    return judged(alone, expected).replace("right", f"{found} under padding")


def scored(model: Any, expected: Tensor | None = None) -> str:
    expected = truth(model) if expected is None else expected
    return judged(fused(model, *padded()), expected)


def fused(model: Any, ids: Tensor, attention: Tensor | None) -> Tensor:
    labels = ids.clone()
    labels[:, : -len(RESPONSES[0])] = -100
    model.eval()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    logprobs: Tensor = out.log_probs[:, -len(RESPONSES[0]) :]
    return logprobs.flatten()


def truth(model: Any) -> Tensor:
    """Log-probs of the responses' tokens by the model's logits after each token's prefix, without padding."""
    found = []
    model.eval()
    for prompt, response in zip(PROMPTS, RESPONSES):
        for end, token in enumerate(response):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + response[:end]]), use_cache=False).logits
            found.append(logits[0, -1].double().log_softmax(-1)[token])
    return torch.stack(found)


def judged(found: Tensor, expected: Tensor) -> str:
    error = (found - expected).abs().max().item()
    return "right" if error <= EXACT else f"wrong by {error:.2g} nats"


# --- what it needs ------------------------------------------------------------------------------------------


def padded() -> tuple[Tensor, Tensor]:
    width = max(map(len, PROMPTS))
    ids = [[0] * (width - len(p)) + p + r for p, r in zip(PROMPTS, RESPONSES)]
    attention = [[0] * (width - len(p)) + [1] * len(p + r) for p, r in zip(PROMPTS, RESPONSES)]
    return torch.tensor(ids), torch.tensor(attention)


def tokenizer() -> Any:
    """One token a character; the ids of every tiny model."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = "0123456789+-= abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["<pad>", "</s>", "<unk>", *characters][: VOCABULARY - 4]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


class Letters:
    """A task whose prompts differ in length."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": "abc" + "+1" * (index % 3)}

    def score(self, completion: str, item: dict[str, Any]) -> float:
        return float(sum(map(ord, completion)) % 2)


def parity(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 2) for text in completions]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _late(*_: Any) -> None:
    raise TimeoutError(f"takes more than {LIMIT} seconds")


if __name__ == "__main__":
    main()
