"""GeometryCallback: what it logs, and that training does not feel it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from datasets import Dataset
from tiny_trl import CHAT, config, length, logged, make_tokenizer, parity, prompts, save_model, weights
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import g2rl_kernels as g2
from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec, Responses
from g2rl_kernels.integrations.geometry_callback import GeometryCallback
from g2rl_kernels.integrations.trl import G2RLConfig, G2RLTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers

ROLLOUTS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
ASKED = ["abc=", "abc+1+1=", "1+1="]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dropout_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("dropout"), attention_dropout=0.1)


@pytest.fixture
def make(tmp_path: Path, model_dir: str) -> Callable[..., Any]:
    """make("grpo" | "rloo" | "sft", settings of its configuration) with the tiny model."""

    def make(kind: str, **settings: Any) -> Any:
        if kind == "sft":
            rows = [{"text": f"abc+{i % 7}={i % 10}"} for i in range(16)]
            args = SFTConfig(
                str(tmp_path / "out"),
                per_device_train_batch_size=4,
                max_steps=settings.pop("max_steps", 3),
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                **settings,
            )
            return SFTTrainer(model_dir, args, train_dataset=Dataset.from_list(rows))
        trainer, configuration = ROLLOUTS[kind]
        model = settings.pop("model", model_dir)
        rewards = settings.pop("reward_funcs", parity)
        args = config(tmp_path / "out", configuration, **settings)
        return trainer(model=model, reward_funcs=rewards, args=args, train_dataset=prompts())

    return make


class Draws(TrainerCallback):
    """Notes where the random generator is after each step."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.states.append(torch.get_rng_state())


@pytest.mark.parametrize(
    ("kind", "settings", "keywords"),
    [
        ("grpo", {"disable_dropout": False}, {}),  # which draws random numbers
        ("grpo", {"num_iterations": 2, "beta": 0.1, "gradient_checkpointing": True}, {}),
        ("rloo", {"beta": 0.0}, {}),
        ("sft", {}, {"prompts": ASKED, "num_generations": 2, "max_new_tokens": 5}),
    ],
    ids=["grpo with dropout", "grpo with iterations and KL", "rloo", "sft"],
)
def test_training_is_the_same_to_the_bit(
    make: Callable[..., Any],
    dropout_dir: str,
    kind: str,
    settings: dict[str, Any],
    keywords: dict[str, Any],
) -> None:
    runs = []
    if settings.get("disable_dropout") is False:
        settings = {**settings, "model": dropout_dir}
    for watched in (False, True):
        trainer, draws = make(kind, **settings), Draws()
        if watched:
            trainer.add_callback(GeometryCallback(trainer, every=1, **keywords))
        trainer.add_callback(draws)
        generation = trainer.model.generation_config
        trainer.train()
        assert trainer.model.generation_config is generation
        runs.append((trainer, draws))
    (plain, theirs), (watched, ours) = runs
    assert not logged(plain, "g2rl/cos_mean")
    assert len(logged(watched, "g2rl/cos_mean")) >= 1
    for key in ("loss", "grad_norm", "entropy"):
        assert logged(plain, key) == logged(watched, key), key
    assert len(logged(plain, "loss")) > 1
    assert all(map(torch.equal, theirs.states, ours.states))
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(watched)[name]), name


