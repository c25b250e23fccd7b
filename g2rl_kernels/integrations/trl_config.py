"""G2RLConfig, the reward function that its settings name, and checks of both with the data."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import nn

from ..arguments import check_bytes
from ..group.options import SCORE_GATE, option, option_field
from ..group.shaping import ALGORITHMS, ENTROPY_COEF, LABELS, REWARDS
from ..head.logprobs import LOGITS_MEMORY
from ..models.encoder import DEFAULT_ENCODER
from ..models.method_inputs import check_direction_prompts
from .systems import SystemSettings
from .trl_masks import check_masks
from .trl_seams import GRPOConfig, get_callable_name, get_config_model_id


@dataclass
class G2RLConfig(GRPOConfig):
    """GRPOConfig with the settings of G2RL, which begin with `g2rl_`.

    `g2rl_lam` to `g2rl_uniform_groups` are options of `g2.group_geometry`. `entropy_coef` and `epsilon_high`
    are TRL's; where they are unset the algorithm decides.

    Raises:
        ValueError, TypeError: a setting cannot work; the message starts with its name.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # those that may be given as JSON
        *GRPOConfig._VALID_DICT_FIELDS,
        "g2rl_direction_prompts",
    ]

    g2rl_algorithm: str = option(
        "g2rl",
        "'g2rl', a system that the paper compares it with: 'grpo', 'entropy_bonus' (grpo with "
        "entropy_coef), 'evol_rl' (arXiv 2509.15194), or a method of another paper: 'repexp' (2510.11686), "
        "'dqo' (2509.04784), 'setpo' (2602.01062), 'dra' (2505.09655), 'passk' (2508.10751), 'dirl' "
        "(2606.10346), 'gar' (2609.03342; the data set needs a column 'solution'). All of them log g2rl/*.",
        ALGORITHMS,
    )
    g2rl_similarity: str = option_field("similarity")
    g2rl_strength: float | None = option_field("strength")
    g2rl_ridge: float = option_field("ridge")
    g2rl_pass_k: int = option_field("pass_k")
    g2rl_direction_prompts: dict | str | None = field(
        default=None,
        metadata={
            "help": "dirl: two sets of prompts of one's own, {reasoning: [...], memory: [...]}; JSON on the "
            "command line. Unset: twelve English ones of each."
        },
    )
    g2rl_lam: float = option_field("lam", help="Exploration strength of g2rl; 0 is GRPOTrainer, to the bit.")
    g2rl_clip: float = option_field("clip")
    g2rl_shaping: str = option_field("shaping")
    g2rl_exploration_score: str = option_field("exploration_score")
    g2rl_uniform_groups: str = option_field("uniform_groups")
    g2rl_correctness_reward: str | None = option(  # an int too, but TrlParser takes one type
        None,
        "Name of the reward function that says whether an answer is right, or its index, from 0; its rewards "
        "are shaped, others are not. Required where there are several reward functions.",
    )
    g2rl_rewards: str = option(
        "binary",
        "What the correctness reward says: 'binary', whether an answer is right, by "
        "g2rl_correctness_threshold; 'graded', how good it is: answers are compared with their group's mean, "
        "whatever the unit.",
        REWARDS,
    )
    g2rl_correctness_threshold: float = option(
        SCORE_GATE,
        "Answers whose correctness reward is at least this are right: by default 1, less rounding.",
    )
    g2rl_correctness_gap: float = option(
        1.0,
        "Distance between the correctness rewards of right and wrong answers: 1 for 0 and 1, 2 for -1 and "
        "+1. With it g2rl_lam means the same in every unit.",
    )
    g2rl_labels: str = option(
        "truth",
        "Which answers are right: by 'truth', the correctness reward; by 'majority', the group's most "
        "frequent answer. With 'majority' the correctness reward counts in metrics only.",
        LABELS,
    )
    g2rl_answer_func: str | None = option(
        None,
        "For evol_rl and majority labels: dotted path of a function from a completion's text to its answer, "
        "or None without an answer. Unset: the final answer as tasks read it.",
    )
    g2rl_encoder: str = option(
        DEFAULT_ENCODER,
        "evol_rl and g2rl_similarity=text: the sentence-transformers model that embeds completions: a hub "
        "name, a local directory or pypi:<package>.",
    )
    entropy_coef: float | None = option(
        None,
        "Coefficient of the mean per-token entropy, which the loss rewards. Unset: 0.003 for entropy_bonus "
        "and evol_rl, 0 otherwise.",
    )
    g2rl_fused_logprobs: bool | None = option(
        None,
        "Whether g2.linear_logprobs computes log-probs and entropies of policy and reference (float32 "
        "logits, tile by tile, forward and backward) instead of TRL's chunked head. Unset: yes, except with "
        "g2rl_lam=0, under ZeRO-3 and with a mixture-of-experts loss, which need TRL's.",
    )
    g2rl_logits_memory: int = option(
        LOGITS_MEMORY,
        "Bytes of logits that g2.linear_logprobs may keep from a micro-batch's forward to its backward pass, "
        "on a CPU; more saves time up to all of them, 0 computes them again.",
    )

    g2rl_keep_sampling_mask: bool = option(
        False,
        "Where top_p, top_k or min_p truncate: log-probs of policy, old policy and reference, entropies and "
        "features are those of the softmax over the ids that sampling kept of each token's.",
    )

    def __post_init__(self) -> None:
        settings, algorithm = TRLSettings.of(self), self.g2rl_algorithm
        settings.check(self.num_generations, "num_generations")
        check_bytes("g2rl_logits_memory", self.g2rl_logits_memory)
        if self.entropy_coef is None:
            self.entropy_coef = ENTROPY_COEF[algorithm]
        bonus = self.entropy_coef != 0 or self.use_adaptive_entropy
        if (algorithm == "grpo" and bonus) or (algorithm == "entropy_bonus" and not bonus):
            raise ValueError(
                f"entropy_coef: got {self.entropy_coef} with g2rl_algorithm={algorithm}: grpo has no entropy "
                "bonus, and entropy_bonus has one; leave it unset for the algorithm's own"
            )
        self.epsilon_high = settings.clip_high(self.epsilon_high, None)  # type: ignore[has-type]
        super().__post_init__()
        check_direction_prompts(self.g2rl_direction_prompts, "g2rl_direction_prompts")
        check_masks(self)


