"""The Triton kernel of group_geometry: on a GPU where there is one, else under Triton's interpreter
(TRITON_INTERPRET=1, which conftest.py sets)."""

import pytest
import torch
from examples import given, settings, st
from strategies import groupings
from test_group import RIGHT, plane

from g2rl_kernels.group import geometry, reference
from g2rl_kernels.group.geometry import IMPLEMENTATIONS
from g2rl_kernels.group.options import EXPLORATION_SCORES, SCALES, SHAPINGS, ShapingOptions

pytest.importorskip("triton", reason="needs triton")

from g2rl_kernels.group import triton as kernel

# Triton's interpreter computes with numpy, which warns where a GPU goes on with NaN or infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUTS = ("similarity", "exploration_score", "shaped_rewards", "advantages")


def launch(features, rewards, members, **options):
    tensors = (tensor.to(DEVICE) for tensor in (features, rewards, members))
    out = kernel.launch(*tensors, *ShapingOptions(**options).flat())
    return [tensor.cpu() for tensor in out]


def assert_right(features, rewards, members, **options):
    """As near to the reference in float64 as tests/test_group.py demands of the compiled operator."""
    ours = launch(features, rewards, members, **options)
    exact = reference.group_geometry(features.double(), rewards.double(), members, ShapingOptions(**options))
    for name, a, b in zip(OUTPUTS, ours, exact):
        assert a.dtype == torch.float32, name
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-7, equal_nan=True)
    return ours


@settings(max_examples=25)
@given(
    grouping=groupings(),
    shaping=st.sampled_from(SHAPINGS),
    exploration_score=st.sampled_from(EXPLORATION_SCORES),
    scale=st.sampled_from(SCALES),
    uniform_groups=st.sampled_from(("skip", "shape")),
    scalars=st.sampled_from(((0.5, 3.0, 1e-6), (0.3, 0.7, 1e-9))),
)
def test_any_groups(grouping, scalars, **options):
    """Ids, padding, degenerate features, every option."""
    ids, features, rewards = grouping
    members = reference.group_members(torch.tensor(ids, dtype=torch.int64))
    assert_right(features, rewards, members, **options, **dict(zip(("lam", "clip", "eps"), scalars)))


