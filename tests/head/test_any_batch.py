"""A token's outputs have the same bits alone, in any batch, at any place, with any number of threads.

Backend "cpu", on every instruction set of this machine; "triton" in its interpreter, with
torch.use_deterministic_algorithms(True), which the gradient of hidden needs. Features on "cpu": the same bits
where a response starts at the same offset modulo 16, else within two units in the last place of the largest
term.
"""

import pytest
import torch
from examples import given, settings, st
from oracle import BACKENDS, CPU_BACKENDS, GPU, TRITON, Case, deterministic, environment, make_case
from strategies import cases
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.head import logprobs, vocab_parallel

ISAS = [isa for _, isa in CPU_BACKENDS]


def per_token(case, rows: Tensor, backend: str = "cpu", **options) -> dict[str, Tensor]:
    """Outputs and hidden's gradients of some of the tokens, by themselves."""
    g = torch.Generator().manual_seed(len(case.tokens))
    incoming = torch.randn(2, len(case.tokens), generator=g)[:, rows]
    hidden, weight = case.hidden[rows].clone().requires_grad_(), case.weight.detach().requires_grad_()
    asked = ("sum_p_squared", "top_token")
    options = {**at(case, rows).head, "statistics": asked, "backend": backend, **options}
    trained = g2.linear_logprobs(hidden, weight, case.tokens[rows], **options)
    gradients = torch.autograd.grad((torch.stack(trained[:2]) * incoming).sum(), hidden)
    options.pop("logits_memory", None)
    lengths = torch.tensor([0, len(rows)])
    modes = {"head_features": {}, "with known log-probs": {"known_logprobs": trained.logprobs.detach() - 0.1}}
    found = {
        f"{mode}: {name}": value
        for mode, known in modes.items()
        for name, value in g2.head_features(
            case.hidden[rows], case.weight, case.tokens[rows], lengths, **known, **options
        )
        ._asdict()
        .items()
        if name != "features"
    }
    return {
        **{name: value.detach() for name, value in trained._asdict().items()},
        "gradient of hidden": gradients[0],
        **found,
    }


def at(case: Case, rows: Tensor) -> Case:
    """With the temperatures of some of the tokens."""
    per_token = isinstance(case.temperature, Tensor)
    return case.replace(temperature=case.temperature[rows]) if per_token else case


def assert_same(found: dict[str, Tensor], whole: dict[str, Tensor], rows: Tensor) -> None:
    for name, values in found.items():
        assert torch.equal(values.nan_to_num(7.0), whole[name][rows].nan_to_num(7.0)), name


