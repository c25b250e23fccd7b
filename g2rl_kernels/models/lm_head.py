"""Finds the backbone and the LM head of a causal language model of transformers: `find_head`.

The ops take the hidden states that enter the LM head, so a trainer runs the backbone alone and forms no
logits. `find_head` reads from the model's configuration what its family does between hidden states and logits
(bias, scale, softcap, entries left out), and checks the result against the model's own log-probabilities.
docs/models.md lists the families.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..errors import TrainerError, one_line, out_of_memory
from ..head.lora import Lora
from .head_adapter import active_adapter, check_head_adapter


class HeadArguments(TypedDict):
    """The keyword arguments of `head_features` and `linear_logprobs` that describe a model's LM head."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    temperature: float | Tensor
    logit_scale: float
    logit_softcap: float | None
    lora: Lora | None  # A [r, d], B [V, r], scaling


@dataclass
class LMHead:
    """What the ops need of a causal language model: the backbone, which gives h, and the head's arithmetic.

    The logits are z = softcap(logit_scale (W h + b)), with softcap(x) = c tanh(x / c), or x for c = None. The
    first `rows` rows of W are the vocabulary, and the ids in `masked` have the logit -inf. With an unmerged
    LoRA adapter of PEFT on the head, W is the base weight plus scaling B A.
    """

    backbone: nn.Module  # backbone(input_ids=...).last_hidden_state: [B, L, d], after the final norm
    output: nn.Linear  # W [V, d] and b [V] or None; with an adapter PEFT's layer around it, with both
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # c
    rows: int | None = None  # None: all V
    masked: tuple[int, ...] = ()  # ids that the model never gives
    shares: bool = False  # rows that begin alike may be run once there: models/responses.py

    def arguments(self, temperature: float | Tensor = 1.0, dtype: torch.dtype | None = None) -> HeadArguments:
        """What both ops need of the head, as keyword arguments:

            g2.head_features(hidden, tokens=tokens, cu_seqlens=cu_seqlens, **head.arguments())
            g2.linear_logprobs(hidden, tokens=tokens, **head.arguments())

        temperature: of sampling, a number or one a token [N]. dtype: of weight and bias, which must be that
        of `hidden`; None: that of the parameters. Weight and bias are differentiable in the parameters.
        """
        weight, bias = self.weights(self.output.weight.dtype if dtype is None else dtype)
        return {
            "weight": weight,
            "bias": bias,
            "temperature": temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "lora": self.lora,
        }

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """weight [V, d] and bias [V] or None, in `dtype`; differentiable in the parameters."""
        weight, bias = (
            None if parameter is None else _whole(parameter).to(dtype)
            for parameter in (self.output.weight, self.output.bias)
        )
        if self.rows is not None:
            weight, bias = weight[: self.rows], None if bias is None else bias[: self.rows]
        if self.masked:
            at = torch.tensor(self.masked, device=weight.device)
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            bias = bias.index_fill(0, at, -torch.inf)
        return weight, bias

    def logits(self, hidden: Tensor) -> Tensor:
        """z [..., V] in float32 from a few hidden states [..., d], to compare with the model's own."""
        z = nn.functional.linear(hidden, *self.weights(hidden.dtype)).float()
        if self.lora is not None:
            A, B, scaling = self.lora
            z = z + (hidden.to(A.dtype) @ A.T @ B.T * scaling).float()
        z = z * self.logit_scale
        return z if self.logit_softcap is None else self.logit_softcap * torch.tanh(z / self.logit_softcap)

    def options(self, temperature: float) -> dict[str, Any]:
        """`arguments` without weight and bias."""
        return {
            "temperature": temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "lora": self.lora,
        }

    @property
    def lora(self) -> Lora | None:
        """A [r, d], B [V, r] and scaling of the unmerged adapter that is active on the head; None without.

        Raises TrainerError for an adapter that is not supported, as `find_head` does, or whose dropout is on.
        """
        adapter = active_adapter(self.output)
        if adapter is None:
            return None
        if adapter.dropout and self.output.training:
            raise TrainerError(
                f"model: the adapter on the LM head has lora_dropout = {adapter.dropout:g}, which its "
                "log-probs and features would leave out: set it to 0"
            )
        A, B = _whole(adapter.A), _whole(adapter.B)
        return A, B if self.rows is None else B[: self.rows], adapter.scaling


