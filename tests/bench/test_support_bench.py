"""The benchmark of restricted heads: its lists, and a run on a small head."""

import json

import pytest
import torch

from benchmarks import support


@pytest.mark.parametrize(("V", "kept"), [(100, 7), (64, 64), (2048, 512)])
def test_each_list_has_its_token_and_no_id_twice(V, kept):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.tensor([0, V - 1]), torch.randint(V, (30,), generator=generator)])
    ids, offsets = support.random_lists(tokens, V, kept, generator)
    assert torch.equal(offsets, torch.arange(33) * kept)
    lists = ids.view(32, kept)
    assert (lists == tokens[:, None]).any(1).all()
    assert (lists.diff() > 0).all()
    assert (lists >= 0).all()
    assert (lists < V).all()


def test_a_run_writes_its_table(tmp_path, capsys):
    out = tmp_path / "support.json"
    arguments = ["--shape", "tiny", "--dtype", "fp32", "--tokens", "16", "--kept", "8", "--rounds", "3"]
    support.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["op"] == "support"
    assert [row["ids"] for row in found["rows"]] == ["all ids", "all ids", "8 ids", "8 ids"]
    gathered = [row["gathered_bytes"] for row in found["rows"] if "gathered_bytes" in row]
    assert gathered == [16 * 8 * 64 * 4, 2 * 16 * 8 * 64 * 4]
    assert "x faster" in capsys.readouterr().out
    table = support.table(found["rows"]).splitlines()
    assert len(table) == 6
    assert table[2].startswith("| head_features | all | ")
    assert table[4].count("|") == 6