class TRLSettings(SystemSettings):
    """The settings of a G2RLConfig, as verl and SkyRL have them."""

    aligns = True
    prefix = "g2rl_"

    @classmethod
    def of(cls, args: G2RLConfig) -> TRLSettings:
        given, names = vars(args), [one.name for one in fields(cls)]
        return cls(**{name: given[cls.prefix + name] for name in names if cls.prefix + name in given})


def check_prompts(train_dataset: Any, args: G2RLConfig) -> None:
    """Raises ValueError for fewer prompts than fill a generation batch: TRL would train nothing, silently."""
    needed = args.generation_batch_size // args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < needed:
        raise ValueError(
            f"train_dataset: {len(train_dataset)} prompts, but a generation batch takes {needed} "
            f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}), "
            "so nothing would be trained; give more prompts, or lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )


def warn_save_steps(args: G2RLConfig, num_iterations: int) -> None:
    """Warns where a checkpoint falls between two generations: a run resumed from it gives other numbers.

    TRL generates every steps_per_generation * num_iterations micro-batches, an optimiser step takes
    gradient_accumulation_steps of them, and a resumed run generates at once.
    """
    between = args.steps_per_generation * num_iterations
    needed = between // math.gcd(between, args.gradient_accumulation_steps)
    every = args.save_steps
    if args.save_strategy == "steps" and every >= 1 and int(every) % needed:
        warnings.warn(
            f"save_steps={int(every)}: a run resumed from such a checkpoint gives other numbers, as TRL "
            f"generates every {needed} steps (steps_per_generation={args.steps_per_generation} * "
            f"num_iterations={num_iterations} / gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}): set save_steps to a multiple of {needed}",
            stacklevel=3,
        )


def reward_names(reward_funcs: Any) -> list[str]:
    """The names that GRPOTrainer gives to its `reward_funcs`, before any reward model is loaded."""
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    names = [get_config_model_id(one.config) if isinstance(one, nn.Module) else one for one in functions]
    return [n.split("/")[-1] if isinstance(n, str) else get_callable_name(n) for n in names]


def check_rewards(names: list[str], args: G2RLConfig) -> int:
    """`correctness_column` of these settings; raises ValueError where other rewards would have no effect."""
    if len(names) > 1 and TRLSettings.of(args).gives_advantages:
        raise ValueError(
            f"reward_funcs: got {', '.join(names)}, but g2rl_algorithm={args.g2rl_algorithm} gives "
            "advantages of one reward: give the function that says whether an answer is right"
        )
    return correctness_column(names, args.g2rl_correctness_reward)


def correctness_column(names: list[str], asked: str | int | None) -> int:
    """Index of the reward function whose rewards are shaped; `asked` is g2rl_correctness_reward.

    asked: a name, or an index where no reward function has that name; a command line gives it as digits.
    """
    if asked is None:
        if len(names) == 1:
            return 0
    elif names.count(str(asked)) == 1:
        return names.index(str(asked))
    elif str(asked) not in names and str(asked).isdecimal() and int(asked) < len(names):
        return int(asked)
    last = len(names) - 1
    raise ValueError(
        f"g2rl_correctness_reward: got {asked!r}, needs the name, or the index from 0 to {last}, of the one "
        f"reward function that says whether an answer is right: {', '.join(names)}"
    )
