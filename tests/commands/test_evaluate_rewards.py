"""tools/evaluate_rewards.py on heads that were trained here."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import call_script

from data_utils import DataOptions, TurnSet
from geli.run.errors import UserError
from tools.saved_heads import Evaluation, Predictions, compare, truth_of


@pytest.fixture(scope="module")
def evaluated(sample, tiny, tmp_path_factory):
    """The folder of three runs, two of which differ by their seed, and what measuring them printed."""
    out = tmp_path_factory.mktemp("evaluated")
    common = ["--data_dir", sample, "--output_dir", out, "--lang_model_path", tiny / "bart", "--context_turns", 2]
    common += ["--small_model_shrink", "--val", "--epochs", 1, "--learning_rate", 1e-3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        call_script("train_reward_LI_only.py", *common, "--run_name", "li")
        for seed in (0, 1):
            more = ("--train", "--seed", seed, "--run_name", f"ge-{seed}")
            call_script("train_reward_GELI.py", *common, *more)
    arguments = ["--data_dir", sample, "--output_dir", out, "--repetitions", 50]
    return out, call_script("tools/evaluate_rewards.py", "GE=ge-0,ge-1", "li", *arguments), arguments


def test_the_table_agrees_with_what_the_runs_measured_themselves(evaluated):
    out, printed, _ = evaluated
    table = pd.read_csv(out / "rewards.csv").set_index(["reward", "metric"])
    assert table.index.levels[0].tolist() == ["GE", "li", "mean", "mode"]
    records = [json.loads(next(out.glob(f"*/reward1_{run}.json")).read_text()) for run in ("ge-0", "ge-1", "li")]
    ge_0, ge_1, li = (record["metrics"]["validation"] for record in records)
    names = {"ge_loss": "ge_loss", "delta_li": "delta_li", "roc_auc": "roc_auc_happy"}
    for ours, theirs in names.items():
        assert table.loc[("li", ours), "value"] == pytest.approx(li[theirs], rel=1e-4)
        both = [ge_0[theirs], ge_1[theirs]]
        assert table.loc[("GE", ours), "value"] == pytest.approx(np.mean(both), rel=1e-4)
        assert table.loc[("GE", ours), "spread_over_seeds"] == pytest.approx(np.std(both, ddof=1), rel=1e-3)
    assert table.loc[("mean", "ge_loss"), "value"] == pytest.approx(ge_0["ge_loss_of_training_mean"], rel=1e-5)
    assert table.loc[("mean", "ge_share"), "value"] == 1 and table.loc[("mean", "roc_auc"), "value"] == 0.5
    assert (table.loc["GE", "difference"]).isna().all() and table.loc["GE", "seeds"].tolist() == [2] * 7
    assert "truth_correlation" in table.loc["li"].index  # of the sample's truth.csv
    assert "Difference from GE" in printed.stdout and str(out / "rewards.tex") in printed.stdout


def test_the_table_is_also_json_markdown_and_latex(evaluated):
    out, _, _ = evaluated
    content = json.loads((out / "rewards.json").read_text())
    assert len(content["validation_conversations"]) == 4 and len(content["heads"]["GE"]) == 2
    assert len(content["rows"]) == 4 * 7
    markdown, latex = (out / "rewards.md").read_text(), (out / "rewards.tex").read_text()
    assert "| reward | L_GE |" in markdown and r"\toprule" in latex and r"\mathcal{L}_{GE}\downarrow" in latex
    assert latex.count(r"\\") == 1 + 4


def test_measuring_twice_gives_the_same(evaluated):
    out, printed, arguments = evaluated
    again = call_script("tools/evaluate_rewards.py", "GE=ge-0,ge-1", "li", *arguments, "--name", "again")
    assert (out / "again.csv").read_bytes() == (out / "rewards.csv").read_bytes()
    other = call_script("tools/evaluate_rewards.py", "GE=ge-0,ge-1", "li", *arguments, "--name", "other", "--seed", 1)
    assert again.stdout.split("Written")[0] == printed.stdout.split("Written")[0] != other.stdout.split("Written")[0]


def test_conversations_that_a_head_was_trained_on_are_warned_of(evaluated, monkeypatch):
    out, printed, arguments = evaluated
    assert "Warning" not in printed.stdout
    held_out = json.loads((out / "rewards.json").read_text())["validation_conversations"]
    monkeypatch.setattr("tools.saved_heads.conversations_seen", lambda *_: frozenset(held_out[:1]))
    warned = call_script("tools/evaluate_rewards.py", "li", *arguments, "--name", "warned").stdout
    assert "Warning: 1 of this run's validation conversations were trained on before" in warned


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "missing: expected a run name or the path of a reward1_ file"),
        (["a=li", "a=ge-0"], "a: two rows of the table have this name"),
        (["li", "--reward_class", "you_are_funny"], "was trained for overall_affect, others for you_are_funny"),
        (["li", "--lang_model_path", "x"], "--lang_model_path is for published heads, and all of these record their"),
        (["li", "--truth", "nowhere.csv"], "--truth nowhere.csv: expected a CSV file"),
    ],
)
def test_mistakes_are_answered_in_one_line(evaluated, words, message):
    _, _, arguments = evaluated
    printed = call_script("tools/evaluate_rewards.py", *words, *arguments, check=2)
    assert message in printed.stderr and printed.stderr.count("\n") == 1


def test_a_truth_that_misses_turns_is_refused(sample, tmp_path):
    pd.read_csv(sample / "truth.csv").head(3).to_csv(tmp_path / "truth.csv", index=False)
    some = Evaluation.of(DataOptions(str(sample)), [], cache=None, val_all=False, truth=tmp_path / "truth.csv")
    with pytest.raises(UserError, match=r"has no hidden reward for \d+ of the \d+ validation turns"):
        compare(some, {})


def test_differences_are_paired(sample):
    """A head that is another's with every return ten points higher: the difference of their errors has no noise."""
    evaluation = Evaluation.of(DataOptions(str(sample)), [], cache=None, val_all=False, truth=sample / "truth.csv")
    scores = np.array([t.score for t in evaluation.validation])
    rewards = truth_of(TurnSet.from_trajectories(evaluation.validation, 1), evaluation.truth)
    of = {name: [Predictions(rewards, scores + shift)] for name, shift in (("exact", 10.0), ("off", 20.0))}
    rows = {(row.setting, row.metric): row for row in compare(evaluation, of)}
    assert rows["off", "ge_loss"].difference == pytest.approx((300, 300, 300))  # 20² - 10²
    assert rows["exact", "truth_correlation"].value == pytest.approx((1, 1, 1))
    assert rows["off", "truth_correlation"].difference == pytest.approx((0, 0, 0))
