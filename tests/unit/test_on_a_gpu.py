"""`benchmarks/on_a_gpu.py`: a part that fails, or takes too long, is recorded and does not stop the others."""

import argparse
import json
import sys

import on_a_gpu
import pytest

PARTS = """
import json, sys, time
part, folder = sys.argv[1:3]
if part == "encoding":
    sys.exit("no memory | left")
if part == "loop":
    time.sleep(300)
row = {"rows": [["a step", "2 s"]], "numbers": {"step": 2}, "machine": {"device": "a GPU"}}
open(f"{folder}/result.json", "w").write(json.dumps(row))
"""


@pytest.fixture
def out(monkeypatch, tmp_path):
    """A folder for results, while these parts stand in for the real ones."""
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.setattr(on_a_gpu, "SCRIPT", tmp_path / "parts.py")
    monkeypatch.setattr(on_a_gpu, "LEAST", {"encoding": 60, "ppo_7b": 60, "fsdp": 10**6})
    monkeypatch.setattr(sys, "argv", ["on_a_gpu.py", str(tmp_path)])
    return tmp_path


def test_what_happened_to_each_part_is_recorded(out):
    on_a_gpu.main()
    found = json.loads((out / "on_a_gpu.json").read_text())
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    skipped = statuses.pop("fsdp")
    assert statuses == {"encoding": "failed: no memory | left", "ppo_7b": "measured"}
    assert skipped.startswith("skipped: ") and skipped.endswith(" s were left")
    table = (out / "on_a_gpu.md").read_text()
    assert "| a GPU | a step | 2 s |" in table and "| a GPU | encoding | failed: no memory / left |" in table
    assert found["machine"] == {"device": "a GPU"} and found["parts"]["ppo_7b"]["numbers"] == {"step": 2}


def test_a_part_that_takes_too_long_is_stopped(out):
    found = on_a_gpu.run_part("loop", argparse.Namespace(out=out, toy=False), limit=0.1)
    assert found["status"] == "stopped after 0 s"
