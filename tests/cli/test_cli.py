"""The command `g2rl`: its output, the commands it calls, its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import g2rl_kernels
from g2rl_kernels import _C, versions
from g2rl_kernels.cli import info
from g2rl_kernels.cli import main as cli


def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "g2rl_kernels", *args]
    root = Path(g2rl_kernels.__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | environment)


def test_help_names_each_command_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for needed in ("info", "train", "eval", "bench", "examples:", "g2rl train recipes/demo.yaml", "G2RL"):
        assert needed in text


def test_info_help_says_how_to_lower_the_instruction_set(capsys):
    with pytest.raises(SystemExit):
        cli.main(["info", "--help"])
    text = capsys.readouterr().out
    assert "--json" in text
    for name in _C.isa_names:
        assert name in text


def test_train_help_comes_from_the_trainer(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    assert "usage: g2rl train" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"g2rl-kernels {g2rl_kernels.__version__}"


@pytest.mark.parametrize("argv", [[], ["dance"], ["info", "--yaml"]])
def test_wrong_usage_exits_with_2_and_says_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: g2rl" in capsys.readouterr().err


def test_info_json_is_what_this_process_sees(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == g2rl_kernels.__version__
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert found["isa"] == {"best": _C.best_isa(), "chosen": _C.chosen_isa(), "problem": None}
    assert found["build"] == _C.build_info()
    assert set(found["backends"]) == {"reference", "cpu", "triton", "cuda"}


def test_each_backend_either_can_or_says_why_not():
    for name, backend in info.collect()["backends"].items():
        assert backend["available"] == (backend["reason"] is None), name
        assert backend["does"]


def test_info_agrees_with_the_public_function_about_backends(monkeypatch):
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    arguments = (hidden, weight, torch.tensor([0, 1, 2]), torch.tensor([0, 3]))
    backends = info.collect()["backends"]
    for name in ("reference", "cpu"):
        assert backends[name]["available"]
        assert g2rl_kernels.head_features(*arguments, backend=name).features.shape == (1, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = tuple(t.to(device) for t in arguments)
    if backends["triton"]["available"]:
        assert g2rl_kernels.head_features(*arguments, backend="triton").features.shape == (1, 4)
    else:
        with pytest.raises((ValueError, ImportError), match="triton"):
            g2rl_kernels.head_features(*arguments, backend="triton")


def test_text_says_what_json_says():
    found = info.collect()
    text = info.render(found)
    assert found["version"] in text
    assert found["isa"]["chosen"] in text
    for name, backend in found["backends"].items():
        assert name in text
        assert backend["reason"] is None or backend["reason"] in text


def test_info_names_versions_that_are_untested(monkeypatch):
    monkeypatch.setitem(versions.TESTED, "torch", ("1.0", "1.1"))
    monkeypatch.setitem(versions.TESTED, "triton", ("0.1", "99.0"))
    found = info.collect()
    assert found["untested"].keys() == {"torch"}
    assert "is newer than g2rl-kernels is tested with (1.0 to 1.1)" in found["untested"]["torch"]
    assert found["untested"]["torch"] in info.render(found)
    monkeypatch.setitem(versions.TESTED, "torch", ("1.0", "99.0"))
    assert "untested" not in info.render(info.collect())


def test_info_with_a_lower_instruction_set():
    done = run("info", "--json", G2RL_CPU_ISA="plain")
    found = json.loads(done.stdout)
    assert found["isa"]["chosen"] == "plain"
    assert found["backends"]["cpu"]["available"]
    assert "plain" in found["backends"]["cpu"]["does"]


def test_info_survives_an_unknown_instruction_set_and_explains():
    done = run("info", G2RL_CPU_ISA="neon9")
    assert done.returncode == 0, done.stderr
    assert "neon9" in done.stdout
    assert "one of plain, avx2" in done.stdout


@pytest.mark.parametrize("command", ["train", "geometry", "bench"])
def test_an_unknown_instruction_set_is_told_before_work(command):
    done = run(command, "--help", G2RL_CPU_ISA="neon9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"g2rl {command}: error: G2RL_CPU_ISA=neon9: no such instruction set; one of"
    )
    assert done.stderr.count("\n") == 1


def test_train_hands_its_arguments_on(monkeypatch):
    from g2rl_kernels.cli import train as trainer_cli

    seen = []
    monkeypatch.setattr(trainer_cli, "main", lambda argv: seen.append(list(argv)) or 7)
    assert cli.main(["train", "x.yaml", "lr=1"]) == 7
    assert seen == [["x.yaml", "lr=1"]]


def test_eval_hands_its_arguments_on(monkeypatch):
    from g2rl_kernels.cli import eval as evaluation_cli

    seen = []
    monkeypatch.setattr(evaluation_cli, "main", lambda argv: seen.append(list(argv)) or 7)
    assert cli.main(["eval", "model", "--recipe", "recipes/demo.yaml"]) == 7
    (words,) = seen
    assert words[:2] == ["model", "--recipe"]
    assert "algorithm" in Path(words[2]).read_text()


def test_geometry_finds_the_shipped_recipes_from_anywhere(monkeypatch, tmp_path):
    from g2rl_kernels.cli import geometry as geometry_cli

    seen = []
    monkeypatch.setattr(geometry_cli, "main", lambda argv: seen.append(list(argv)) or 7)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["geometry", "model", "--recipe", "recipes/demo.yaml"]) == 7
    (words,) = seen
    assert words[:2] == ["model", "--recipe"]
    assert "algorithm" in Path(words[2]).read_text()


def test_train_finds_the_shipped_recipes_from_anywhere(monkeypatch, tmp_path):
    from g2rl_kernels.cli import train as trainer_cli

    seen = []
    monkeypatch.setattr(trainer_cli, "main", lambda argv: seen.append(list(argv)) or 0)
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "recipes/demo.yaml", "lr=1", "recipes/none.yaml"])
    (path, *rest) = seen[0]
    assert "algorithm" in Path(path).read_text()
    assert rest == ["lr=1", "recipes/none.yaml"]

    assert cli.main(["train", "--config=recipes/demo.yaml", "lr=recipes/demo.yaml"]) == 0
    option, _, name = seen[1][0].partition("=")
    assert option == "--config"
    assert Path(name) == Path(path)
    assert seen[1][1] == "lr=recipes/demo.yaml"

    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text("mine: 1")
    cli.main(["train", "recipes/demo.yaml", "--config=recipes/demo.yaml"])
    assert seen[2] == ["recipes/demo.yaml", "--config=recipes/demo.yaml"]


def test_train_without_the_file_is_one_line_and_2():
    done = run("train", "no-such-recipe.yaml")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no-such-recipe.yaml" in done.stderr


def test_bench_hands_its_arguments_on(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_benchmarks", lambda: SimpleNamespace(main=lambda argv: seen.append(argv)))
    assert cli.main(["bench", "head", "--quick"]) == 0
    assert seen == [["head", "--quick"]]


def test_bench_without_benchmarks_says_where_they_are(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_benchmarks", lambda: None)
    assert cli.main(["bench", "head"]) == 2
    assert "checkout" in capsys.readouterr().err