def _whole(parameter: Any) -> Tensor:
    """The whole parameter where FSDP2 keeps a shard (a DTensor) on each rank; otherwise the parameter itself.

    Its gradient is averaged over the ranks here: FSDP2 does that only for modules whose forward is called.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    whole: Tensor = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return whole


def find_head(model: Any, compare: bool = True) -> LMHead:
    """The backbone and the LM head of a causal language model of transformers.

        head = g2.find_head(model)
        hidden = head.backbone(input_ids=ids, attention_mask=mask).last_hidden_state        # [B, L, d]
        g2.linear_logprobs(hidden[:, :-1].flatten(0, 1), tokens=ids[:, 1:].flatten(), **head.arguments())

    Supports families whose head is a plain nn.Linear [V, d], tied to the embeddings or not, with an optional
    bias, scale (Cohere's `logit_scale`, Granite's `logits_scaling`, ...), softcap (Gemma's
    `final_logit_softcapping`, ...) and entries left out, as `model.config` names them: see docs/models.md. A
    head trained through PEFT's `modules_to_save` is used; so is one with a LoRA adapter (`LMHead.lora`), not
    with several, DoRA, a bias of the adapter, or an adapter of another kind.

    Args:
        model: a transformers model, also within PEFT or under FSDP2; unwrap DDP first (`model.module`).
        compare: run the model on two rows of eight random tokens and compare its log-probabilities with those
            of `LMHead.logits`; under FSDP2 all ranks must call. Pass False where this rank has no weights
            (ZeRO-3, meta device).

    Returns:
        `LMHead`. It refers to the model's modules, so it follows their updates.

    Raises:
        TrainerError: the model has no backbone or LM head, its head is not a plain nn.Linear or carries an
            adapter that is not supported, a setting of its configuration that acts on logits is not a
            positive number, or its log-probabilities differ from those that the configuration implies.
    """
    name = type(model).__name__
    inner = base_model(model)
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    backbone = backbone_of(inner)
    if output is None or backbone is None:
        raise TrainerError(
            f"model: {name} is not a transformers causal language model with a backbone and an LM head"
        )
    check_head_adapter(output)
    # With modules_to_save, PEFT trains a copy of the head; output.weight is that of the active one
    linear = output.original_module if hasattr(output, "modules_to_save") else output
    linear = getattr(linear, "base_layer", linear)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise TrainerError(
            f"model: the LM head is a {type(linear).__name__}; only a plain nn.Linear is supported"
        )
    head = LMHead(backbone, output, *_arithmetic(inner.config))
    if compare:
        _compare_logits(inner, head)
    return head


def backbone_of(model: Any) -> Any:
    """The module of a transformers model that gives the hidden states; None where there is none."""
    backbone = getattr(model, "base_model", None)
    if backbone is model:  # Llama 4 and Mllama: their prefix names a module of the class with images
        backbone = getattr(model, "model", None)
    return backbone if isinstance(backbone, nn.Module) else None


def base_model(model: Any) -> Any:
    """The transformers model within PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode; afterwards each module has the mode that it had.

    Linear layers of other classes than torch's own are in training mode: theirs changes no product, and in
    evaluation mode bitsandbytes repacks 4-bit weights on a CPU, for good.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module, _ in modes:
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                module.training = True
        yield
    finally:
        for module, training in modes:
            module.training = training


# What a configuration's settings do to W h + b: 1 multiplies, -1 divides.
_SCALES = {
    "logit_scale": 1,  # Cohere
    "output_multiplier": 1,  # Muse Glimmer, Muse Spark
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_scaling": -1,  # Granite, MiniCPM3 (of the hidden states, which is the same)
    "logits_mup_width_multiplier": -1,  # Inkling, of the hidden states
}
# Families in which such a setting does something else; 0: it does nothing.
_UNLIKE: dict[str, dict[str, int]] = {
    "hyperclovax": {"logits_scaling": 1},
    "hyperclovax_vision_v2": {"logits_scaling": 1},
    "mpt": {"logit_scale": 0},
    "aya_vision": {"logit_scale": 0},
    "cohere2_vision": {"logit_scale": 0},
    "gemma3": {"final_logit_softcapping": 0},
}
_SOFTCAPS = (
    "final_logit_softcapping",  # Gemma 2 and later, NanoChat, VaultGemma
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)


