"""Which settings a corpus is compared on."""

import json

from data_utils import DataOptions
from experiments.compare import commands, signals_of
from tools.sample_chats import chats


def test_signals_are_those_that_the_corpus_has_reactions_of(sample, tmp_path):
    assert signals_of(DataOptions(str(sample)), tmp_path / "cache") == ["face", "sentiment", "hindsight"]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, chats(20, turns=8, thumbs=0.3, seed=0))))
    assert signals_of(DataOptions(str(file)), tmp_path / "cache") == ["sentiment", "reaction", "hindsight"]
    rows = [row for row, *_ in commands("encoder", signals=["hindsight"])]
    assert rows == ["LI:hindsight", *(f"{method}" for kind in ("RRD", "IRCR", "RUDDER")
                    for method in (f"GE:{kind}", f"GELI:{kind}×hindsight"))]  # fmt: skip