@pytest.mark.parametrize("isa", ISAS)
@given(case=cases(), seed=st.integers(0, 99), memory=st.sampled_from((0, 20_000, 1 << 30)))
def test_a_token_has_the_same_bits_in_any_batch(isa, case, seed, memory):
    N = len(case.tokens)
    with environment("G2RL_CPU_ISA", isa):
        whole = per_token(case, torch.arange(N), logits_memory=memory)
        g = torch.Generator().manual_seed(seed)
        some = torch.randint(max(N, 1), (int(torch.randint(1, 40, (), generator=g)),), generator=g)
        for rows in (torch.randperm(N, generator=g)[: N // 2], some[: 40 * N], torch.arange(N)[-1:]):
            # All logits or none: a budget for a part keeps other blocks in another batch.
            part = per_token(case, rows, logits_memory=memory if memory in (0, 1 << 30) else 0)
            if memory == 20_000 and case.hidden.dtype == torch.bfloat16:
                part.pop("gradient of hidden")
            assert_same(part, whole, rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_slabs_nor_chunks_nor_threads_change_a_bit(isa, dtype, monkeypatch):
    """A vocabulary that needs several slabs, gradients whose sums borrow the weight's rows, narrow chunks."""
    case = make_case([150], V=5000, d=24, dtype=dtype)
    rows = torch.arange(150)
    threads = torch.get_num_threads()
    with environment("G2RL_CPU_ISA", isa):
        whole = per_token(case, rows, logits_memory=0)
        monkeypatch.setattr(logprobs, "SUMS", 4 * 24 * 64)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert_same(per_token(case, rows, logits_memory=0), whole, rows)
        finally:
            torch.set_num_threads(threads)
        for n in (1, 16, 17, 63, 100):
            assert_same(per_token(case, rows[-n:], logits_memory=0), whole, rows[-n:])


@pytest.mark.parametrize("isa", ISAS[-1:])
def test_a_vocabulary_of_several_slabs(isa):
    """Above 480,000 entries logits are computed twice; how many responses there are changes nothing."""
    case = make_case([5, 6, 7, 8, 9, 10], V=500_003, d=4, dtype=torch.float32)
    with environment("G2RL_CPU_ISA", isa):
        whole = per_token(case, torch.arange(45), logits_memory=0)
        for rows in (torch.arange(16), torch.arange(40, 45)):
            assert_same(per_token(case, rows, logits_memory=0), whole, rows)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(
    case=cases(),
    before=st.lists(st.integers(0, 20), max_size=9),
    length=st.integers(1, 80) | st.sampled_from((250, 600)),
    wrong=st.sampled_from((None, 0.0, 0.1)),
)
def test_a_feature_depends_on_its_offset_modulo_16_alone(isa, case, before, length, wrong):
    """Whatever responses stand before and behind; at another offset it is as near as rounding.

    wrong: None, or how many of the known log-probs are off by more than the tolerance.
    """
    V, d = case.weight.shape
    g = torch.Generator().manual_seed(length)
    lengths = [*before, length, 5]
    N = sum(lengths)
    hidden = torch.randn(N, d, generator=g).to(case.hidden.dtype)
    tokens = torch.randint(V, (N,), generator=g)
    if isinstance(case.temperature, Tensor):
        case = case.replace(temperature=0.3 + 1.4 * torch.rand(N, generator=g))
    options = {**case.head, "backend": "cpu"}
    if case.bias is not None:
        options["bias"] = case.bias.nan_to_num(neginf=0.0)
    start = sum(before)
    with environment("G2RL_CPU_ISA", isa):
        known = g2.head_features(hidden, case.weight, tokens, torch.tensor([0, N]), **options).logprobs
    known -= 0.005 + 0.5 * (torch.rand(N, generator=g) < (wrong or 0.0))

    def feature(first: int) -> Tensor:
        """The response's, as the second one of a batch, from row `first` on."""
        rows = torch.cat([torch.arange(N)[-first:][:first], torch.arange(start, start + length)])
        cut = torch.tensor([0, first, first + length])
        return run(rows, cut).features[1]

    def run(rows: Tensor, cut: Tensor) -> g2.HeadFeatures:
        hint = {} if wrong is None else {"known_logprobs": known[rows]}
        here = {**options, "temperature": at(case, rows).temperature, **hint}
        return g2.head_features(hidden[rows], case.weight, tokens[rows], cut, **here)

    ends = torch.tensor([0, *lengths]).cumsum(0)
    with environment("G2RL_CPU_ISA", isa):
        found = run(torch.arange(N), ends).features[len(before)]
        same = feature(start % 16)
        other = feature((start + 5) % 16)
    assert torch.equal(found, same)
    W = case.weight.double().abs().amax(0)  # bounds the terms of each column, of which 1 - p count
    ulp = 2.0**-23 * (case.logit_scale * 2 * W).clamp(min=1e-30)
    assert ((found - other).abs() <= 2 * ulp).all()


@pytest.mark.skipif(TRITON not in BACKENDS, reason="pip install triton")
@settings(max_examples=10)
@given(case=cases(), seed=st.integers(0, 99), known=st.booleans())
def test_triton_has_the_same_bits_in_any_batch(case, seed, known):
    _triton_has_the_same_bits(case, seed, known)


@pytest.mark.skipif(TRITON not in BACKENDS, reason="pip install triton")
@pytest.mark.parametrize("known", [False, True])
def test_triton_has_the_same_bits_over_many_strips(known):
    _triton_has_the_same_bits(make_case([40], V=1500, d=24, dtype=torch.float32), 0, known)


def _triton_has_the_same_bits(case, seed, known):
    from interpreter import sum_in_one_order

    from g2rl_kernels.head.triton import driver, stats, tile, tuning
    from g2rl_kernels.head.triton import logprobs as kernels

    case, N = case.to(GPU), min(len(case.tokens), 40)
    rows = torch.arange(N, device=GPU)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, generator=g).to(GPU) * 0.02  # nats: half of the seeds are corrected
    incoming = torch.randn(2, N, generator=g).to(GPU)

    def outputs(rows, hint):
        lengths = torch.tensor([0, len(rows)], device=GPU)
        asked = ("sum_p_squared", "top_token")
        head = {**at(case, rows).head, "backend": "triton"}
        options = {**head, "known_logprobs": hint, "statistics": () if known else asked}
        found = g2.head_features(case.hidden[rows], case.weight, case.tokens[rows], lengths, **options)
        hidden = case.hidden[rows].detach().requires_grad_()
        trained = g2.linear_logprobs(
            hidden, case.weight, case.tokens[rows], **head, statistics=asked, logits_memory=0
        )
        outputs = {f"linear_logprobs: {k}": v.detach() for k, v in trained._asdict().items()}
        if case.hidden.dtype != torch.float16:  # the unit of its gradients follows the largest of the batch
            summed = (torch.stack(trained[:2]) * incoming[:, rows]).sum()
            (outputs["gradient of hidden"],) = torch.autograd.grad(summed, hidden)
        return {**found._asdict(), **outputs}

    with deterministic(), pytest.MonkeyPatch.context() as patch:
        sum_in_one_order(patch)
        # Several tiles to a strip, several strips, chunks and blocks
        patch.setattr(tile, "choose", lambda *_: tuning.Config(16, 32, 32, 4, 2))
        patch.setattr(stats, "MAX_STRIPS", 7)
        patch.setattr(stats, "BLOCKS", 2)
        patch.setattr(driver, "CHUNK", 30)
        patch.setattr(kernels, "TOKENS", 32)
        patch.setattr(kernels, "GRADIENT", 4 * 32 * 64)  # more tiles for fewer tokens
        hint = outputs(rows, None)["logprobs"].nan_to_num(0.0) + noise if known else None
        whole = outputs(rows, hint)
        some = torch.randperm(N, generator=g)[: N // 2].to(GPU)
        for part in (some, rows[-1:]):
            found = outputs(part, None if hint is None else hint[part])
            found.pop("features")
            assert_same(found, whole, part)


def test_sums_over_ranks_do_not_depend_on_the_place(monkeypatch):
    """Each number is added up in rank order, in however many messages."""
    members, sent = 3, []

    class Group:
        def size(self):
            return members

    g = torch.Generator().manual_seed(0)
    values = [torch.randn(50, generator=g) * 10.0**power for power in (0, 4, 8)]
    monkeypatch.setattr(vocab_parallel, "_members", lambda group: Group())
    monkeypatch.setattr(vocab_parallel, "REDUCED", 20)
    place = {"rows": slice(0, 0)}

    def all_to_all_single(out, parts, group):
        start = place["rows"].stop
        place["rows"] = slice(start, min(start + 20, 50))
        size = len(parts) // members
        padded = [torch.nn.functional.pad(v[place["rows"]], (0, 20))[: len(parts)] for v in values]
        sent[:] = [torch.stack([p.view(members, size)[r] for p in padded]) for r in range(members)]
        out.copy_(sent[0].flatten())

    def gathered(total, group):
        others = [(part[0] + part[1]) + part[2] for part in sent]
        assert torch.equal(total, others[0])
        return torch.stack(others)

    monkeypatch.setattr(vocab_parallel.dist, "all_to_all_single", all_to_all_single)
    monkeypatch.setattr(vocab_parallel, "_gathered", gathered)
    summed = values[0].clone()
    vocab_parallel.all_reduce(summed, "a group")
    assert torch.equal(summed, (values[0] + values[1]) + values[2])
