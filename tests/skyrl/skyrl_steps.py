"""SkyRL's trainer and policy worker in one process on a CPU: only Ray's dispatch and generation are replaced.

Real are the trainer, its configuration and batches, the worker, its FSDP2 strategy and model wrapper.
"""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from skyrl.backends.skyrl_train.distributed import fsdp_utils
from skyrl.backends.skyrl_train.distributed.dispatch import WorkerOutput
from skyrl.backends.skyrl_train.distributed.fsdp_strategy import FSDPStrategy
from skyrl.backends.skyrl_train.training_batch import pad_training_input_batch
from skyrl.train.trainer import RayPPOTrainer
from tiny import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec, Responses
from g2rl_kernels.integrations.skyrl import G2RLConfig, G2RLPolicyWorkerBase, G2RLTrainer


def start_process() -> None:
    if dist.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{port}")


def use_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL asks for CUDA by name: gives it the CPU."""
    init = fsdp_utils.init_device_mesh
    monkeypatch.setattr(fsdp_utils, "init_device_mesh", lambda _device, **mesh: init("cpu", **mesh))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(FSDPStrategy, "setup_distributed", _setup)


def _setup(self: Any) -> None:
    self.set_seed(self.seed)
    self.world_size = 1
    self.device_mesh = fsdp_utils.create_device_mesh(1, -1)


def configure(model: Path, *overrides: str) -> Any:
    return G2RLConfig.from_cli_overrides(
        [
            f"trainer.policy.model.path={model}",
            "trainer.flash_attn=false",
            "trainer.remove_microbatch_padding=false",
            "trainer.micro_forward_batch_size_per_gpu=2",
            "trainer.policy.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32}",
            "trainer.algorithm.use_kl_loss=false",
            "trainer.algorithm.temperature=1.0",
            "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=1",
            "trainer.micro_train_batch_size_per_gpu=2",
            "trainer.epochs=1",
            "trainer.eval_interval=0",
            "trainer.eval_before_train=false",
            "trainer.ckpt_interval=0",
            "trainer.hf_save_interval=0",
            "trainer.resume_mode=none",
            "trainer.print_example_interval=0",
            "trainer.placement.colocate_all=false",
            "trainer.placement.policy_num_gpus_per_node=1",
            "generator.n_samples_per_prompt=4",
            "generator.inference_engine.enable_ray_prometheus_stats=false",
            "data.dataloader.num_workers=0",
            *overrides,
        ]
    )


def make_worker(monkeypatch: pytest.MonkeyPatch, cfg: Any) -> Any:
    """The real policy worker around its real FSDP2 model."""
    use_cpu(monkeypatch)
    start_process()
    monkeypatch.setattr(G2RLPolicyWorkerBase, "_set_expandable_segments", lambda *_: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # the worker sets them; they are restored
    rank = {"world_size": 1, "rank": 0, "local_rank": 0, "sequence_parallel_size": 1}
    worker = G2RLPolicyWorkerBase(cfg=cfg.trainer, master_addr="127.0.0.1", master_port=1, **rank)
    worker.init_model(cfg.trainer.policy.model.path, num_training_steps=2)
    worker.mesh_rank = SimpleNamespace(dp_size=1)
    worker.device_mesh = SimpleNamespace(get_group=lambda _name: dist.group.WORLD)
    return worker


class Dispatch:
    """In place of SkyRL's `WorkerDispatch`, which needs Ray: one worker plays all `ranks` in turn."""

    def __init__(self, worker: Any, ranks: int) -> None:
        self.worker, self.ranks = worker, ranks
        self.seen: list[Any] = []  # what the worker's forward got

    def dp_size(self, _model: str) -> int:
        return self.ranks

    def get_lcm_dp_size(self) -> int:
        return self.ranks

    def stage_data(self, _model: str, data: Any, boundaries: list[tuple[int, int]]) -> list[Any]:
        parts = [data[start:end] for start, end in boundaries]
        parts = [pad_training_input_batch(part, -len(part["sequences"]) % self.ranks) for part in parts]
        return [part.chunk(len(part["sequences"]) // self.ranks) for part in parts]

    def forward(self, model: str, data: Any) -> WorkerOutput:
        return self.forward_from_staged(model, data.chunk(len(data["sequences"]) // self.ranks))

    def forward_from_staged(self, _model: str, chunks: list[Any]) -> WorkerOutput:
        self.seen += chunks
        outputs = [self.worker.forward(chunk) for chunk in chunks]
        return WorkerOutput(loss_fn_outputs=[row for output in outputs for row in output.loss_fn_outputs])

    def forward_backward_from_staged(self, _model: str, chunks: list[Any]) -> WorkerOutput:
        return [self.worker.forward_backward(chunk) for chunk in chunks][-1]

    def optim_step(self, _model: str) -> Any:
        return self.worker.optim_step()

    def empty_cache(self, _model: str | None = None) -> None:
        pass

    def init_weight_sync_state(self, _client: Any) -> None:
        pass

    async def save_weights_for_sampler(self) -> None:
        pass


class Prompts(list):
    """A data set of prompts as SkyRL's trainer takes it."""

    def __init__(self, count: int) -> None:
        super().__init__(
            {"prompt": [], "env_class": None, "env_extras": {}, "uid": f"p{i}"} for i in range(count)
        )

    def collate_fn(self, items: list[Any]) -> list[Any]:
        return items


class Generator:
    """Random tokens; those with token 7 are right. Row 1's mask has a gap, row 2 has no token that counts."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.outputs: list[dict[str, Any]] = []

    def draw(self, low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size or (1,), generator=self.random)

    async def generate(self, batch: Any) -> dict[str, Any]:
        count = len(batch["prompts"])
        prompts = [self.draw(3, 25, int(self.draw(2, 6))).tolist() for _ in range(count)]
        responses = [self.draw(3, 25, int(self.draw(6, 12))).tolist() for _ in range(count)]
        masks = [[1] * len(response) for response in responses]
        masks[1][1:4] = [0, 0, 0]
        masks[2] = [0] * len(masks[2])
        output = {
            "prompt_token_ids": prompts,
            "response_ids": responses,
            "rewards": [float(7 in response) for response in responses],
            "loss_masks": masks,
            "rollout_metrics": None,
            "rollout_logprobs": None,
            "trajectory_ids": batch["trajectory_ids"],
        }
        self.outputs.append({**output, "uids": [one.instance_id for one in batch["trajectory_ids"]]})
        return output


class Tracker:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, metrics: dict[str, Any], step: int, commit: bool = False) -> None:
        self.logged.append(metrics)

    def finish(self) -> None:
        pass


def make_trainer(
    monkeypatch: pytest.MonkeyPatch, model: Path, *overrides: str, ranks: int = 1, plain: bool = False
) -> Any:
    """A trainer of two steps with two prompts each, and four responses to a prompt. plain: SkyRL's own."""
    cfg = configure(model, *overrides)
    make = RayPPOTrainer if plain else G2RLTrainer
    options = {"train_dataset": Prompts(4), "inference_engine_client": None, "generator": Generator()}
    trainer = make(cfg=cfg, tracker=Tracker(), tokenizer=make_tokenizer(), **options)
    trainer.dispatch = Dispatch(make_worker(monkeypatch, cfg), ranks)
    return trainer


def expected_features(model: Path, output: dict[str, Any], temperature: float = 1.0) -> Tensor:
    """[S, d] float64, by the reference, each response on its own, with all weights in float64."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    features = []
    for prompt, response, mask in zip(
        output["prompt_token_ids"], output["response_ids"], output["loss_masks"]
    ):
        ids, kept = torch.tensor(prompt + response), torch.tensor(mask).bool()
        with torch.no_grad():
            hidden = plain.model(input_ids=ids[None]).last_hidden_state[0]
        rows = hidden[len(prompt) - 1 : -1][kept]
        head = HeadSpec(plain.lm_head.weight.detach(), temperature=temperature)
        responses = Responses(torch.tensor([0, len(rows)]))
        features.append(reference.head_features(rows, ids[len(prompt) :][kept], head, responses)[0][0])
    return torch.stack(features)