def _arithmetic(config: Any) -> tuple[float, float | None, int | None, tuple[int, ...]]:
    """logit_scale, logit_softcap, rows and masked of `LMHead`, as the model's configuration names them."""
    try:
        settings = config.get_text_config()
    except ValueError:  # several, as in an encoder-decoder model
        settings = config
    unlike = _UNLIKE.get(config.model_type, {})
    scale = 1.0
    for key, power in _SCALES.items():
        power = unlike.get(key, power)
        if power and getattr(settings, key, None) is not None:
            scale *= _positive(settings, key) ** power
    softcap = None
    for key in _SOFTCAPS:
        if unlike.get(key, 1) and getattr(settings, key, None):
            softcap = _positive(settings, key)
    rows = getattr(settings, "unpadded_vocab_size", None)  # Inkling
    names = getattr(settings, "vocabulary_map", None) or {}  # Chameleon never writes an image's tokens
    return scale, softcap, rows, tuple(sorted(i for name, i in names.items() if name.startswith("IMGIMG")))


def _positive(settings: Any, key: str) -> float:
    value = getattr(settings, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise TrainerError(f"model: its configuration has {key}={value!r}; needs a positive number")
    return float(value)


@torch.no_grad()
def _compare_logits(model: Any, head: LMHead) -> None:
    """Runs the model on random tokens: some families do what no key of their configuration names."""
    name, weight = type(model).__name__, head.output.weight
    entered: list[Tensor] = []  # the input of the LM head's module, where the model calls it
    hook = head.output.register_forward_hook(lambda _module, args, _output: entered.extend(args[:1]))
    try:
        ids = some_tokens(model, head).to(weight.device)
        with evaluation_mode(model), _without_autocast(model):
            theirs = model(input_ids=ids, use_cache=False).logits
            hidden = head.backbone(input_ids=ids, use_cache=False).last_hidden_state
            ours = head.logits(hidden.to(weight.device, weight.dtype))
    except Exception as error:  # whatever a family's forward raises at text alone
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise TrainerError(
            f"model: {name} does not give logits and hidden states for token ids alone "
            f"({type(error).__name__}: {one_line(error, 160)}); it is not supported"
        ) from error
    finally:
        hook.remove()
    where = ""
    if entered and entered[0].shape[:2] == ids.shape:
        same = entered[0].shape == hidden.shape
        same = same and torch.allclose(entered[0].float(), hidden.to(entered[0].device).float(), 1e-2, 1e-2)
        where = ", after its LM head" if same else ", before its LM head"
    check_logits(model, ours, theirs.to(weight.device), weight.dtype, where)
    agrees, nats = _compare(theirs[0, :SAME], theirs[1, :SAME], weight.dtype)
    if not agrees:
        off = [key for key in ("is_decoder", "causal") if getattr(model.config, key, None) is False]
        raise TrainerError(
            f"model: {name} is not causal: later tokens change the log-probs of earlier ones by {nats:.2g} "
            f"nats; {f'set {off[0]}: true in its configuration' if off else 'it is not supported'}"
        )


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """The model runs without the autocast that accelerate has put around its forward (not its backbone's)."""
    own, wrapped = vars(model).get("_original_forward"), model.forward
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = wrapped


SAME = 4  # the two rows of tokens start with so many that are equal


def some_tokens(model: Any, head: LMHead) -> Tensor:
    """[2, 8] token ids, always the same for a model, without those that its configuration gives a meaning."""
    size = head.rows or head.output.weight.shape[0]
    embedding = model.get_input_embeddings()
    if isinstance(getattr(embedding, "num_embeddings", None), int):
        size = min(size, embedding.num_embeddings)
    special = [*head.masked]
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        for key, value in () if config is None else vars(config).items():
            if key.endswith(("token_id", "token_ids", "token_index")):
                special += value if isinstance(value, (list, tuple)) else [value]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:4096].tolist()
    plain = [i for i in order if i not in special] or order
    ids = torch.tensor((plain * 16)[:16]).view(2, 8)
    ids[1, :SAME] = ids[0, :SAME]
    return ids


