"""The operators in C++, through head/cpu.py: fake implementations, and the outputs of `features`."""

import pytest
import torch
from oracle import make_case

from g2rl_kernels.head import cpu
from g2rl_kernels.head.backend import Hints
from g2rl_kernels.head.spec import HeadSpec, Responses

LENGTHS = [3, 0, 5]
ranks = pytest.mark.parametrize("r", [0, 3])  # of a low-rank part


def given(r: int = 0):
    case = make_case(LENGTHS, V=67, d=16, dtype=torch.float32)
    head = HeadSpec(case.weight, torch.randn(67), 0.7, 1.2, 5.0)
    if r:
        head = head._replace(low_hidden=torch.randn(8, r), low_weight=torch.randn(67, r))
    return case.hidden, case.tokens, head, Responses(case.cu_seqlens, torch.rand(8))


@ranks
def test_opcheck_statistics(r):
    hidden, tokens, head, _ = given(r)
    for kept in (None, torch.zeros(cpu.kept_bytes(hidden, head, 1 << 20), dtype=torch.uint8)):
        for more in (False, True):
            arguments = (hidden, tokens, *head, kept, more)
            torch.library.opcheck(torch.ops.g2rl.head_statistics, arguments)


def test_opcheck_finish():
    target, tokens = torch.rand(8).double(), torch.arange(8)
    for partial, top in (
        (torch.rand(2, 3, 8), tokens.new_empty(2, 0)),
        (torch.rand(2, 4, 8), tokens.repeat(2, 1)),
    ):
        torch.library.opcheck(torch.ops.g2rl.head_finish, (partial.double(), target, tokens, top))


def test_finish_refuses_what_does_not_fit():
    target, tokens, top = torch.rand(8).double(), torch.arange(8), torch.zeros(2, 7, dtype=torch.int64)
    for partial, message in ((torch.rand(2, 5, 8), "3 or 4"), (torch.rand(2, 4, 8), "top has shape")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.g2rl.head_finish(partial.double(), target, tokens, top)


def test_opcheck_terms():
    torch.library.opcheck(torch.ops.g2rl.head_terms, tuple(torch.rand(4, 8)))


@ranks
def test_opcheck_features_of_part(r):
    hidden, tokens, head, responses = given(r)
    of_tokens = torch.rand(8, dtype=torch.float64), torch.rand(8)
    arguments = (hidden, tokens, *head, *responses, *of_tokens)
    torch.library.opcheck(torch.ops.g2rl.head_features_of_part, arguments)


@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck_sweep(wanted):
    hidden, tokens, head, _ = given(3)
    sums = torch.zeros(8, 16), torch.zeros(67, 16), torch.zeros(67), torch.zeros(8, 3), torch.zeros(67, 3)
    arguments = (hidden, tokens, *head, torch.rand(2, 8), torch.rand(3, 8))
    sums = sums if wanted else (None,) * 5
    torch.library.opcheck(torch.ops.g2rl.head_sweep, (*arguments, 5, 60, *sums, None, 0, 0))
    kept = torch.zeros(cpu.kept_bytes(hidden, head, 1 << 20), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.g2rl.head_sweep, (*arguments, 0, 60, *sums, kept, 8, 0))


@pytest.mark.parametrize(
    ("kept", "tokens", "first", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), 8, 0, "kept has 3 bytes"),
        (torch.zeros(96 * 16 * 4 * 2, dtype=torch.uint8), 8, 0, "kept has 12288 bytes"),  # one block too many
        (torch.zeros(96 * 16 * 4), 8, 0, "contiguous bytes"),
        (torch.zeros(96 * 16 * 4, dtype=torch.uint8), 7, 0, "kept_first = 0"),
        (torch.zeros(96 * 16 * 4, dtype=torch.uint8), 16, 8, "kept_first = 8"),
        (torch.zeros(96 * 16 * 4, dtype=torch.uint8), 16, -16, "kept_first = -16"),
    ],
)
def test_kept_logits_that_do_not_fit_are_refused(kept, tokens, first, message):
    hidden, realised, head, _ = given()
    of_tokens = torch.rand(2, 8), torch.rand(3, 8)
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.g2rl.head_sweep(
            hidden, realised, *head, *of_tokens, 0, 60, *[None] * 5, kept, tokens, first
        )


def test_kept_logits_are_read_at_whole_blocks():
    hidden, tokens, head, _ = given()
    kept = torch.zeros(cpu.kept_bytes(hidden, head, 1 << 20), dtype=torch.uint8)
    arguments = (hidden, tokens, *head, torch.rand(2, 8), torch.rand(3, 8))
    with pytest.raises((ValueError, RuntimeError), match="multiple of 96 with kept"):
        torch.ops.g2rl.head_sweep(*arguments, 5, 60, *[None] * 5, kept, 8, 0)


def test_without_max_skipped_no_token_is_skipped():
    outputs = cpu.features(*given())
    assert outputs.skipped_mass.equal(torch.zeros(len(LENGTHS)))
    assert outputs.skipped_tokens.equal(torch.zeros(len(LENGTHS), dtype=torch.int64))


def test_with_max_skipped_what_is_skipped_is_left_out():
    hidden, tokens, head, responses = given()
    outputs = cpu.features(hidden, tokens, head, responses, Hints(max_skipped=0.5))
    every = cpu.features(hidden, tokens, head, responses)
    assert outputs.skipped_tokens.sum() > 0
    assert (outputs.skipped_mass > 0).equal(outputs.skipped_tokens > 0)
    assert outputs.logprobs.equal(every.logprobs)
    some = outputs.skipped_tokens > 0
    assert (outputs.features != every.features).any(1).equal(some)
