"""The example in the README runs as it stands there."""

import pandas as pd
from conftest import ROOT
from page_code import blocks, execute


def test_the_best_quarter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = pd.DataFrame({"conversation_id": list("aabb"), "reward": [0.1, 0.9, None, 0.2]})
    table.to_parquet("turn_rewards.parquet")
    (code,) = blocks(ROOT / "apps/label/README.md")
    assert execute(code)["best"]["reward"].tolist() == [0.9] and "count" in capsys.readouterr().out
