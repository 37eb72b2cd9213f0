"""The report of stage 3: its table, its files and its page."""

import json

import pytest

from geli.nets.prompts import Prompt
from geli.report.policies import PolicyRun, finish_policy_run, metric_rows, parts_of
from geli.run.tracking import versions

PROMPTS = [Prompt(f"User: hello {i} AI:", "", f"human {i}", name=f"{i}/0/1") for i in range(4)]
STEPS = [
    {"step": i, "score_mean": 0.1 * i, "kl": 0.5 * i, "response_length_mean": 20.0, "distinct_2": 0.9,
     "seconds_generate": 1.0, "seconds_update": 2.0}
    for i in (1, 2, 3)
]  # fmt: skip
REWARD = {"reward": 0.25, "reward_low": 0.1, "reward_high": 0.4}
DIVERSE = {"distinct_2": 0.9}
METRICS = {
    "before": {**REWARD, "kl": 0.0, **DIVERSE},
    "after": {**REWARD, "kl": 4.0, **DIVERSE},
    "gain": REWARD,
    "human": {"reward": 0.5},
}


class Logged:
    """A tracker that keeps what it is given."""

    name, wandb_run = "x", {"project": "p", "id": "i"}

    def __init__(self):
        self.summaries, self.pictures, self.finished = {}, {}, False

    def log_pictures(self, pictures):
        self.pictures.update(pictures)

    def summary(self, values):
        self.summaries.update(values)

    def finish(self):
        self.finished = True


def policy_run(folder, **changes):
    defaults = {"seed": 0, "log_text": False, "generate": True, "model_name": "llama", "data_dir": "candor"}
    values = dict(
        stem=folder / "GELI_llama", algo="ppo", arguments={**defaults, "exp_name": "GELI"}, defaults=defaults,
        counts={"conversations": 4}, reward="reward1_geli", head=None, held_out=PROMPTS, metrics=METRICS,
        texts={"base": ["secret base"] * 4, "tuned": ["<b>secret</b>"] * 4}, steps=STEPS, paths=[],
        problems=["step 20: KL runs away"], seconds={"loading": 1.0, "training": 10.0},
    )  # fmt: skip
    return PolicyRun(**{**values, **changes})


def test_the_table_has_a_column_for_each_policy_and_intervals_in_cells():
    rows = metric_rows(METRICS)
    assert rows[0] == {
        "on held-out prompts": "reward", "before": "0.250 [0.100, 0.400]", "after": "0.250 [0.100, 0.400]",
        "gain": "0.250 [0.100, 0.400]", "human": 0.5,
    }  # fmt: skip
    assert rows[1] == {"on held-out prompts": "kl", "before": 0.0, "after": 4.0, "gain": None, "human": None}
    assert len(rows) == 3


def test_training_is_divided_into_the_parts_of_its_steps(tmp_path):
    assert parts_of(policy_run(tmp_path)) == {
        "loading": 1.0, "training: generating": 3.0, "training: log-probabilities and values": 0.0,
        "training: reward": 0.0, "training: updating": 6.0, "training: rest": pytest.approx(1.0),
    }  # fmt: skip
    plain = policy_run(tmp_path, steps=[])
    assert parts_of(plain) == plain.seconds


def test_everything_is_written_and_named(tmp_path, capsys):
    tracker = Logged()
    finish_policy_run(policy_run(tmp_path), tracker)
    ends = [".json", "_responses.csv", "_report.html"]
    ends += [f"_{name}.{kind}" for name in ("ppo", "before_after") for kind in ("png", "pdf")]
    printed = capsys.readouterr().out
    for end in ends:
        path = tmp_path / f"GELI_llama{end}"
        assert path.is_file() and (path.stem if path.suffix in (".png", ".pdf") else path.name) in printed, end
    record = json.loads((tmp_path / "GELI_llama.json").read_text())
    verdict = record["verdict"]
    assert verdict.startswith("Better: +0.250 [0.100, 0.400]") and verdict.endswith(
        "In training, step 20: KL runs away."
    )
    assert f"\n{verdict}\nWritten:" in printed and tracker.summaries["verdict"] == verdict
    page = (tmp_path / "GELI_llama_report.html").read_text()
    assert page.index("Better: +0.250") < page.index("<dt>policy</dt>")
    assert record["metrics"] == METRICS and record["versions"] == versions() and record["reward_head"] is None
    assert tracker.summaries["val/gain_reward"] == 0.25 and tracker.finished and len(tracker.pictures) == 2


def test_the_page_has_responses_only_when_asked_for_and_as_text(tmp_path):
    finish_policy_run(policy_run(tmp_path), Logged())
    page = (tmp_path / "GELI_llama_report.html").read_text()
    assert "secret" not in page and "hello" not in page and page.count("data:image/png;base64,") == 2
    asked = policy_run(tmp_path)
    asked.arguments["log_text"] = True
    finish_policy_run(asked, Logged())
    page = (tmp_path / "GELI_llama_report.html").read_text()
    assert "&lt;b&gt;secret" in page and "human 2" in page and "human 3" not in page


def test_a_run_that_only_trains_has_a_page(tmp_path):
    run = policy_run(tmp_path, metrics={}, texts={}, steps=[{"step": 1, "score_mean": 0.1}])
    finish_policy_run(run, Logged())
    page = (tmp_path / "GELI_llama_report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "Measured" not in page
