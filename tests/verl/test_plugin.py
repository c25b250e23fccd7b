"""How verl loads the plugin: by its entry point, with a line in the log, harmless to verl where it fails."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys

import pytest

import g2rl_kernels
from g2rl_kernels.integrations import verl as plugin


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=400)


TRAINERS = "from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY; "


def test_the_entry_point_registers_the_trainer_and_extends_the_engine_and_says_so_once():
    done = python(
        "import sys, verl\n"
        "from g2rl_kernels.integrations.verl import EXTENDED\n"
        "print([name for name in EXTENDED if name in sys.modules])\n"  # not until verl needs them
        "from verl.trainer.ppo.v1 import get_trainer_cls\n"
        "from verl.workers.engine.fsdp import FSDPEngineWithLMHead as engine\n"
        "print(get_trainer_cls('g2rl_sync').__module__, engine.forward_step.__wrapped__.__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "g2rl_kernels.integrations.verl.trainer forward_step"]
    ours, theirs = g2rl_kernels.__version__, importlib.metadata.version("verl")
    said = f"g2rl-kernels {ours}: plugin loaded into verl {theirs}"
    assert done.stderr.count(said) == done.stderr.count("g2rl-kernels") == 1


def test_verl_can_leave_it_out():
    done = python(TRAINERS + "print(*TRAINER_REGISTRY)", VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 0, done.stderr
    assert "sync" in done.stdout.split()
    assert "g2rl_sync" not in done.stdout.split()
    assert "g2rl" not in done.stderr


def test_it_can_be_imported_late():
    """Where verl's own discovery is off, or a worker is asked whether it has the plugin."""
    code = TRAINERS + "import verl.workers.engine, g2rl_kernels.integrations.verl.engine as e\n"
    done = python(code + "print(e.is_patched(), *TRAINER_REGISTRY)", VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True"
    assert "g2rl_sync" in done.stdout.split()


def test_a_version_that_is_not_tested_is_loaded_with_a_warning():
    done = python(
        "import importlib.metadata as m; v = m.version\n"
        "m.version = lambda name: '0.12.3' if name == 'verl' else v(name)\n"
        "from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('g2rl_sync').__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["G2RLTrainerSync"]
    assert "plugin loaded into verl 0.12.3" in done.stderr
    assert "verl 0.12.3 is newer than g2rl-kernels is tested with (0.9)" in done.stderr


def test_a_verl_without_the_modules_is_refused_loudly_and_left_as_it_is(monkeypatch, caplog):
    monkeypatch.setitem(plugin.EXTENDED, "verl.trainer.ppo.v9.trainer_sync", lambda: None)
    finders = [*sys.meta_path]
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ImportError, match=r"lacks .*: verl\.trainer\.ppo\.v9"),
    ):
        plugin.install()
    assert sys.meta_path == finders
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    version = importlib.metadata.version("verl")
    assert f"its verl plugin was NOT loaded: verl {version} lacks what g2rl-ker" in record.getMessage()
    assert "(0.9: pip install 'verl==0.9.*')" in record.getMessage()


def test_missing_methods_are_named_and_verl_is_left_as_it_is():
    done = python(
        "from verl.trainer.ppo.v1.trainer_base import PPOTrainer, TRAINER_REGISTRY\n"
        "compute = PPOTrainer._compute_advantage\n"
        "PPOTrainer._compute_advantage = lambda self, rows, metrics: compute(self, rows, metrics)\n"
        "del PPOTrainer._setup\n"
        "import g2rl_kernels.integrations.verl; print(*TRAINER_REGISTRY)",
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert done.returncode == 0, done.stderr
    assert "sync" in done.stdout.split()
    assert "g2rl_sync" not in done.stdout.split()
    trainer = "PPOTrainerSync._setup, PPOTrainerSync._compute_advantage (its parameters batch)"
    assert f"lacks what g2rl-kernels builds on: {trainer}; install" in done.stderr
    assert "its verl plugin FAILED; g2rl_sync cannot be used" in done.stderr


def test_a_plugin_that_fails_is_loud_and_does_not_take_verl_with_it():
    done = python(
        "import sys; sys.modules['g2rl_kernels.group.shaping'] = None\n"  # which the trainer needs
        "import verl.trainer.ppo.v1\n" + TRAINERS + "print(*TRAINER_REGISTRY)"
    )
    assert done.returncode == 0, done.stderr
    assert "sync" in done.stdout.split()
    assert "g2rl_sync" not in done.stdout.split()
    assert "its verl plugin FAILED; g2rl_sync cannot be used" in done.stderr
    assert "g2rl_kernels.group.shaping" in done.stderr
