"""AsyncG2RLTrainer: TRL's own rollout loop with a stand-in for vLLM's server, and the trainer around it."""

from __future__ import annotations

import asyncio
import pickle
import queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
import tiny_trl
from accelerate import PartialState
from tiny_trl import parity, prompts
from trl.experimental.async_grpo import (
    AsyncGRPOConfig,
    AsyncGRPOTrainer,
    async_grpo_trainer,
    async_rollout_worker,
)

from g2rl_kernels.integrations import trl_async
from g2rl_kernels.integrations.trl_async import (
    AsyncG2RLConfig,
    AsyncG2RLTrainer,
    AsyncSettings,
    G2RLRolloutLoop,
    Scoring,
    group_advantages,
)

V, D, GROUP = 30, 8, 4
WEIGHT = torch.randn(V, D, generator=torch.Generator().manual_seed(0))


class Server:
    """Answers /v1/completions as vLLM 0.32 does: three random tokens, the `logprobs` likeliest by id."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.payloads: list[dict[str, Any]] = []
        self.replies: list[dict[str, Any]] = []
        self.p: list[torch.Tensor] = []  # of each reply's tokens [3, V]

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        assert path == "/v1/completions"
        log_p = (3 * torch.randn(3, V, generator=self.generator)).log_softmax(1)
        tokens = torch.multinomial(log_p.exp(), 1, generator=self.generator)[:, 0]
        self.payloads.append(payload)
        await asyncio.sleep(float(torch.rand((), generator=self.generator)) / 50)  # rollouts overlap
        tops = [
            {
                f"token_id:{i}": float(row[i])
                for i in [int(y), *row.topk(payload["logprobs"]).indices.tolist()]
            }
            for row, y in zip(log_p, tokens)
        ]
        own = [top[f"token_id:{int(y)}"] for top, y in zip(tops, tokens)]
        choice = {
            "token_ids": tokens.tolist(),
            "logprobs": {"token_logprobs": own, "top_logprobs": tops},
        }
        self.replies.append(choice)
        self.p.append(log_p.exp())
        return {"choices": [choice]}

    def feature(self, tokens: list[int]) -> torch.Tensor:
        """The exact feature [d] of a response."""
        at = [reply["token_ids"] for reply in self.replies].index(tokens)
        return (WEIGHT[tokens] - self.p[at] @ WEIGHT).mean(0)


def reward(completions: list[Any], **_: Any) -> list[float | None]:
    """By the text: 1 for about half of the completions, None for some."""
    values = [sum(map(ord, one[-1]["content"])) for one in completions]
    return [None if value % 11 == 0 else float(value % 2) for value in values]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    PartialState()  # as TRL makes it in the worker's process; its log needs it
    server = Server()

    async def post(_loop: Any, path: str, payload: dict[str, Any], _timeout: float) -> Any:
        return await server.post(path, payload)

    monkeypatch.setattr(async_rollout_worker._AsyncRolloutLoop, "_post", post)
    monkeypatch.setattr(async_rollout_worker, "_RETRYABLE_HTTP_ERRORS", (ConnectionError,), raising=False)
    monkeypatch.setattr(
        async_rollout_worker,
        "parse_response",
        lambda _tokenizer, ids, **_: {"role": "assistant", "content": " ".join(map(str, ids))},
    )
    return server


def make_loop(kind: type, **more: Any) -> Any:
    class Tokenizer:
        response_template, pad_token_id = "a template", 0

        def apply_chat_template(self, *_: Any, **__: Any) -> list[int]:
            return [1, 2]

    return kind(
        model_name="m",
        dataset=[{"prompt": [{"role": "user", "content": "?"}]}],
        reward_funcs=[reward],
        processing_class=Tokenizer(),
        eos_token_ids=[],
        rollout_buffer=queue.Queue(),
        model_version_value=SimpleNamespace(value=0),
        heartbeat_value=SimpleNamespace(value=0.0),
        failed_event=None,
        exception_info_queue=None,
        metrics_queue=queue.Queue(),
        num_generations=GROUP,
        max_inflight_tasks=2 * GROUP,
        **more,
    )


def samples_of(loop: Any, groups: int) -> list[Any]:
    """What TRL's loop pushes, of so many groups."""

    async def run() -> None:
        stop = asyncio.Event()
        tasks = [
            asyncio.ensure_future(one(stop_event=stop)) for one in (loop._generate_loop, loop._score_loop)
        ]
        while loop._total_groups_scored < groups and not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*tasks)

    asyncio.set_event_loop(loop._loop)
    loop._loop.run_until_complete(run())
    return list(loop.rollout_buffer.queue)[: groups * GROUP]


