"""head_product: hidden's gradient in an order of its own, with torch.use_deterministic_algorithms."""

import pytest
from marks import dtypes
from oracle import deterministic, make_case
from test_logprobs_kernels import _on_the_gpu, check, tiny_budgets, tiny_tiles  # noqa: F401 (fixtures)


@dtypes
@pytest.mark.usefixtures("tiny_budgets")
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_hiddens_gradient_in_an_order_of_its_own(dtype, softcap):
    """Several blocks of several tiles, and a last one that is not full; d is no multiple of a tile's."""
    case = make_case([20, 41], V=251, d=70, dtype=dtype, logit_softcap=softcap)
    with deterministic():
        check(case)
        check(case.replace(hidden=case.hidden[:, ::2], weight=case.weight[:, ::2]))  # through pointers
