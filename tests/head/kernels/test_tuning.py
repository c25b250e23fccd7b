"""Which tiles are chosen, and how measured ones are stored. `g2rl tune`: test_tune_command.py."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2rl_kernels.cli import main as cli
from g2rl_kernels.head.triton import tune, tuning
from g2rl_kernels.head.triton.tuning import CANDIDATES, FORMS, KINDS, Config

CUDA = torch.device("cuda", 0)
V, D = 151936, 2048
OTHER = Config(64, 64, 64, 4, 3)


pytestmark = pytest.mark.usefixtures("own_file")


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


def test_a_correction_takes_a_narrow_tile(monkeypatch):
    """Whichever is shipped or tuned for lists of tokens."""
    driver = pytest.importorskip("g2rl_kernels.head.triton.driver")
    taken = []

    def residual(*_, config, seed=None, partial, **__):
        taken.append((seed is not None, config.BN))
        partial.zero_()

    monkeypatch.setattr(driver, "head_residual", residual)
    monkeypatch.setattr(tuning, "INTERPRETER", Config(32, 256, 64, 4, 2))
    hidden, tokens = torch.randn(9, 16), torch.zeros(9, dtype=torch.int64)
    responses = driver.Responses(torch.tensor([0, 9]), None)
    known = driver.Hints(torch.full((9,), -1.0), None)
    driver.features(hidden, tokens, driver.HeadSpec(torch.randn(300, 16)), responses, known)
    assert set(taken) == {(False, 256), (True, 128)}


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
