"""Runs that are not logged to wandb. What those send that are is in tests/robustness/test_privacy.py."""

import json
import sys

import pandas as pd
from accelerate import Accelerator

from geli.run.options import RunOptions
from geli.run.tracking import Tracker


def test_a_run_that_logs_nowhere_does_not_need_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    tracker = Tracker("project", tmp_path / "runs", {"seed": 0}, RunOptions(), Accelerator(cpu=True))
    tracker.log({"loss": 1.0}, step=1)
    tracker.log_table("texts", pd.DataFrame({"text": ["hello"]}), step=1)
    tracker.log_bars("rewards", {1: 0.5})
    tracker.log_pictures({"picture": tmp_path / "picture.png"})
    tracker.summary({"best": 1.0})
    assert tracker.logged["rows"] == [{"step": 1, "loss": 1.0}] and tracker.wandb_run == {}
    assert json.loads((tracker.lock.folder / "run.json").read_text())["wandb"]["name"] == tracker.name
    tracker.finish()
    assert not tracker.lock.folder.exists()