def check_logits(model: Any, ours: Tensor, theirs: Tensor, dtype: torch.dtype, where: str = "") -> None:
    """Raises TrainerError if the log-probabilities of `ours` differ from those of the model.

    The softmax is over the last dimension. An error is measured in nats for each entry: its tolerance follows
    from the spread of the logits and the rounding of that entry, so that a large entry hides no other.

    Args:
        model: its name is in the error.
        ours: [..., V], from `LMHead.logits`; -inf where an entry is masked.
        theirs: [..., V], the model's logits; -inf or the lowest number of its dtype where an entry is masked.
        dtype: of the model's computation, which sets the tolerance with the dtype of `theirs`.
        where: the differing is known to arise here; for the error.
    """
    name = type(model).__name__
    if ours.shape != theirs.shape:
        raise TrainerError(
            f"model: {name} gives {theirs.shape[-1]} logits, but its configuration implies {ours.shape[-1]}; "
            "its LM head is not supported"
        )
    absent = _absent(theirs)
    if not bool((theirs.isfinite() | absent).all()):
        raise TrainerError(f"model: {name} gives logits that are NaN or infinite: are its weights damaged?")
    unlike = (absent != _absent(ours)).flatten(0, -2).any(0).nonzero()[:, 0].tolist()
    if unlike:
        raise TrainerError(
            f"model: {name} masks {len(unlike)} entries of its vocabulary (ids {str(unlike[:5])[1:-1]}, ...) "
            "in a way that its configuration does not name; its LM head is not supported"
        )
    agrees, error = _compare(ours, theirs, dtype)
    if agrees:
        return
    x, y = (z.float().masked_fill(absent, torch.nan) for z in (ours, theirs))
    x, y = x - x.nanmean(-1, keepdim=True), y - y.nanmean(-1, keepdim=True)
    ratio, hint = float((x * y).nansum() / (x * x).nansum()), ""
    if _compare(ours * ratio, theirs, dtype)[0]:
        hint = f"; its logits are {ratio:.4g} times those, by a setting that is unknown here"
    raise TrainerError(
        f"model: {name} does something unknown between hidden states and logits{where} (its log-probs differ "
        f"by {error:.2g} nats from those that its configuration implies{hint}); its LM head is not supported"
    )


def _absent(logits: Tensor) -> Tensor:
    """Where a logit is -inf, or the lowest number of its dtype, which some families write for it."""
    return logits <= torch.finfo(logits.dtype).min / 2


def _compare(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether the log-probs of two logits [..., V] agree, and their largest difference in nats."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(theirs.dtype).eps)
    relative, rounding = (2e-2, 2 * eps) if eps > 1e-5 else (1e-3, 8 * eps)
    absent = _absent(theirs)
    z = theirs.float().masked_fill(absent, torch.nan)
    spread = (z - z.nanmedian(-1, keepdim=True).values).abs().nanmedian(-1, keepdim=True).values
    tolerance = relative * (1 + spread) + rounding * z.abs()
    p, q = (x.float().masked_fill(absent, -torch.inf).log_softmax(-1) for x in (ours, theirs))
    error = (p - q).abs().masked_fill(absent, 0)
    return bool(((error <= tolerance) | absent).all()), error.max().item()


def frozen_copy(head: LMHead, autocast: bool) -> LMHead:
    """A copy without gradients, for the reference policy.

    With autocast (bf16) its linear layers are stored in bf16: the same numbers, half the memory.
    """
    backbone, output = copy.deepcopy((head.backbone, head.output))  # in one call: a tied head stays tied
    backbone.requires_grad_(False).eval()
    output.requires_grad_(False).eval()
    if autocast:
        tied = {
            parameter.data_ptr()
            for module in backbone.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        for module in [*backbone.modules(), getattr(output, "base_layer", output)]:
            if type(module) is nn.Linear and module.weight.data_ptr() not in tied:
                module.to(torch.bfloat16)
    return replace(head, backbone=backbone, output=output)
