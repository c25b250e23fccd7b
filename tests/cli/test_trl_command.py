"""`g2rl train` with `engine: trl`, and the recipes that need it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from tiny_trl import prompts, save_model

from g2rl_kernels.cli import train as cli
from g2rl_kernels.cli import train_trl as trl_command
from g2rl_kernels.cli.train_trl import parse
from g2rl_kernels.group.shaping import ALGORITHMS
from g2rl_kernels.integrations.rewards import last_number
from g2rl_kernels.trainer import TrainerConfig, load_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """recipe(keys) writes a YAML file and returns its path."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    prompts().to_json(tmp_path / "prompts.jsonl")

    def write(**keys: Any) -> str:
        values = {
            "engine": "trl",
            "model_name_or_path": model_dir,
            "datasets": [{"path": "json", "data_files": str(tmp_path / "prompts.jsonl")}],
            "reward_funcs": ["tiny_trl.parity"],
            "num_generations": 4,
            "max_completion_length": 4,
            "max_steps": 2,
            "learning_rate": "1e-3",  # as YAML reads 1e-3
            "output_dir": str(tmp_path / "out"),
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            **keys,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


def test_a_recipe_trains(
    recipe: Any, tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    arguments = ["--config", recipe(), "g2rl_lam=0.7", "--save_steps", "2", "per_device_train_batch_size=4"]
    assert cli.main(arguments) == 0
    log = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in log if "g2rl/cos_mean" in entry]) == 2
    before, after = (load_file(Path(path) / "model.safetensors") for path in (model_dir, tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_adapters_are_options_as_in_trl(recipe: Any, tmp_path: Path) -> None:
    assert (
        cli.main([recipe(), "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]) == 0
    )
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_dry_run_trains_nothing(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--dry-run", recipe()]) == 0
    assert "all checks passed" in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"g2rl_lamb": 1}, "unknown key 'g2rl_lamb': did you mean 'g2rl_lam'?"),
        ({"g2rl_lam": -1}, "g2rl_lam: got -1"),
        ({"g2rl_logits_memory": -1}, "g2rl_logits_memory: got -1, needs a number of bytes"),
        ({"model_name_or_path": None}, "model_name_or_path: none given"),
        (
            {"model_name_or_path": "./nowhere"},
            "model_name_or_path=./nowhere: cannot be loaded: give a hub name",
        ),
        ({"reward_funcs": ["tiny_trl.nothing"]}, "reward_funcs: cannot import tiny_trl.nothing: module"),
        ({"reward_funcs": ["no.such.one"]}, "reward_funcs: cannot import no.such.one: No module named 'no'"),
        (
            {"resume_from_checkpoint": "nowhere"},
            "resume_from_checkpoint=nowhere: no checkpoint is there; nor",
        ),
        (
            {"resume_from_checkpoint": True},
            "resume_from_checkpoint=True: no checkpoint is there; nor is there",
        ),
        ({"reward_funcs": ["nothing"]}, "Could not load reward function 'nothing'"),
        ({"datasets": None}, "Either `datasets` or `dataset_name` must be provided"),
        ({"per_device_train_batch_size": 80}, "train_dataset: 16 prompts, but a generation batch takes 20"),
        ({"engine": "other"}, "engine='other': choose trl, or remove it"),
    ],
)
def test_errors_are_one_line(
    recipe: Any, keys: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([recipe(**keys)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("g2rl train: error: ")
    assert message in error


def test_an_import_that_fails_while_the_model_loads_is_named(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Could not import module 'Qwen3ForCausalLM'.") from error

    monkeypatch.setattr(trl_command.G2RLTrainer, "__init__", fail)
    assert cli.main([recipe()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be loaded: an import failed (ModuleNotFoundError: No module named 'mamba_ssm')" in error
    assert error.endswith("pip install mamba_ssm")


@pytest.mark.parametrize("option", [["--learnin_rate", "1"], ["learnin_rate=1"], ["--learnin-rate=1"]])
def test_an_unknown_option_is_told_with_the_nearest(
    recipe: Any, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([recipe(), *option]) == 2
    assert "unknown key 'learnin_rate': did you mean 'learning_rate'?" in capsys.readouterr().err


def test_a_damaged_model_is_one_line(
    recipe: Any, tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12345678")
    assert cli.main([recipe(model_name_or_path=str(tmp_path / "model"))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"g2rl train: error: model_name_or_path={tmp_path / 'model'}: cannot be loaded")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_use_cpu_is_the_default(recipe: Any) -> None:
    assert cli.main(["--dry-run", recipe(use_cpu=None, bf16=True)]) == 0
    *_, config, _, _ = parse(recipe(use_cpu=None, bf16=True), [])
    assert config.use_cpu
    with pytest.raises(ValueError, match="use_cpu"):  # as it was asked for, in the recipe or by an option
        parse(recipe(use_cpu=False, bf16=True), [])
    with pytest.raises(ValueError, match="use_cpu"):
        parse(recipe(use_cpu=None, bf16=True), ["--use_cpu", "false"])


def test_resuming_by_name_and_from_the_newest(recipe: Any, tmp_path: Path) -> None:
    assert cli.main([recipe(save_steps=1)]) == 0
    newest = tmp_path / "out" / "checkpoint-2"
    for given in (str(newest), True):
        assert cli.main([recipe(max_steps=3, resume_from_checkpoint=given)]) == 0
        shutil.rmtree(tmp_path / "out" / "checkpoint-3")


def test_without_trl_the_error_says_what_to_install(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import g2rl_kernels.integrations as package

    for name in ("trl", "trl_seams"):
        monkeypatch.delattr(package, name)
        monkeypatch.delitem(sys.modules, f"g2rl_kernels.integrations.{name}")
    monkeypatch.setitem(sys.modules, "trl", None)
    assert cli.main([recipe()]) == 2
    assert "needs trl: pip install 'g2rl-kernels[trl]'" in capsys.readouterr().err


def test_errors_in_training_keep_their_traceback(recipe: Any) -> None:
    with pytest.raises(ValueError, match="returned 1 rewards"):
        cli.main([recipe(reward_funcs=["test_trl_command.too_few"])])


def too_few(**_: Any) -> list[float]:
    return [1.0]


def test_help_lists_both_kinds_of_keys(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([recipe(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in ("--g2rl_lam", "--g2rl_correctness_gap", "--num_generations", "--lora_r", "--reward_funcs"):
        assert key in text
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "engine: trl" in capsys.readouterr().out


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"], ["{}"]])
def test_config_names_a_recipe_of_the_thin_trainer_too(
    form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "thin.yaml"
    path.write_text("lr: -1.0\n")
    assert cli.main([word.format(path) for word in form]) == 2
    assert "lr=-1.0: must be at least 0" in capsys.readouterr().err


def test_data_files_lie_in_the_current_directory_or_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, names in ((here, "a"), (there, "ab")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    files = [
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
        ["b.*", "d/*"],
        {"train": "b.jsonl"},
        str(here / "a.jsonl"),
        None,
    ]
    datasets = [{"path": "json", "data_files": name} for name in files]
    (there / "recipe.yaml").write_text(yaml.safe_dump({"engine": "trl", "datasets": datasets}))
    beside = str(there / "b.jsonl")
    *_, data = parse(str(there / "recipe.yaml"), ["--use_cpu", "true", "--bf16", "false"])
    assert [one.data_files for one in data.datasets] == [
        "a.jsonl",
        beside,
        "c.jsonl",
        [str(there / "b.*"), "d/*"],
        {"train": beside},
        str(here / "a.jsonl"),
        None,
    ]


@pytest.fixture
def packaged(model_dir: str, monkeypatch: pytest.MonkeyPatch) -> list[TrainerConfig]:
    """Configurations with which pypi:... models are loaded; no package is needed."""
    seen: list[TrainerConfig] = []

    def load(config: TrainerConfig) -> Any:
        seen.append(config)
        return load_model(replace(config, model=model_dir))

    monkeypatch.setattr(trl_command, "load_model", load)
    return seen


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "bfloat16"),
    ],
)
def test_a_packaged_model_has_the_dtype_that_was_asked_for(
    recipe: Any, packaged: list[TrainerConfig], keys: dict[str, Any], dtype: str
) -> None:
    assert cli.main(["--dry-run", recipe(model_name_or_path="pypi:some", **keys)]) == 0
    assert [(config.model, config.dtype) for config in packaged] == [("pypi:some", dtype)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dtype": "auto"}, "no dtype='auto' for a model from a GGUF file: remove it"),
        ({"attn_implementation": "eager"}, "no attn_implementation='eager'"),
        ({"model_revision": "v2"}, "no revision='v2'"),
        ({"load_in_8bit": True}, "no quantization=True"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "no device_map='auto'"),
    ],
)
def test_what_a_packaged_model_cannot_have_is_refused(
    recipe: Any,
    packaged: list[TrainerConfig],
    keys: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--dry-run", recipe(model_name_or_path="pypi:some", **keys)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not packaged


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("path", sorted(RECIPES.glob("trl-*.yaml")), ids=lambda path: path.stem)
def test_trl_recipes_parse_with_every_system(path: Path, algorithm: str) -> None:
    own = TrainerConfig.from_dict({"algorithm": algorithm}).resolved()
    options = ["--g2rl_algorithm", algorithm] if algorithm != "g2rl" else []
    script, config, model, data = parse(str(path), ["--use_cpu", "true", *options])
    assert script.engine == "trl"
    assert config.g2rl_algorithm == algorithm
    assert config.entropy_coef == own.entropy_coef  # as our trainer has it
    assert (config.epsilon_high or config.epsilon) == own.ratio_clip_high
    assert config.g2rl_lam == 0.5
    assert config.loss_type == "grpo"
    assert model.model_name_or_path
    assert data.datasets[0].path == "json"
    assert path.stem != "trl-demo" or Path(data.datasets[0].data_files) == RECIPES / "trl-demo.jsonl"
    assert config.generation_batch_size % config.num_generations == 0


def test_the_demos_problems_are_right() -> None:
    rows = [json.loads(line) for line in (RECIPES / "trl-demo.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    for row in rows:
        a, sign, b = row["prompt"][-1]["content"].split()[-4:-1]
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    completions = [
        [{"role": "assistant", "content": f"The sum of 1 and 2 is {row['answer']}."}] for row in rows
    ]
    assert last_number(completions, [row["answer"] for row in rows]) == [1.0] * 200
    assert last_number(["12", "no number", "1 or 2"], ["1", "1", "2"]) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_its_configurations(name: str, kind: str) -> None:
    path = str(RECIPES / "accelerate" / f"{name}.yaml")
    assert load_config_from_file(path).distributed_type == kind
    args = launch_command_parser().parse_args(["--config_file", path, "--no_python", "g2rl"])
    args = _validate_launch_command(args)[0]
    assert (args.num_processes, args.mixed_precision) == (8, "bf16")
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(
        kind == other for other in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    if name == "fsdp2":
        assert args.fsdp_version == 2
    if name == "zero3":
        assert args.zero_stage == 3