def expected(trainer: Any, generated: Any, rewards: torch.Tensor) -> dict[str, float]:
    """Each response on its own, without padding, through the reference in float64; then pair by pair."""
    model = trainer.model.eval()
    features = []
    with torch.no_grad():
        for prompt, completion in zip(*generated[:2]):
            ids = torch.tensor([prompt + completion])
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            head = HeadSpec(model.lm_head.weight.double(), temperature=trainer.temperature)
            responses = Responses(torch.tensor([0, len(completion)]))
            states, tokens = hidden[len(prompt) - 1 : -1].double(), ids[0, len(prompt) :]
            features.append(reference.head_features(states, tokens, head, responses)[0][0])
    model.train()
    cosines, ranks = [], []
    for group in torch.stack(features).view(-1, 4, features[0].shape[0]):
        unit = torch.nn.functional.normalize(group, dim=1)
        matrix = unit @ unit.T
        cosines += [matrix[i, j].item() for i in range(4) for j in range(i)]
        shares = torch.linalg.svdvals(unit) ** 2 / 4
        ranks.append(torch.exp(-(shares * shares.log()).nan_to_num().sum()).item())
    return {
        "cos_mean": sum(cosines) / len(cosines),
        "negative_pairs": sum(c < 0 for c in cosines) / len(cosines),
        "effective_rank": sum(ranks) / len(ranks),
        "accuracy": rewards.mean().item(),
    }


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_numbers_are_those_of_each_response_alone(
    make: Callable[..., Any], dropout_dir: str, kind: str
) -> None:
    trainer = make(kind, temperature=0.7, model=dropout_dir)  # measured without dropout
    generate, reward, wanted, kept = trainer._generate, trainer._calculate_rewards, [], []
    trainer._generate = lambda prompts: (kept.append(out := generate(prompts)), out)[1]

    def noted(*inputs: Any) -> torch.Tensor:
        rewards = reward(*inputs)
        wanted.append(expected(trainer, kept[-1], rewards))
        return rewards

    trainer._calculate_rewards = noted
    trainer.add_callback(GeometryCallback(trainer, every=1))
    trainer.train()
    assert len(wanted) == 2
    for key in wanted[0]:
        assert logged(trainer, f"g2rl/{key}") == pytest.approx([w[key] for w in wanted], rel=1e-4, abs=1e-5)
    assert all(0 <= value <= 1 for value in logged(trainer, "g2rl/exploration_score_mean"))
    assert all(value > 0 for value in logged(trainer, "g2rl/seconds"))
    assert not logged(trainer, "g2rl/semantic_cosine")


def test_it_agrees_with_the_g2rl_trainer(make: Callable[..., Any], tmp_path: Path, model_dir: str) -> None:
    ours = make("grpo", max_steps=1)
    ours.add_callback(GeometryCallback(ours))
    ours.train()
    args = config(tmp_path / "g2rl", G2RLConfig, max_steps=1, g2rl_shaping="none")
    theirs = G2RLTrainer(model_dir, parity, args, prompts())
    theirs.train()
    for key in ("cos_mean", "negative_pairs", "accuracy", "exploration_score_mean"):
        assert logged(ours, f"g2rl/{key}") == pytest.approx(logged(theirs, f"g2rl/{key}"), abs=1e-5), key
    with pytest.raises(TypeError, match=r"^trainer: G2RLTrainer logs"):
        GeometryCallback(theirs)