@pytest.mark.parametrize("hip", [None, "7.2"])
@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 31, 32])
def test_sizes_of_groups(monkeypatch, M, hip):
    """Every configuration, AMD's too, full and with an empty place in each group."""
    monkeypatch.setattr(torch.version, "hip", hip)
    B, d = 2, 2 * 512 + 5  # several rounds of the loop over d, the last one partly filled
    features = torch.randn(B * M, d) * torch.logspace(-3, 3, B * M)[:, None]
    rewards = torch.randn(B * M).sign()
    members = torch.randperm(B * M).view(B, M)
    assert_right(features, rewards, members)
    members[:, M // 2] = -1
    assert_right(features, rewards, members, scale="batch")


def test_a_shared_direction_at_full_width():
    """What responses to one prompt look like: nu has a small spread, which nubar enlarges."""
    features = torch.randn(2, 1, 4096) + 0.1 * torch.randn(2, 16, 4096)
    rewards = torch.randn(32).sign()
    assert_right(features.view(32, 4096), rewards, torch.arange(32).view(2, 16))


def test_rows_of_no_group_get_zeros():
    S = 2 * kernel.BR + 3
    rows = [0, 5, kernel.BR - 1, kernel.BR, S - 1, 7]
    members = torch.tensor(rows).view(2, 3)
    others = [row for row in range(S) if row not in rows]
    features, rewards = torch.randn(S, 3), torch.full((S,), torch.inf)
    features[others] = torch.nan
    rewards[rows] = torch.tensor([1.0, -1, 1, 1, -1, -1])
    similarity, *per_row = launch(features, rewards, members, scale="batch")
    alone = launch(features[rows], rewards[rows], torch.arange(6).view(2, 3), scale="batch")
    assert torch.equal(similarity, alone[0])
    for ours, theirs in zip(per_row, alone[1:]):
        assert torch.equal(ours[rows], theirs)
        assert torch.equal(ours[others], torch.zeros(len(others)))


def test_as_many_places_as_rows_and_yet_a_row_of_no_group():
    out = launch(torch.ones(4, 2), torch.tensor([1.0, -1, 1, 1]), torch.tensor([[0, 1], [3, -1]]))
    assert [tensor[2].item() for tensor in out[1:]] == [0, 0, 0]
    assert not out[0][1, 1].any()
    assert not out[0][1, :, 1].any()


def test_nan_stays_in_its_group():
    features, rewards = torch.randn(9, 4), torch.tensor([1.0, -1, 1] * 3)
    members = torch.arange(9).view(3, 3)
    clean = launch(features, rewards, members, shaping="equation")
    features[4, 1] = torch.nan
    out = launch(features, rewards, members, shaping="equation")
    nan = torch.isnan(out[0])
    assert nan[1, 1].all()
    assert nan[1, :, 1].all()
    assert nan.sum() == 5
    others = [0, 1, 2, 6, 7, 8]
    for ours, theirs in zip(out[1:], clean[1:]):
        assert torch.isnan(ours[3:6]).all()
        assert torch.equal(ours[others], theirs[others])


def test_nan_reward_stays_in_its_group():
    features, rewards = torch.randn(6, 4), torch.tensor([1.0, -1, 1, 1, torch.nan, -1])
    _, score, _, advantages = launch(features, rewards, torch.arange(6).view(2, 3))
    assert torch.isfinite(score[:3]).all()
    assert torch.isfinite(advantages[:3]).all()
    assert torch.isnan(advantages[3:]).all()
    # A group whose other rewards agree is not uniform, and NaN reaches the batch's deviation.
    rewards = torch.tensor([1.0, 1, 1, 1, torch.nan, 1])
    *_, shaped, _ = launch(features, rewards, torch.arange(6).view(2, 3))
    assert torch.isnan(shaped[3:]).all()
    assert torch.isnan(launch(features, rewards, torch.arange(6).view(2, 3), scale="batch")[3]).all()


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_alone_worked_out_by_hand(name):
    angles, rewards, shaped, advantages = RIGHT[name]
    members = torch.arange(len(angles)).view(1, -1)
    options = {"shaping": "right", "uniform_groups": "shape", "eps": 1e-9}
    out = assert_right(plane(angles), torch.tensor(rewards, dtype=torch.float32), members, **options)
    close = {"rtol": 0, "atol": 2e-6, "equal_nan": True}
    torch.testing.assert_close(out[2], torch.tensor(shaped, dtype=torch.float32), **close)
    torch.testing.assert_close(out[3], torch.tensor(advantages, dtype=torch.float32), **close)


def test_nan_in_a_wrong_answer_leaves_wrong_rewards():
    features, rewards = torch.randn(8, 4), torch.tensor([1.0, -1, 1, -1, -1, -1, -1, -1])
    features[[1, 5]] = torch.nan
    members = torch.arange(8).view(2, 4)
    *_, shaped, advantages = assert_right(features, rewards, members, shaping="right", uniform_groups="shape")
    assert shaped[[0, 2]].isnan().all()
    assert shaped[[1, 3, 4, 5, 6, 7]].tolist() == [-1] * 6
    assert not advantages[4:].any()


@pytest.mark.parametrize("shift", [-1000.0, -80.0, 80.0, 1000.0, 3e38])
def test_exponentials_of_rewards_do_not_overflow(shift):
    features, rewards = torch.randn(4, 6), torch.tensor([0.0, 1, -1, 0.5]) + shift
    for tensor in assert_right(features, rewards, torch.arange(4).view(1, 4), shaping="none"):
        assert torch.isfinite(tensor).all()


def test_extreme_magnitudes():
    """Squares of 1e30 overflow float32, those of 1e-30 vanish."""
    features = torch.tensor([[1e30, 1e30], [1e30, 0], [0, 1e30], [1e-30, 1e-30]])
    assert_right(features, torch.tensor([1.0, 1, -1, -1]), torch.tensor([[0, 1, 2, 3]]))


@pytest.mark.parametrize(("step", "is_flat"), [(0.0024, True), (0.003, False)])
def test_a_flat_score(step, is_flat):
    """Angles 0, step, 2 step and equal rewards: nu spreads by (sin^2 2 step - sin^2 step) / 2, about
    1.5 step^2: 8.6e-6 or 1.35e-5, on either side of 1e-5."""
    angles = step * torch.arange(3.0)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    members = torch.tensor([[0, 1, 2]])
    *_, shaped, _ = assert_right(features, torch.ones(3), members, uniform_groups="shape")
    assert shaped.tolist() == pytest.approx([1.0, 1, 1] if is_flat else [1.5, 0.5, 1.5], abs=1e-2)


def test_zero_features_and_no_features():
    out = assert_right(torch.zeros(3, 4), torch.tensor([1.0, 1, -1]), torch.tensor([[0, 1, 2]]))
    assert out[1].tolist() == [1, 1, 1]
    assert_right(torch.zeros(3, 0), torch.tensor([1.0, 1, -1]), torch.tensor([[0, 1, 2]]))


def test_nothing_to_do():
    for S, B, M in ((0, 0, 3), (0, 2, 3), (2, 0, 0), (2, 2, 0)):
        members = torch.full((B, M), -1)
        similarity, *per_row = launch(torch.ones(S, 4), torch.ones(S), members, scale="batch")
        assert similarity.shape == (B, M, M)
        assert not similarity.any()
        assert all(torch.equal(tensor, torch.zeros(S)) for tensor in per_row)


def test_repeats_bitwise():
    features, rewards = torch.randn(40, 1000), torch.randn(40)
    members = torch.randperm(40)[:36].view(3, 12)
    first = launch(features, rewards, members, scale="batch")
    for _ in range(3):
        again = launch(features, rewards, members, scale="batch")
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_the_operator_and_larger_groups():
    features, rewards = torch.randn(70, 5, device=DEVICE), torch.randn(70, device=DEVICE)
    options = 0.5, 3.0, 1, 0, 1, True, 1e-6
    with pytest.raises(ValueError, match="members: got groups of 35, the Triton kernel takes at most 32"):
        kernel.launch(features, rewards, torch.arange(70, device=DEVICE).view(2, 35), *options)
    for M in (7, 35):  # by the kernel, by the reference
        members = torch.arange(70, device=DEVICE).view(-1, M)
        out = IMPLEMENTATIONS["triton"](features, rewards, members, *options)
        for a, b in zip(out, IMPLEMENTATIONS["reference"](features.double(), rewards, members, *options)):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    members = torch.arange(70, device=DEVICE).view(-1, 7)
    torch.library.opcheck(torch.ops.g2rl.group_geometry_triton, (features, rewards, members, *options))


@pytest.mark.parametrize(
    ("compiled_for", "has_triton", "expected"),
    [
        (("cpu", "cuda"), True, "compiled"),
        (("cpu",), True, "triton"),
        (("cpu",), False, "reference"),
    ],
)
def test_what_a_gpu_gets(monkeypatch, compiled_for, has_triton, expected):
    monkeypatch.setattr(geometry, "GROUP_DEVICES", compiled_for)
    monkeypatch.setattr(geometry, "HAS_TRITON", has_triton)
    assert geometry._implementation("cuda") == expected
    assert geometry._implementation("cpu") == "compiled"
    assert geometry._implementation("mps") == "reference"


def test_what_an_amd_gpu_gets(monkeypatch):
    """Never CUDA's kernel, and Triton's from the version on that compiles it."""
    monkeypatch.setattr(geometry, "GROUP_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(geometry, "HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert geometry._implementation("cuda") == "triton"
    assert geometry._implementation("cpu") == "compiled"
    for version, expected in (("3.7.1", False), ("3.8.0", True), ("3.10.0", True)):
        monkeypatch.setattr(kernel.triton, "__version__", version)
        assert kernel.takes(16) == expected
        assert not kernel.takes(kernel.MAX_M + 1)
    monkeypatch.setattr(kernel.triton, "__version__", "3.7.1")
    monkeypatch.setattr(kernel, "launch", None)  # is not called
    arguments = torch.randn(4, 3), torch.randn(4), torch.arange(4).view(1, 4), 0.5, 3.0, 1, 0, 1, True, 1e-6
    for a, b in zip(IMPLEMENTATIONS["triton"](*arguments), IMPLEMENTATIONS["reference"](*arguments)):
        assert torch.equal(a, b)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernel.takes(16)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", ["compiled", "triton"])
@pytest.mark.parametrize("scale", range(3))
def test_cuda_graph(name, scale):
    """Neither kernel waits for the host: capture, change the inputs in place, replay."""
    if name == "compiled" and "cuda" not in geometry.GROUP_DEVICES:
        pytest.skip("the extension was built without nvcc")
    call = IMPLEMENTATIONS[name]
    features, rewards = torch.randn(64, 256, device=DEVICE), torch.randn(64, device=DEVICE)
    args = features, rewards, torch.arange(64, device=DEVICE).view(4, 16), 0.5, 3.0, 1, 0, scale, True, 1e-6
    call(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    for _ in range(2):
        features.normal_()
        rewards.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, call(*args)))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_compiled_kernel_and_this_one_agree():
    if "cuda" not in geometry.GROUP_DEVICES:
        pytest.skip("the extension was built without nvcc")
    features, rewards = torch.randn(96, 4096, device=DEVICE), torch.randn(96, device=DEVICE)
    for M, scale in ((1, 1), (12, 2), (16, 0), (32, 1)):
        args = (
            features,
            rewards,
            torch.arange(96, device=DEVICE).view(-1, M),
            0.5,
            3.0,
            1,
            0,
            scale,
            True,
            1e-6,
        )
        outs = [IMPLEMENTATIONS[name](*args) for name in ("compiled", "triton")]
        for a, b in zip(*outs):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-7)
