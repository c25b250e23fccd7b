"""Loading a model: an import that fails inside transformers is told apart from a model that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from g2rl_kernels.errors import ConfigError, import_failure
from g2rl_kernels.models.loading import load_model
from g2rl_kernels.trainer import TrainerConfig

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'"
)

FAULT = "operator torchvision::nms does not exist"


@pytest.fixture
def model(tmp_path: Path) -> str:
    from tiny import make_model, make_tokenizer

    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def misfit(tmp_path: Path) -> dict[str, str]:
    """An environment with a torchvision for another torch: its import raises, inside torch."""
    package, metadata = tmp_path / "site/torchvision", tmp_path / "site/torchvision-0.20.0.dist-info"
    for folder in (package, metadata):
        folder.mkdir(parents=True)
    registers = 'import torch\ntorch.library.register_fake("torchvision::nms")(lambda: None)\n'
    (package / "__init__.py").write_text(registers)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    path = [str(tmp_path / "site"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run(arguments: list[str], environment: dict[str, str], folder: Path) -> str:
    command = [sys.executable, "-m", "g2rl_kernels", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_an_import_that_fails_is_named_by_both_trainers(
    model: str, misfit: dict[str, str], tmp_path: Path
) -> None:
    said = (
        f"an import failed in torchvision (RuntimeError: {FAULT}): install a torchvision that fits this torch"
    )
    said += ", or, as models of text need none: pip uninstall torchvision torchaudio torchcodec"
    task = "{kind: reasoning_gym, name: chain_sum}"
    ours = run(["train", f"model={model}", f"tasks={task}", "--dry-run"], misfit, tmp_path)
    assert ours.startswith(f"g2rl train: error: model: cannot load '{model}': {said}")
    pytest.importorskip("trl")
    (tmp_path / "r.yaml").write_text(f"engine: trl\nmodel_name_or_path: {model}\n")
    assert said in run(["train", "r.yaml"], misfit, tmp_path)


def test_a_home_directory_is_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(model).parent))
    loaded, _ = load_model(TrainerConfig(model="~/model"))
    assert loaded.config.vocab_size > 0


def test_a_model_that_is_not_there_is_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no-one/no-model is not a repository")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ConfigError, match=r"give a hub name that can be reached from here.*not a repository"):
        load_model(TrainerConfig(model="no-one/no-model"))


def test_an_import_error_while_loading(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm.ops")
        except ModuleNotFoundError as error:
            raise ValueError("cannot build the model") from error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ConfigError, match=r"an import failed \(ModuleNotFoundError.*: pip install mamba_ssm"):
        load_model(TrainerConfig(model=model))


def test_an_import_that_was_given_up_on_purpose_is_not_blamed() -> None:
    def load() -> None:
        try:
            raise ImportError("an optional kernel is missing")
        except ImportError:
            raise OSError("no such file")  # noqa: B904 (as libraries do)

    with pytest.raises(OSError, match="no such file") as told:
        load()
    assert import_failure(told.value) is None
    assert import_failure(ValueError("x")) is None