def scoring(top_k: int = V, correctness: str | None = None, **settings: Any) -> Scoring:
    return Scoring(AsyncSettings(**settings), top_k, correctness, WEIGHT, 1.0)


def test_advantages_are_those_of_shaped_rewards(server):
    """Of exact features, as the server reports the whole vocabulary; rollouts overlap in time."""
    samples = samples_of(make_loop(G2RLRolloutLoop, g2rl=scoring(lam=0.8, shaping="equation")), 6)
    assert all(p["logprobs"] == V and p["return_tokens_as_token_ids"] for p in server.payloads)
    changed = 0
    for at in range(0, len(samples), GROUP):
        group = samples[at : at + GROUP]
        assert len({sample.group_id for sample in group}) == 1
        features = torch.stack([server.feature(sample.input_ids[2:].tolist()) for sample in group])
        scores = torch.tensor([sample.metrics["rewards/reward"] for sample in group])
        shaped = AsyncSettings(lam=0.8, shaping="equation").shape(features, scores, group_size=GROUP)
        expected = group_advantages(shaped.scores.double().numpy())
        np.testing.assert_allclose([sample.advantage for sample in group], expected, atol=1e-4)
        plain = group_advantages(scores.double().numpy())
        changed += not np.allclose(plain, expected, atol=0.01)
    assert changed >= 3


def test_without_strength_they_are_trls(server):
    """To the bit. The rows that it trains on are its own either way."""
    ours = samples_of(make_loop(G2RLRolloutLoop, g2rl=scoring(top_k=3, lam=0.0)), 5)
    server.__init__()
    theirs = samples_of(make_loop(async_rollout_worker._AsyncRolloutLoop), 5)
    assert server.payloads[0]["logprobs"] == 0
    scored = [one for one in ours if not np.isnan(one.metrics["reward"])]
    assert 0 < len(scored) < len(ours)  # None is among the rewards
    by_group = [[one for one in ours if one.group_id == group] for group in {s.group_id for s in ours}]
    for group in by_group:
        rewards = np.array([one.metrics["reward"] for one in group])
        assert [one.advantage for one in group] == group_advantages(rewards).tolist()
    for one in theirs:
        rewards = [other.metrics["reward"] for other in theirs if other.group_id == one.group_id]
        index = [other is one for other in theirs if other.group_id == one.group_id].index(True)
        assert one.advantage == group_advantages(np.array(rewards))[index]


def test_metrics_reach_the_trainers_sink(server):
    loop = make_loop(G2RLRolloutLoop, g2rl=scoring(top_k=3))
    samples_of(loop, 2)
    pushed = [item for item in loop._metrics_queue.queue if "g2rl/missing_mass" in item]
    assert len(pushed) >= 2
    assert 0.01 < pushed[0]["g2rl/missing_mass"] < 0.6
    assert "g2rl/accuracy" in pushed[0]
    scored = {one.input_ids[2:].tobytes() for one in loop.rollout_buffer.queue}
    kept = {np.array(choice["token_ids"]).tobytes() for one in loop.choices.values() for choice in one}
    assert not scored & kept  # nothing stays of groups that are scored


def test_turns_of_a_rollout_are_one_response(server):
    """With tools a rollout makes several requests: its feature is of all their tokens."""
    loop = make_loop(G2RLRolloutLoop, g2rl=scoring(shaping="none"))

    async def ask(times: int) -> list[dict[str, Any]]:
        return [(await server.post("/v1/completions", {"logprobs": V}))["choices"][0] for _ in range(times)]

    turns = asyncio.run(ask(3))
    seen = {}
    loop.g2rl.settings.shape = lambda features, scores, *_, **rows: (
        seen.update(features=features, scores=scores, **rows)
        or SimpleNamespace(bonus=torch.zeros(2), metrics={})
    )
    loop._bonus([turns[:2], turns[2:]], [{"rewards/reward": 1.0}, {"rewards/reward": 0.0}])
    one, two, three = (server.feature(turn["token_ids"]) for turn in turns)
    torch.testing.assert_close(seen["features"], torch.stack([(one + two) / 2, three]), rtol=0, atol=1e-4)
    assert seen["scores"].tolist() == [1.0, 0.0]
    assert seen["group_size"] == 2


def test_a_rollout_without_tokens_leaves_its_group_as_trl_has_it(server):
    loop = make_loop(G2RLRolloutLoop, g2rl=scoring())
    loop.choices["one"] = []
    row = async_rollout_worker.TrainingSequence([1, 2], [0, 1], [0.0, -1.0], "one")
    group = async_rollout_worker.RolloutGroup(
        prompts=["?", "?"],
        reward_kwargs={},
        completions=[[{"content": "a"}], [{"content": "b"}]],  # rewards of 1 and 0
        completions_ids=[[2], []],
        completions_sequences=[[row], []],
        tool_call_counts=[0, 0],
        tool_failure_counts=[0, 0],
        model_version=0,
        group_id=0,
        env_rewards=[None, None],
        rollout_rewards=[None, None],
    )
    (sample,) = asyncio.run(loop._score_group(group))
    assert sample.advantage == pytest.approx(1.0)
    assert not loop.choices