def test_answers_texts_and_several_rewards(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Letters:  # a sentence encoder of one's own: the first letter decides
        def __init__(self, *_: Any):
            pass

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.nn.functional.one_hot(
                torch.tensor([ord(t[:1] or "?") % 8 for t in texts]), 8
            ).float()

    monkeypatch.setattr("g2rl_kernels.integrations.geometry_callback.SentenceEncoder", Letters)
    trainer = make("grpo", reward_funcs=[parity, length], max_steps=1)
    callback = GeometryCallback(trainer, answer=lambda text: text[:1] or None, encoder="letters")
    seen: list[list[str]] = []
    describe = callback._describe
    callback._describe = lambda *args: (seen.append(args[-1]), describe(*args))[1]
    trainer.add_callback(callback)
    trainer.train()
    groups = [seen[0][:4], seen[0][4:]]
    counts = [len({text[:1] for text in group} - {""}) for group in groups]
    assert logged(trainer, "g2rl/distinct_answers") == [pytest.approx(sum(counts) / 2)]
    first = [[ord(t[:1] or "?") % 8 for t in group] for group in groups]
    alike = [group[i] == group[j] for group in first for i in range(4) for j in range(i)]
    assert logged(trainer, "g2rl/semantic_cosine") == [pytest.approx(sum(alike) / 12)]
    assert not logged(trainer, "g2rl/accuracy")  # which of the two rewards says it was not told

    named = make("grpo", reward_funcs=[parity, length], max_steps=1)
    named.add_callback(GeometryCallback(named, correctness_reward="parity", answer=str))
    named.train()
    assert 0 <= logged(named, "g2rl/accuracy")[0] <= 1
    assert logged(named, "g2rl/distinct_right")[0] <= logged(named, "g2rl/distinct_answers")[0]
    with pytest.raises(ValueError, match="correctness_reward: got 'other'"):
        GeometryCallback(make("grpo"), correctness_reward="other")


def test_every_is_in_steps(make: Callable[..., Any]) -> None:
    trainer = make("grpo", max_steps=5)
    trainer.add_callback(GeometryCallback(trainer, every=2))
    trainer.train()
    steps = [e["step"] for e in trainer.state.log_history if "g2rl/cos_mean" in e]
    assert steps == [1, 3, 5]  # generated at steps 0, 2 and 4, and logged when these are done

    trainer = make("sft", max_steps=5)
    trainer.add_callback(GeometryCallback(trainer, 2, prompts=ASKED, num_generations=3, max_new_tokens=4))
    trainer.train()
    steps = [e["step"] for e in trainer.state.log_history if "g2rl/cos_mean" in e]
    assert steps == [0, 2, 4]


def test_sampled_responses_are_measured(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from g2rl_kernels.integrations import geometry_callback as module

    calls: list[Any] = []
    measure = module.measure
    monkeypatch.setattr(
        module, "measure", lambda *args, **k: (calls.append((args, out := measure(*args, **k))), out)[1]
    )
    trainer = make("sft", max_steps=1)
    scored: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        scored.append((prompts, completions))
        return [float(len(text) % 2) for text in completions]

    options = {"num_generations": 4, "max_new_tokens": 5, "reward_func": reward, "batch_size": 5}
    trainer.add_callback(GeometryCallback(trainer, 1, prompts=ASKED, **options))
    trainer.train()
    (_, asked, given), done = calls[0]
    assert len(done.features) == 12
    tokenizer = make_tokenizer()
    assert asked == [tokenizer(prompt)["input_ids"] for prompt in ASKED for _ in range(4)]
    assert max(map(len, given)) == 5
    signs = torch.tensor([2.0 * (len(text) % 2) - 1 for text in scored[0][1]])
    geometry = g2.group_geometry(
        done.features, signs, group_size=4, shaping="none", eps=1e-30
    )  # cosines as they are
    upper = torch.ones(4, 4).triu(1).bool()
    assert logged(trainer, "g2rl/cos_mean")[0] == pytest.approx(geometry.similarity[:, upper].mean().item())
    assert logged(trainer, "g2rl/exploration_score_mean")[0] == pytest.approx(
        geometry.exploration_score.mean().item()
    )
    assert logged(trainer, "g2rl/accuracy")[0] == pytest.approx((signs > 0).float().mean().item())
    assert logged(trainer, "g2rl/cos_mean")[0] != logged(trainer, "g2rl/cos_mean")[1]  # trained between them


def test_messages_go_through_the_chat_template(make: Callable[..., Any]) -> None:
    trainer = make("sft", max_steps=1)
    trainer.processing_class.chat_template = CHAT
    asked = [[{"role": "user", "content": "1+1"}]]
    seen: list[Any] = []
    callback = GeometryCallback(
        trainer,
        prompts=asked,
        num_generations=2,
        max_new_tokens=3,
        reward_func=lambda prompts, completions: seen.append(completions) or [1.0, None],
    )
    assert callback.prompt_ids == [make_tokenizer()("u:1+1=")["input_ids"]]
    trainer.add_callback(callback)
    trainer.train()
    assert seen[0][0][0]["role"] == "assistant"


@pytest.mark.parametrize(
    ("kind", "keywords", "message"),
    [
        ("grpo", {"prompts": ["1"]}, "prompts, reward_func: GRPOTrainer samples and scores itself"),
        ("sft", {}, "prompts: SFTTrainer samples nothing itself"),
        ("sft", {"prompts": ["1"], "every": 0}, "every: got 0"),
    ],
)
def test_refuses(make: Callable[..., Any], kind: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GeometryCallback(make(kind), **keywords)
