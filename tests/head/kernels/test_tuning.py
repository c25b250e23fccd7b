"""Which tiles are chosen, how measured ones are stored, and `g2rl tune` with made-up times."""

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2rl_kernels.cli import main as cli
from g2rl_kernels.cli import tune as command
from g2rl_kernels.head.triton import tune, tuning
from g2rl_kernels.head.triton.tuning import CANDIDATES, FORMS, KINDS, Config

CUDA = torch.device("cuda", 0)
V, D = 151936, 2048
OTHER = Config(64, 64, 64, 4, 3)


@pytest.fixture(autouse=True)
def _own_file(monkeypatch, tmp_path):
    monkeypatch.setenv("G2RL_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def hopper(monkeypatch):
    """A GPU, as far as tuning asks it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    return "NVIDIA H100"


def choose(kind="stats", dtype=torch.bfloat16, V=V, D=D, form=None):
    return tuning.choose(kind, CUDA, dtype, V, D, form)


# --- choice -------------------------------------------------------------------------------------------------


def test_every_architecture_has_tiles_for_every_form():
    families = {(family, form) for family in (8, 9, 10, "hip") for form in FORMS}
    assert set(CANDIDATES) == families - {("hip", "tf32x3")}  # which AMD does not have
    for configs in CANDIDATES.values():
        assert len(set(configs)) == len(configs) >= 1


@pytest.mark.parametrize(
    ("capability", "family"),
    # 12, and what follows, may have neither the instructions nor the shared memory of data-centre GPUs
    [(7, 8), (8, 8), (9, 9), (10, 10), (11, 10), (12, 8), (13, 8)],
)
def test_tiles_by_compute_capability(capability, family, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    for form in FORMS:
        shipped = CANDIDATES[family, form]
        assert tuning.candidates(capability, form) == tuning.candidates_on(CUDA, form) == shipped


@pytest.fixture
def mi300(monkeypatch):
    """torch's GPU on ROCm: it is called "cuda", and has a compute capability that is no Hopper's."""
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))


def test_amds_tiles_and_precision(mi300):
    assert choose() == CANDIDATES["hip", "plain"][0]
    single, before = torch.empty(8, 64), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert tuning.precision() == tuning.products_on_tensor_cores() == "ieee"
        assert choose(dtype=torch.float32) == CANDIDATES["hip", "ieee"][0]
        assert tuning.form(single, single, False) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_descriptors_where_tma_is(monkeypatch):
    tile = pytest.importorskip("g2rl_kernels.head.triton.tile")
    monkeypatch.setattr(tile, "INTERPRETED", False)

    def described(capability):
        tile._has_tma.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        return tile.descriptor(torch.empty(64, 64), (16, 16)) is not None

    try:
        assert [described(capability) for capability in (8, 9, 10, 12)] == [False, True, True, True]
        monkeypatch.setattr(torch.version, "hip", "7.2")
        assert not described(9)
    finally:
        tile._has_tma.cache_clear()


def test_without_a_file_the_first_candidate_is_chosen_and_nothing_is_written(hopper):
    for form in FORMS:
        for kind in KINDS:
            assert choose(kind, form=form) == CANDIDATES[9, form][0]
    assert not tuning.cache_file().exists()


def test_without_a_form_it_is_that_of_a_plain_head(hopper):
    assert choose() == CANDIDATES[9, "plain"][0]
    before = torch.get_float32_matmul_precision()
    try:
        for products, form in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32x3")):
            torch.set_float32_matmul_precision(products)
            assert choose(dtype=torch.float32) == CANDIDATES[9, form][0]
    finally:
        torch.set_float32_matmul_precision(before)


def test_torchs_newer_setting_of_products_counts_too():
    """Beside it torch.get_float32_matmul_precision raises. transformers sets it for tf32=True."""
    script = (
        "import torch; from g2rl_kernels.head.triton import tuning; found = [tuning.precision()]\n"
        "for value in ('tf32', 'ieee'):\n"
        "    torch.backends.cuda.matmul.fp32_precision = value; found.append(tuning.precision())\n"
        "print(*found)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "tf32x3", "ieee"]


def test_form_of_a_call():
    def matrix(columns=64, dtype=torch.bfloat16):
        return torch.empty(8, columns, dtype=dtype)

    aligned = matrix()
    assert tuning.form(aligned, aligned, False) == "plain"
    assert tuning.form(aligned, aligned, True) == "softcap"
    single = matrix(dtype=torch.float32)
    assert tuning.form(single, single, True) == "ieee"
    for odd in (
        matrix(62), matrix(65)[:, 1:], matrix(8).T, matrix(72)[:, 1:65], matrix()[:1].expand(8, 64),
    ):  # fmt: skip
        assert tuning.form(odd, aligned, True) == tuning.form(aligned, odd, False) == "unaligned"
    assert tuning.form(matrix(72)[:, 8:], aligned, False) == "plain"  # a view whose rows are aligned
    assert tuning.form(matrix()[:1], aligned, False) == "plain"  # one row


def test_off_the_gpu_it_is_the_interpreters_tile():
    assert tuning.choose("stats", torch.device("cpu"), torch.bfloat16, V, D) == tuning.INTERPRETER


# --- the file -----------------------------------------------------------------------------------------------


def test_what_is_stored_is_chosen_for_exactly_that(hopper):
    key = tuning.key(hopper, "stats", torch.bfloat16, V, D, "plain")
    path = tuning.store({key: OTHER})
    assert choose() == OTHER
    shipped = CANDIDATES[9, "plain"][0]
    assert choose("residual") == choose(V=V - 1) == choose(D=D + 8) == choose(dtype=torch.float16) == shipped
    assert choose(form="softcap") == CANDIDATES[9, "softcap"][0]
    assert json.loads(path.read_text())[key]["BM"] == 64


def test_another_gpu_takes_nothing_from_it(hopper, monkeypatch):
    tuning.store({tuning.key(hopper, "stats", torch.bfloat16, V, D, "plain"): OTHER})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert choose() == CANDIDATES[9, "plain"][0]


def test_storing_adds_and_replaces(hopper):
    keys = {kind: tuning.key(hopper, kind, torch.bfloat16, V, D, "plain") for kind in KINDS}
    tuning.store({keys["stats"]: OTHER, keys["listed"]: OTHER})
    assert choose("listed") == OTHER  # and is remembered, until the file changes
    newer = replace(OTHER, num_stages=5)
    path = tuning.store({keys["listed"]: newer})
    assert choose("stats") == OTHER
    assert choose("listed") == newer
    assert list(path.parent.iterdir()) == [path], "no partial file stays behind"


def test_g2rl_cache_names_the_folder(monkeypatch, tmp_path):
    assert tuning.cache_file() == tmp_path / "cache" / "tuned.json"
    monkeypatch.delenv("G2RL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file() == tmp_path / "xdg" / "g2rl-kernels" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_file() == Path.home() / ".cache" / "g2rl-kernels" / "tuned.json"


WHOLE = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3, "programs_per_sm": 1}


def test_processes_that_store_at_once_damage_nothing(hopper):
    code = (
        "import sys; from g2rl_kernels.head.triton import tuning\n"
        "for i in range(40): tuning.store({f'{sys.argv[1]} {i}': tuning.Config(64, 64, 64, 4, 3)})"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert tuning.tuned(tuning.cache_file())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"a": 1}', '{"a": {"BM": 64}}'] + [json.dumps({"a": WHOLE | bad}) for bad in (
        {"BM": "64"}, {"BM": 0}, {"BK": 64.0}, {"num_warps": None}, {"swizzle": 8},
    )],
)  # fmt: skip
def test_a_damaged_file_is_named_with_the_way_out(content, hopper, capsys):
    path = tuning.cache_file()
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tuned\.json is damaged .*g2rl tune --clear"):
        choose()
    assert cli.main(["tune", "--show"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert cli.main(["tune", "--vocab", "8", "--hidden", "8"]) == 2, "it fails before anything is timed"
    assert cli.main(["tune", "--clear"]) == 0
    assert choose() == CANDIDATES[9, "plain"][0]


# --- times --------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_the_median_counts():
    seen = []
    clock = {"a": iter([3.0, 1.0, 9.0]), "b": iter([2.0, 2.5, 0.1])}

    def seconds(call):
        name = call()
        seen.append(name)
        return next(clock[name])

    found = tune.medians({"a": lambda: "a", "b": lambda: "b"}, 3, seconds)
    assert "".join(seen) == "ababab"
    assert found == {"a": 3.0, "b": 2.0}


A, B, C, E = (replace(OTHER, num_stages=n) for n in (1, 2, 4, 5))


def constant(value):
    return lambda: (torch.tensor([1.0, value]),)


def fails():
    raise RuntimeError("out of resource\nshared memory")


def unsteady():
    return (torch.rand(2),)


def timed(calls, times):
    def seconds(call):
        return times[call]

    def product():
        pass

    return tune.time_kind(calls, product, 3, lambda call: 1.0 if call is product else seconds(call))


def test_only_what_is_right_and_repeatable_is_timed():
    close, far = constant(2.0 + 1e-5), constant(2.1)
    calls = {A: constant(2.0), B: close, C: far, E: unsteady, OTHER: fails}
    calls[replace(OTHER, BM=32)] = constant(float("nan"))
    rows, product = timed(calls, {calls[A]: 4.0, close: 3.0})  # a KeyError if any other were
    assert product == 1.0
    assert [row.seconds for row in rows[:2]] == [4.0, 3.0]
    assert [row.obstacle for row in rows[:2]] == ["", ""]
    assert rows[2].obstacle == "off by 5.0e-02"
    assert rows[3].obstacle == "other bits when run again"
    assert rows[4].obstacle == "fails: RuntimeError: shared memory"
    assert rows[5].obstacle  # equal NaN are not the same bits
    assert tune.winner(rows) == B


def test_a_shipped_choice_yields_only_to_what_is_clearly_faster():
    def won(*times):
        return tune.winner([tune.Timed(c, t, "") for c, t in zip((A, B, C), times)])

    assert won(1.0, 1.1, 1.2) == A
    assert won(1.0, 0.995, 1.2) == A, "less than 1 %"
    assert won(1.0, 0.98, 0.95) == C
    wrong = tune.Timed(A, 0.1, "other bits when run again")
    assert tune.winner([wrong, tune.Timed(B, 1.0, "")]) == B
    assert tune.winner([wrong]) is None


def test_one_word_is_off_where_everything_else_agrees():
    right = (torch.ones(3), torch.full((2, 2), 5.0))
    assert tune.obstacle(lambda: right, right) == ""
    assert tune.obstacle(lambda: (right[0], right[1] * 1.01), right) == "off by 1.0e-02"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_timed_is_the_op_and_gives_the_same_with_other_tiles(kind, monkeypatch):
    """On a GPU all candidates of a small head; elsewhere two small tiles, in Triton's interpreter."""
    pytest.importorskip("triton")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    size = tune.Size(90, 32, torch.float16 if device.type == "cuda" else torch.float32)
    if device.type == "cpu":
        pair = (Config(16, 32, 16, 4, 2), Config(32, 16, 32, 4, 2))
        monkeypatch.setattr(tuning, "candidates_on", lambda device, form: pair)
    bench = tune.Bench(size, 70, device)
    shipped, *others = tuning.candidates_on(device, size.form)
    wanted = bench.call(kind, shipped)
    assert all(tensor.isfinite().all() for tensor in wanted)
    assert wanted[0].abs().max() > 0
    for config in others:
        assert tune.obstacle(lambda config=config: bench.call(kind, config), wanted) == ""
    assert tuning.on_trial is None
    bench.product(kind)
    rows = min(70 // 2 if kind == "listed" else 70, len(bench.logits))
    torch.testing.assert_close(bench.logits[:rows], bench.hidden[:rows] @ bench.spec.weight.T)


def test_a_trial_is_chosen_whatever_is_asked_for_and_ends(hopper):
    with tuning.trial(OTHER):
        assert choose() == choose("listed", V=5) == OTHER
    with contextlib.suppress(KeyError), tuning.trial(OTHER):
        raise KeyError
    assert choose() == CANDIDATES[9, "plain"][0]


# --- the command --------------------------------------------------------------------------------------------


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