def test_group_advantages_without_rewards():
    assert group_advantages(np.full(3, np.nan)).tolist() == [0, 0, 0]
    assert group_advantages(np.array([1.0, np.nan, 1.0])).tolist() == [0, 0, 0]


# --- the trainer --------------------------------------------------------------------------------------------


@pytest.fixture
def make_async(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, model_dir: str) -> Any:
    """The trainer around TRL's worker, which is not started; vLLM is not there."""
    for name in ("is_vllm_available", "is_aiohttp_available"):
        monkeypatch.setattr(async_rollout_worker, name, lambda: True)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)  # asks a GPU
    transfer = SimpleNamespace(pause=lambda: None, resume=lambda: None, sent=[])
    transfer.send_weights = lambda stream: transfer.sent.extend((name, t.clone()) for name, t in stream)

    def make(kind: type = AsyncG2RLTrainer, config: type = AsyncG2RLConfig, **settings: Any) -> Any:
        more = {name: settings.pop(name) for name in ("rollout_worker", "model") if name in settings}
        args = tiny_trl.config(tmp_path / "out", config, **{"token_budget": -1, **settings})
        return kind(
            **{"model": model_dir, **more},
            reward_funcs=parity,
            train_dataset=prompts(),
            args=args,
            weight_transfer=transfer,
        )

    return make


def test_the_worker_gets_the_heads_weight_at_every_sync(make_async):
    trainer = make_async(g2rl_lam=0.3, g2rl_top_k=5)
    worker = trainer.rollout_worker
    assert worker._loop_cls is G2RLRolloutLoop
    given = worker._loop_kwargs["g2rl"]
    assert (given.settings.lam, given.top_k) == (0.3, 5)
    assert given.weight.is_shared()
    weight = trainer.model.lm_head.weight
    assert torch.equal(given.weight, weight)
    with torch.no_grad():
        weight += 1
    assert not torch.equal(given.weight, weight)
    trainer._sync_weight()
    assert torch.equal(given.weight, weight)
    assert trainer.weight_transfer.sent[0][0] == trainer.head_name  # tied: the embedding's name
    assert len(trainer.weight_transfer.sent) == len([*trainer.model.parameters()])
    pickle.dumps(given)  # as TRL tries before it starts the worker


def _read(scoring: Scoring, seen: Any, told: Any) -> None:
    for _ in range(2):
        told.get()
        seen.put(float(scoring.weight.double().sum()))


def test_another_process_sees_the_weight_change(make_async):
    trainer = make_async()
    context = torch.multiprocessing.get_context("spawn")
    seen, told = context.Queue(), context.Queue()
    given = trainer.rollout_worker._loop_kwargs["g2rl"]
    process = context.Process(target=_read, args=(given, seen, told), daemon=True)
    process.start()
    told.put(0)
    assert seen.get(timeout=120) == float(given.weight.double().sum())
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(2).add_(1)
    trainer._sync_weight()
    told.put(0)
    assert seen.get(timeout=120) == float(trainer.model.lm_head.weight.double().sum())
    process.join(timeout=60)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"g2rl_lam": -1.0}, ValueError, "g2rl_lam"),
        ({"g2rl_top_k": 0}, ValueError, "g2rl_top_k"),
        ({"g2rl_rewards": "graded!"}, ValueError, "g2rl_rewards"),
        ({"config": AsyncGRPOConfig}, TypeError, "args: got AsyncGRPOConfig"),
        ({"g2rl_correctness_reward": "other"}, ValueError, "g2rl_correctness_reward"),
        (
            {"rollout_worker": SimpleNamespace(rollout_buffer=queue.Queue())},
            ValueError,
            "rollout_worker: got one",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_named(make_async, settings, error, message):
    with pytest.raises(error, match=message):
        make_async(**settings)


def test_a_softcap_is_refused(make_async, monkeypatch):
    capped = SimpleNamespace(logit_softcap=30.0)
    monkeypatch.setattr(trl_async, "find_head", lambda *_, **__: capped)
    with pytest.raises(ValueError, match=r"^model: its logits have a softcap of 30.0"):
        make_async()


def test_trls_own_trainer_is_as_it_was(make_async):
    trainer = make_async(AsyncGRPOTrainer, AsyncGRPOConfig)
    assert trainer.rollout_worker._loop_cls is async_rollout_worker._AsyncRolloutLoop
