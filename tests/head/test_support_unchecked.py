"""`support=` whose values are not checked, as on a GPU or where code is compiled: the operators alone."""

from itertools import pairwise

import pytest
import torch
from oracle import environment, make_case
from strategies import restricted

from g2rl_kernels._ops import ops


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_unchecked_ids_read_nothing_out_of_bounds(backend):
    """Ids outside the vocabulary count as not there."""
    case = restricted(make_case([5], V=20, d=6), most=6)
    ids, offsets = case.support
    more = torch.tensor([-1, 20, 2**40, -(2**40), 10**12])
    spread = torch.cat([torch.cat([ids[a:b], more]) for a, b in pairwise(offsets)])
    arguments = case.hidden, case.tokens, *case.spec
    expected = ops.support_logprobs(*arguments, ids, offsets, backend, "", 0, True)
    found = ops.support_logprobs(*arguments, spread, offsets + 5 * torch.arange(6), backend, "", 0, True)
    for place in (0, 1, 2, 4, 5, 6):
        torch.testing.assert_close(found[place], expected[place])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_unchecked_ids_that_stand_twice(backend):
    """Others count twice, in gradients as in p; the realised token counts once."""
    case = restricted(make_case([3, 2], V=20, d=6, lora=None), most=6)
    ids, offsets = case.support
    pairs = [(ids[a:b], y) for (a, b), y in zip(pairwise(offsets), case.tokens)]
    twice = [torch.cat([mine, mine]) for mine, _ in pairs]
    once = [torch.cat([mine, mine[mine != y]]) for mine, y in pairs]
    results = []
    for lists in (once, twice):
        lengths = torch.tensor([0, *map(len, lists)]).cumsum(0)
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
        head = leaves[0], case.tokens, *case.spec._replace(weight=leaves[1]), torch.cat(lists), lengths
        logprobs, entropy, *_ = ops.support_logprobs(*head, backend, "", 0, False)
        (logprobs + entropy).sum().backward()
        head = [t.detach() if isinstance(t, torch.Tensor) else t for t in head]
        features = ops.support_features(*head, case.cu_seqlens, None, backend, "", False)
        results.append([logprobs, entropy, *(leaf.grad for leaf in leaves), *features[:4]])
    assert all(map(torch.allclose, *results))
    # The gradient is that of log p: the weight's rows of p twice, less the realised token once.
    z = case.hidden.double() @ case.weight.double().T
    for t, mine in enumerate(once):
        expected = z[t, case.tokens[t]] - z[t, mine].logsumexp(0)
        torch.testing.assert_close(results[1][0][t].double(), expected, rtol=1e-5, atol=1e-5)
    leaves = [t.double().requires_grad_() for t in (case.hidden, case.weight)]
    z = leaves[0] @ leaves[1].T
    log_p = [z[t, mine] - z[t, mine].logsumexp(0) for t, mine in enumerate(once)]
    own = sum((one * (mine == y))[: len(mine)].sum() for one, mine, y in zip(log_p, once, case.tokens))
    (own - sum((one.exp() * one).sum() for one in log_p)).backward()
    for found, leaf in zip(results[1][2:4], leaves):
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-5)


WILD = {  # as they come unchecked, and what they count as
    "offsets": ([-(2**40), 9, 3, 2**40, 11, -7], [0, 9, 9, 12, 12, 12]),
    "cu_seqlens": ([-9, 4, 2, 2**40, 0], [0, 4, 4, 5, 5]),
}


@pytest.mark.parametrize("some_are_whole", [False, True])
@pytest.mark.parametrize("name", WILD)
def test_unchecked_ends_read_nothing_out_of_bounds(name, some_are_whole):
    """ "reference" clamps them; "cpu" refuses them at run time, with tokens that are whole and without."""
    case = make_case([5], V=20, d=6)
    ends = {"offsets": torch.tensor([0, 3, 5, 8, 10, 12]), "cu_seqlens": torch.tensor([0, 2, 2, 4, 5])}
    wild, tame = ({**ends, name: torch.tensor(values)} for values in WILD[name])
    ids, whole = torch.randint(20, (12,)), torch.tensor([False, True, False, False, True])
    kind, more = ("mixed", (whole,)) if some_are_whole else ("support", ())

    def run(backend, ends):
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
        head = [leaves[0], case.tokens, *case.spec._replace(weight=leaves[1]), ids, ends["offsets"], *more]
        count = (5,) * some_are_whole
        out = getattr(ops, f"{kind}_logprobs")(*head, backend, "", *count, 0, False)
        (out[0].nansum() + out[1].nansum()).backward()
        head = [t.detach() if isinstance(t, torch.Tensor) else t for t in head]
        features = getattr(ops, f"{kind}_features")(*head, ends["cu_seqlens"], None, backend, "", False)
        return [*out[:3], *(leaf.grad for leaf in leaves), *features[:4]]

    for found, expected in zip(run("reference", wild), run("reference", tame)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=name):
        run("cpu", wild)


def test_cpu_refuses_offsets_at_run_time():
    case = restricted(make_case([5], V=20, d=6), most=6)
    ids, offsets = case.support
    with pytest.raises(ValueError, match="offsets"):
        ops.support_logprobs(case.hidden, case.tokens, *case.spec, ids, offsets + 1, "cpu", "", 0, False)
    with environment("G2RL_CPU_ISA", None):
        falling = offsets.flip(0)
        with pytest.raises(ValueError, match="offsets"):
            ops.support_logprobs(case.hidden, case.tokens, *case.spec, ids, falling, "cpu", "", 0, False)
