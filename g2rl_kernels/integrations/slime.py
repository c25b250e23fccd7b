"""G2RL in slime, by two flags of its `train.py`, with settings in a third:

    --custom-megatron-before-log-prob-hook-path g2rl_kernels.integrations.slime.measure_features
    --custom-advantage-function-path g2rl_kernels.integrations.slime.shaped_advantages
    --custom-config-path recipes/slime-g2rl.yaml

slime's training actors call, once a rollout, in this order:

    measure_features      before each log-prob forward; before the policy's it hooks the model's last stage,
                          and every micro-batch then leaves the features of its samples
    shaped_advantages     after it, with this rank's samples: gathers features over the data-parallel ranks,
                          shapes the raw rewards of the whole rollout, and normalises them as slime does

No forward is added and nothing of slime is replaced. docs/slime.md is for users.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import g2rl_kernels as g2

from .._clock import clock
from ..group.alarm import CollapseAlarm
from ..group.shaping import response_keys
from .megatron import head_shard, mean_over_ranks, packed_bounds, whole_sequence
from .systems import ShapingSettings

try:
    from megatron.core import mpu
except ImportError as error:  # part of a Megatron Core whose other parts could be imported
    raise ImportError(f"g2rl_kernels.integrations.slime needs megatron.core.mpu ({error})") from error

ESTIMATORS = (
    "grpo",
    "gspo",
    "cispo",
)  # those whose rewards slime normalises in groups, and whose values it needs not


@dataclass
class Settings(ShapingSettings):
    """The mapping `g2rl` in the file of `--custom-config-path`."""

    prefix = "g2rl."

    @classmethod
    def read(cls, args: Any) -> Settings:
        """Reads and checks the settings in slime's arguments.

        Raises ValueError or TypeError, naming the option, for a setting that cannot work, and for options of
        slime that leave no group rewards to shape.
        """
        given, names = getattr(args, "g2rl", None), [one.name for one in fields(cls)]
        if given is None:
            given = {}
        if not isinstance(given, dict) or not given.keys() <= set(names):
            raise ValueError(f"g2rl: got {given!r}, needs a mapping of {', '.join(names)}")
        settings = cls(**given)
        settings.check(args.n_samples_per_prompt, "--n-samples-per-prompt")
        if args.advantage_estimator not in ESTIMATORS:
            raise ValueError(
                f"--advantage-estimator: got {args.advantage_estimator}, g2rl needs {', '.join(ESTIMATORS)}"
            )
        for name in ("custom_reward_post_process_path", "custom_convert_samples_to_train_data_path"):
            if getattr(args, name, None) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {getattr(args, name)}, g2rl normalises rewards as "
                    "slime does by default and needs it unset"
                )
        if args.custom_advantage_function_path is None:
            raise ValueError(
                "--custom-advantage-function-path: got None, features are measured for "
                "g2rl_kernels.integrations.slime.shaped_advantages"
            )
        return settings


_measurement: Measurement | None = None  # of the rollout at hand; None on other pipeline stages
_alarm: CollapseAlarm | None = None  # of this process's run
_rollouts = 0  # shaped so far by this process


def measure_features(args: Any, model: list[nn.Module], store_prefix: str) -> None:
    """`--custom-megatron-before-log-prob-hook-path`.

    Args:
        args: slime's arguments.
        model: chunks of the model on this pipeline stage.
        store_prefix: "" for the policy; others, such as "ref_", are not measured.
    """
    global _measurement
    if store_prefix:
        return
    Settings.read(args)
    if _measurement is not None:
        _measurement.stop()
    _measurement = None
    for chunk in model:
        for module in chunk.modules():
            if getattr(module, "post_process", False) and hasattr(module, "output_layer"):
                _measurement = Measurement(args, chunk, module.get_submodule("output_layer"))
                return


class Measurement:
    """Hooks that leave the features of every micro-batch which the model runs on.

    The output layer's input is kept while the model runs; features are computed when it has ended. (With
    multi-token prediction the layer runs several times: the last is the next token's.)
    """

    def __init__(self, args: Any, chunk: nn.Module, output_layer: nn.Module) -> None:
        self.args, self.output_layer = args, output_layer
        self.features: list[Tensor] = []  # [sequences, d] of each micro-batch
        self.seconds = 0.0
        self.hooks = [
            output_layer.register_forward_pre_hook(self._at_output_layer, with_kwargs=True),
            chunk.register_forward_hook(self._after_model, with_kwargs=True),
        ]

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _at_output_layer(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = args[0] if args else kwargs["input_"]
        self.weight = kwargs.get("weight")

    @torch.no_grad()
    def _after_model(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        start = clock(self.hidden.device)
        hidden = whole_sequence(self.hidden, self.output_layer)[:, 0]
        head = head_shard(self.output_layer, self.weight, self.args.vocab_size)
        del self.hidden, self.weight
        group = mpu.get_context_parallel_group()
        following, owner, count = following_tokens(
            kwargs["input_ids"][0],
            kwargs["packed_seq_params"],
            group,
            getattr(self.args, "allgather_cp", False),
        )
        rows = kwargs["loss_mask"][0].nonzero()[:, 0]  # where the next token is one that counts
        counts = owner[rows].bincount(minlength=count)
        features = g2.head_features(
            hidden[rows],
            tokens=following[rows],
            cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            temperature=self.args.rollout_temperature,
            **head,
        ).features
        self.features.append(mean_over_ranks(features, counts, group))
        self.seconds += clock(hidden.device) - start

    def by_sample(self, micro_batches: list[list[int]]) -> Tensor:
        """Features [samples, d] in the order of this rank's samples.

        micro_batches: the samples of each, in order; the last sequence of one may be padding.
        """
        if len(micro_batches) != len(self.features):
            raise RuntimeError(
                f"{len(self.features)} micro-batches were measured, this rank has {len(micro_batches)}"
            )
        found = torch.cat([rows[: len(batch)] for rows, batch in zip(self.features, micro_batches)])
        order = torch.tensor([*chain.from_iterable(micro_batches)], device=found.device)
        return torch.empty_like(found).index_copy_(0, order, found)


def following_tokens(
    ids: Tensor, packed_seq_params: Any, group: Any, contiguous: bool
) -> tuple[Tensor, Tensor, int]:
    """The token after each of this rank's T, [T], the sequence that it belongs to, [T], and their number.

    Context-parallel ranks hold parts of every sequence, so the next token may be another rank's: all ranks'
    tokens are put in their places in the packed sequences.

    Args:
        ids: [T] this rank's tokens.
        packed_seq_params: bounds of the whole sequences, in the tokens of all ranks together.
        group: context-parallel ranks.
        contiguous: rank r has the r-th part of all sequences together (`--allgather-cp`). Otherwise each
            sequence is cut into 2 R parts, and rank r of R has the parts r and 2 R - 1 - r (ring attention).
    """
    bounds, ranks, rank, T = packed_bounds(packed_seq_params), group.size(), group.rank(), len(ids)
    place = torch.arange(T, device=ids.device)
    if contiguous or ranks == 1:
        place += rank * T
    else:
        here = bounds // ranks
        owner = torch.searchsorted(here[1:].contiguous(), place, right=True).clamp(max=len(here) - 2)
        part = (here.diff() // 2)[owner]
        at = place - here[owner]
        which = torch.where(at < part, rank, 2 * ranks - 1 - rank)
        place = bounds[owner] + which * part + torch.where(at < part, at, at - part)
    mine = torch.stack([place, ids])
    everyone = mine.new_empty(ranks, 2, T)
    dist.all_gather([*everyone], mine, group=group)
    whole = torch.zeros_like(everyone[:, 1].flatten())
    whole[everyone[:, 0].flatten()] = everyone[:, 1].flatten()
    owner = torch.searchsorted(bounds[1:].contiguous(), place, right=True).clamp(max=len(bounds) - 2)
    return whole[(place + 1).clamp(max=len(whole) - 1)], owner, len(bounds) - 1


def shaped_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """`--custom-advantage-function-path`: fills `advantages` and `returns` of this rank's samples.

    Args:
        args: slime's arguments.
        rollout_data: this rank's part of the rollout. It gets metrics too (`g2rl/*`), which slime logs.

    Raises:
        RuntimeError: no features were measured, or slime's rewards are not those that it gives by default.
        ValueError: the samples of the rollout are not n_samples_per_prompt of each prompt.
    """
    global _measurement, _alarm, _rollouts
    measurement, _measurement = _measurement, None
    if measurement is None or not measurement.features:
        raise RuntimeError(NO_FORWARD)
    measurement.stop()
    device = measurement.features[0].device
    start = clock(device)
    settings, group = Settings.read(args), mpu.get_data_parallel_group()
    raw, mine = raw_rewards(args, rollout_data)
    S = len(raw)
    features = measurement.by_sample(rollout_data["micro_batch_indices"])
    lengths = torch.tensor([len(tokens) for tokens in rollout_data["tokens"]], device=device)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    keys = response_keys(torch.cat(rollout_data["tokens"]).to(device), bounds)
    counts = torch.stack([mask.sum() for mask in rollout_data["loss_masks"]]).to(keys)
    shaped = settings.shape(
        over_ranks(features, mine, S, group),
        raw.to(device),
        "rewards",
        group_ids=torch.arange(S, device=device) // args.n_samples_per_prompt,
        keys=over_ranks(keys, mine, S, group),
        # samples of no rank, which slime drops where they fill no step, count none either
        has_tokens=over_ranks(counts, mine, S, group) > 0,
    )
    rewards = normalised(args, shaped.scores.cpu())[mine].to(device)
    returns = [torch.ones_like(kl) * reward for kl, reward in zip(rollout_data["kl"], rewards)]
    rollout_data["returns"], rollout_data["advantages"] = returns, [*returns]
    seconds = measurement.seconds + clock(device) - start
    found = {**shaped.metrics, "feature_seconds": seconds}
    _alarm, _rollouts = _alarm or settings.alarm(), _rollouts + 1
    found |= _alarm.watch(_rollouts, found, warn=dist.get_rank(group) == 0)
    for name, value in found.items():
        rollout_data[f"g2rl/{name}"] = torch.tensor(value)


def raw_rewards(args: Any, rollout_data: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """Raw rewards [S] of the whole rollout, and the places of this rank's samples in it.

    The samples of a prompt are next to each other, as slime's own normalisation takes them.
    """
    raw, mine = torch.tensor(rollout_data["raw_reward"], dtype=torch.float32), rollout_data.get("partition")
    if mine is None:
        raise RuntimeError(
            "rollout_data: got no partition, which says what samples of the rollout this rank has; g2rl "
            "needs a slime later than 0.3.1"
        )
    if len(raw) != args.n_samples_per_prompt * args.rollout_batch_size:
        raise ValueError(
            f"the rollout has {len(raw)} samples, g2rl needs rollout_batch_size x n_samples_per_prompt = "
            f"{args.rollout_batch_size} x {args.n_samples_per_prompt}, one of each response"
        )
    theirs = torch.as_tensor(rollout_data["rewards"], dtype=torch.float32)
    # Of equal rewards, what differs between CPUs is their rounding divided by 1e-6.
    if not torch.allclose(normalised(args, raw)[mine], theirs, rtol=1e-4, atol=0.02, equal_nan=True):
        raise RuntimeError(
            "slime's rewards are not its raw rewards, normalised in groups: g2rl would train on others. Does "
            "metadata['raw_reward'] replace them, or is this a slime that normalises otherwise?"
        )
    return raw, mine


NO_FORWARD = (
    "g2rl: no features were measured for this rollout. They come from the policy's log-prob forward, which "
    "slime leaves out where a rollout is one step (use --num-steps-per-rollout 2 or more, or "
    "--keep-old-actor) and with --use-rollout-logprobs; and they need "
    "--custom-megatron-before-log-prob-hook-path g2rl_kernels.integrations.slime.measure_features"
)


def normalised(args: Any, raw: Tensor) -> Tensor:
    """What slime makes of a rollout's raw rewards [S]: less the group's mean, divided by its deviation.

    It does so on a CPU; on a GPU the sums would round differently.
    """
    if not args.rewards_normalization:
        return raw
    groups = raw.view(-1, args.n_samples_per_prompt)
    groups = groups - groups.mean(dim=-1, keepdim=True)
    if args.grpo_std_normalization:
        groups = groups / (groups.std(dim=-1, keepdim=True) + 1e-6)
    return groups.flatten()


def over_ranks(values: Tensor, mine: list[int], S: int, group: Any) -> Tensor:
    """[S, ...] of all samples of a rollout, from this rank's; zeros for those of no rank.

    mine: the places of this rank's samples among all.
    """
    whole = values.new_zeros(S, *values.shape[1:])
    whole[mine] = values
    dist.all_reduce(whole, group=group)
    return whole
