"""An adapter of PEFT on the LM head: which are supported, and the active one's matrices."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import TrainerError

REMEDY = "leave lm_head out of target_modules (modules_to_save trains it), or merge the adapter first"


class Adapter(NamedTuple):
    """Adds scaling B A to the weight of a linear layer."""

    A: Tensor  # [r, d]
    B: Tensor  # [V, r]
    scaling: float
    dropout: float  # probability, of the adapter's input


def active_adapter(output: Any) -> Adapter | None:
    """The adapter that acts beside the weight of an LM head; None for a plain head, and where adapters are
    merged into the weight, disabled, or not active.

    Raises TrainerError, with the reason, for one that is not plain LoRA.
    """
    if not hasattr(output, "base_layer"):
        return None
    if not all(hasattr(output, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")):
        raise _refused(f"an adapter that is not LoRA ({type(output).__module__}.{type(output).__name__})")
    if output.merged or output.disable_adapters:
        return None
    names = [name for name in output.active_adapters if name in output.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise _refused(f"{len(names)} active adapters ({', '.join(names)}), of which one is supported")
    (name,) = names
    variant = getattr(output, "lora_variant", {}).get(name)
    if getattr(output, "use_dora", {}).get(name):
        raise _refused("an adapter with use_dora, which also scales the rows of the weight")
    if variant is not None:
        raise _refused(f"a variant of LoRA ({type(variant).__name__})")
    A, B, dropout = output.lora_A[name], output.lora_B[name], output.lora_dropout[name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        raise _refused(f"an adapter whose matrices are {type(A).__name__} and {type(B).__name__}")
    if A.bias is not None or B.bias is not None:
        raise _refused("an adapter with lora_bias")
    return Adapter(A.weight, B.weight, float(output.scaling[name]), float(getattr(dropout, "p", 0.0)))


def check_head_adapter(output: Any, dropout: bool = True) -> None:
    """Raises TrainerError if the head carries an adapter that is not supported, active or not disabled.

    dropout: whether the adapter may drop out. It may where the model is in evaluation mode only.
    """
    adapter = active_adapter(output)
    if adapter is not None and adapter.dropout and not dropout:
        raise _refused(
            f"an adapter with lora_dropout = {adapter.dropout:g}, which log-probs and features leave out"
        )


def _refused(what: str) -> TrainerError:
    return TrainerError(f"model: the LM head carries {what}: {REMEDY}")
