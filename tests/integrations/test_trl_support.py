"""A sampler's own lists of ids, as TRL's batches carry them: what is refused, and of which types rows are."""

import pytest
import torch

from g2rl_kernels.integrations.trl_support import rows_of_lists, support_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([2, 7, 2, 3], "has id 2 twice"),
        ([7, 3, 7], "has id 7 twice"),
        ([7, 10], "has id 10, needs 0 to V - 1 = 9"),
        ([-1, 7], "has id -1, needs 0 to"),
        ([7, 2**40], f"has id {2**40}, needs 0 to"),
        ([2, 3], "lacks its token, 7"),
    ],
)
def test_lists_that_no_sampler_gives_are_refused(wrong, message):
    """On a GPU the ops do not check values: this is the only check."""
    with pytest.raises(ValueError, match=f"sampling_mask: list 1 of response 1 {message}"):
        rows_of_lists([[[4]], [[], wrong]], [[4], [5, 7]], 10, CPU)


def test_rows():
    first, second = rows_of_lists([[[4, 9]], [[], [7, 0]]], [[4], [5, 7]], 10, CPU)
    assert first.ids.tolist() == [4, 9]
    assert second.ids.tolist() == [7, 0]
    assert second.offsets.tolist() == [0, 0, 2]
    assert second.whole.tolist() == [True, False]
    assert not second.added.any()


def test_rows_of_an_empty_completion_have_the_same_types():
    full, empty = rows_of_lists([[[4, 9]], []], [[4], []], 10, CPU)
    for name, value in empty._asdict().items():
        assert value.dtype == getattr(full, name).dtype, name
    assert empty.offsets.tolist() == [0]
    joined = support_of([full, empty], torch.tensor([[True], [False]]))
    assert joined.offsets.dtype == torch.int64
    assert joined.offsets.tolist() == [0, 2]
