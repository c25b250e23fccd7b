"""`g2rl tune` with made-up times."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from g2rl_kernels.cli import main as cli
from g2rl_kernels.cli import tune as command
from g2rl_kernels.head.triton import tune, tuning
from g2rl_kernels.head.triton.tuning import CANDIDATES, KINDS, Config

CUDA = torch.device("cuda", 0)
V, D = 151936, 2048
OTHER = Config(64, 64, 64, 4, 3)


pytestmark = pytest.mark.usefixtures("own_file")


def choose(kind="stats", dtype=torch.bfloat16, V=V, D=D, form=None):
    return tuning.choose(kind, CUDA, dtype, V, D, form)


def made_up(best, obstacle=""):
    """A measure that finds candidate number `best` the fastest, and an obstacle to the last."""

    def measure(size, n_tokens, rounds, device):
        found = {}
        for kind in KINDS:
            configs = tuning.candidates_on(device, size.form)
            rows = [tune.Timed(c, 0.001 if n == best else 0.002, "") for n, c in enumerate(configs)]
            if obstacle:
                rows[-1] = tune.Timed(configs[-1], float("nan"), obstacle)
            found[kind] = (rows, 0.0008)
        measure.asked.append((size, n_tokens))
        return found

    measure.asked = []
    return measure


def refused(*_):
    raise AssertionError("nothing was to be timed")


def test_tune_stores_what_it_found_and_says_so(hopper, capsys):
    measure = made_up(1, obstacle="off by 1.0e+00")
    assert command.main(["--vocab", str(V), "--hidden", str(D), "--tokens", "4096"], measure) == 0
    assert measure.asked == [(tune.Size(V, D, torch.bfloat16), 4096)]
    out = capsys.readouterr().out
    assert "NVIDIA H100, bf16, V=151936, d=2048, plain, 4096 tokens" in out
    assert "off by 1.0e+00" in out
    rows = [line for line in out.splitlines() if "1.000  " in line]
    assert len(rows) == len(KINDS)
    for row in rows:
        assert row.endswith("1.250  stored")
    assert choose("seeded") == CANDIDATES[9, "plain"][1]

    assert command.main(["--show"], refused) == 0
    out = capsys.readouterr().out
    assert str(tuning.cache_file()) in out
    second = CANDIDATES[9, "plain"][1]
    tiles = f"{second.BM} x {second.BN} x {second.BK}, {second.num_warps} warps, {second.num_stages} stages"
    assert f"NVIDIA H100, listed, bfloat16, V=151936, d=2048, plain: {tiles}" in out

    assert command.main(["--vocab", str(V), "--hidden", str(D)], made_up(0)) == 0
    out = capsys.readouterr().out
    assert out.count("shipped, stored\n") == out.count(" stored before\n") == len(KINDS)
    assert choose("seeded") == CANDIDATES[9, "plain"][0]

    assert command.main(["--clear"], refused) == 0
    assert "removed" in capsys.readouterr().out
    assert command.main(["--show"], refused) == 0
    assert "nothing is stored" in capsys.readouterr().out


def test_options_may_be_written_as_key_value(hopper):
    measure = made_up(0)
    assert command.main([f"vocab={V}", f"hidden={D}", "tokens=4096"], measure) == 0
    assert measure.asked == [(tune.Size(V, D, torch.bfloat16), 4096)]


def test_an_interrupted_run_stores_nothing(hopper, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert command.main(["--vocab", "8", "--hidden", "8"], interrupt) == 130
    assert capsys.readouterr().err == "\ninterrupted: nothing was stored\n"
    assert not tuning.cache_file().exists()


@pytest.mark.parametrize(
    ("arguments", "size", "form"),
    [
        (["--dtype", "fp16"], tune.Size(V, D, torch.float16), "plain"),
        (["--dtype", "fp32"], tune.Size(V, D, torch.float32), "ieee"),
        (["--dtype", "tf32x3"], tune.Size(V, D, torch.float32), "tf32x3"),
        (["--softcap", "30"], tune.Size(V, D, torch.bfloat16, 30.0), "softcap"),
        (["--hidden", "2050"], tune.Size(V, 2050, torch.bfloat16), "unaligned"),
    ],
)
def test_each_form_is_stored_under_its_own_name(arguments, size, form, hopper):
    before = torch.backends.cuda.matmul.fp32_precision
    measure = made_up(0)
    assert command.main(["--vocab", str(V), "--hidden", str(D), *arguments], measure) == 0
    assert measure.asked == [(size, 16384)]
    stored = tuning.tuned(tuning.cache_file())
    assert set(stored) == {tuning.key(hopper, kind, size.dtype, V, size.D, form) for kind in KINDS}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_sizes_from_a_models_configuration(hopper, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Gemma2Config(vocab_size=320, hidden_size=48, num_hidden_layers=1).save_pretrained(tmp_path)
    measure = made_up(0)
    assert command.main(["--model", str(tmp_path)], measure) == 0
    assert measure.asked == [(tune.Size(320, 48, torch.bfloat16, 30.0), 16384)]


def test_a_dry_run_times_and_stores_nothing(hopper, capsys):
    assert command.main(["--vocab", "1000", "--hidden", "64", "--dry-run"], refused) == 0
    out = capsys.readouterr().out
    for config in CANDIDATES[9, "plain"]:
        assert out.count(f": {command.words(config)}\n") == len(KINDS)
    assert not tuning.cache_file().exists()


def test_a_dry_run_without_a_gpu_is_that_of_sm_90(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--vocab", "1000", "--hidden", "64", "--dry-run"], refused) == 0
    out = capsys.readouterr().out
    assert out.startswith("no GPU here; on sm_90, bf16, V=1000, d=64, plain")
    for config in CANDIDATES[9, "plain"]:
        assert out.count(f": {command.words(config)}\n") == len(KINDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which head?"),
        (["--vocab", "8"], "go together"),
        (["--model", "x", "--hidden", "8"], "which head?"),
        (["--model", "./no/such/folder"], "--model ./no/such/folder: "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, said, hopper, capsys):
    assert command.main(arguments, refused) == 2
    err = capsys.readouterr().err
    assert err.startswith("g2rl tune: error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--vocab", "0", "--hidden", "8"], ["--dtype", "int8"], ["--fast"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments, refused)
    assert stop.value.code == 2
    assert "usage: g2rl tune" in capsys.readouterr().err


def test_without_a_gpu_it_says_what_is_used_instead(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--vocab", "1000", "--hidden", "64"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in ("no GPU", "nothing is lost", "shipped tiles", command.words(CANDIDATES[9, "plain"][0])):
        assert part in err


def test_without_triton_it_says_so(hopper, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert cli.main(["tune", "--vocab", "1000", "--hidden", "64"]) == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for needed in ("usage: g2rl tune", "examples:", "--show", "--clear", "G2RL_CACHE", *KINDS):
        assert needed in text


def test_the_op_never_tunes():
    """Importing and choosing leaves the measuring module alone: nothing but `g2rl tune` loads it."""
    code = "import sys, g2rl_kernels.head.triton.tuning; print(any('.tune' == n[-5:] for n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    package = Path(tuning.__file__).parents[2]
    imports = re.compile(r"triton\.tune import|triton import .*\btune\b")
    users = [path for path in package.rglob("*.py") if imports.search(path.read_text())]
    assert [path.relative_to(package).as_posix() for path in users] == ["cli/tune.py"]
