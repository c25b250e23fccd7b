"""benchmarks/support.py: lists as a top-k sampler makes them, and a row for each length."""

import torch

from benchmarks import registry, support

ARGUMENTS = ["--shape", "tiny", "--N", "16", "--ids", "4", "9", "--backend", "reference", "--rounds", "1"]


def test_a_list_holds_the_likeliest_ids_and_its_token():
    p = registry.problem(registry.case("tiny", "fp32", 40, "flat"))  # most tokens are unlikely
    ids, offsets = support.likeliest(p, 5)
    assert torch.equal(offsets, 5 * torch.arange(41))
    lists, best = ids.view(40, 5), (p.hidden @ p.weight.T).topk(5).indices
    assert (lists == p.tokens[:, None]).any(1).all()
    assert torch.equal(lists[:, :4], best[:, :4])
    assert all(len(set(one)) == 5 for one in lists.tolist())


def test_a_row_for_each_length(capsys):
    assert support.main(ARGUMENTS) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert [row[0].strip() for row in rows] == ["ids a token", "---", "all", "4", "9"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:5])
