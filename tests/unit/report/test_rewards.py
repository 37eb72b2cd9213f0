"""Metrics on validation turns, and the files that report them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from turn_sets import trajectory, turn_set

from data_utils import Corpus
from geli.report import plots
from geli.report.checks import conversations_seen, warn_of_leaks
from geli.report.lineage import lineage, lineage_config
from geli.report.rewards import (
    RewardRun,
    affect_means,
    choose_turns,
    evaluate,
    extreme_turns,
    finish_run,
    measured_rows,
    spearman,
    turn_table,
    wandb_validation,
)
from geli.run.errors import UserError
from models import RewardHeadConfig

# 2 and 4 agent turns; R = 80 and 40; LI targets 1, 0 and 0, 1, 0, 0
TURNS = turn_set(
    trajectory("a", 80.0, ["happiness", "neutral"]),
    trajectory("b", 40.0, ["surprise", "happiness", "neutral", "anger"]),
)
REWARDS = np.array([0.5, 0.1, 0.2, 0.4, 0.3, 0.0])

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_by_hand():
    assert evaluate(TURNS, REWARDS, np.array([70.0, 60.0])) == {
        "ge_loss": pytest.approx(250),  # (10^2 + 20^2) / 2
        # errors -0.5, 0.1 and 0.2, -0.6, 0.3, 0: means 0.13 and 0.49 / 4; over turns it would be another number
        "li_loss": pytest.approx((0.13 + 0.1225) / 2),
        "roc_auc_happy": 1,  # 0.5 and 0.4 are above all others
        "delta_li": pytest.approx(0.45 - 0.15),
        "return_correlation": pytest.approx(1),
        "reward_mean": pytest.approx((0.3 + 0.225) / 2),
        "reward_spread": pytest.approx((0.2 + 0.021875**0.5) / 2),  # 0.0725 - 0.225^2 in b
        "reward_neg_mean": 0,
        "reward_pos_mean": pytest.approx(0.45),
        "reward_neut_mean": pytest.approx(0.2),
        "reward_sup_mean": pytest.approx(0.2),
    }


def test_metrics_of_chosen_turns_by_hand():
    chosen = np.array([True, False, False, True, True, False])
    metrics = evaluate(TURNS, REWARDS, np.array([60.0, 80.0]), chosen)
    assert metrics["li_loss"] == pytest.approx((0.25 + (0.36 + 0.09) / 2) / 2)
    assert metrics["delta_li"] == pytest.approx(0.45 - 0.3) and metrics["return_correlation"] == pytest.approx(-1)
    assert "reward_neg_mean" not in metrics and "reward_sup_mean" not in metrics
    assert metrics["reward_neut_mean"] == pytest.approx(0.3)


def test_metrics_that_are_undefined_are_none():
    alone = turn_set(trajectory("a", 80.0, ["neutral", "neutral"]))
    metrics = evaluate(alone, np.array([0.1, 0.2]), np.array([70.0]))
    assert [metrics[name] for name in ("roc_auc_happy", "delta_li", "return_correlation")] == [None] * 3
    assert wandb_validation(metrics) == {
        "val/epoch_loss": 100, "val/epoch_shaped_loss": pytest.approx(0.025),
        "val_shape_epoch/epoch_running_neut_mean": pytest.approx(0.15),
    }  # fmt: skip


def test_what_needs_faces_is_measured_where_there_are_faces():
    faceless = trajectory("c", 20.0, ["neutral"] * 2, no_faces="no such file")
    mixed, returns = turn_set(*TURNS.trajectories, faceless), np.array([70.0, 60.0, 10.0])
    before, found = evaluate(TURNS, REWARDS, returns[:2]), evaluate(mixed, np.append(REWARDS, [0.9, 0.9]), returns)
    of_the_score = {"ge_loss": pytest.approx(200), "return_correlation": spearman(mixed.scores, returns)}
    of_the_rewards = {"reward_mean": pytest.approx(0.475), "reward_spread": before["reward_spread"] * 2 / 3}
    assert found == before | of_the_score | {k: pytest.approx(v) for k, v in of_the_rewards.items()}
    alone = evaluate(turn_set(faceless, faceless), np.full(4, 0.9), np.array([70.0, 60.0]))
    unknown = dict.fromkeys(["li_loss", "roc_auc_happy", "delta_li", "return_correlation"])
    assert alone == {"ge_loss": 2050, "reward_mean": 0.9, "reward_spread": 0} | unknown
    assert wandb_validation(alone) == {"val/epoch_loss": 2050}


def test_rewards_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="training has diverged; try a lower --learning_rate"):
        evaluate(TURNS, np.where(REWARDS == 0, np.nan, REWARDS), np.array([70.0, 60.0]))


def test_spearman_by_hand():
    assert spearman(np.array([1, 2, 3, 4]), np.array([1.0, 20, 3, 400])) == pytest.approx(0.8)  # 1 - 6 * 2 / 60
    assert spearman(np.array([1, 1]), np.array([1, 2])) is None


def test_affect_means_leave_out_absent_groups():
    found = affect_means(np.array([1.0, 3.0, 5.0]), np.array([4, 4, 0]), "x")  # happiness, happiness, anger
    assert found == {"x_neg_mean": 5, "x_pos_mean": 2}


def test_chosen_turns_are_k_of_each_trajectory_by_the_seed():
    turns = turn_set(*(trajectory(name, 50.0, ["neutral"] * n) for name, n in (("a", 9), ("b", 2), ("c", 9))))
    chosen = choose_turns(turns, 3, seed=0)
    assert [chosen[turns.turns_of(i)].sum() for i in range(3)] == [3, 2, 3]
    assert np.array_equal(choose_turns(turns, 3, seed=0), chosen)
    assert not np.array_equal(choose_turns(turns, 3, seed=1), chosen)


def test_wandb_gets_the_published_names():
    logged = wandb_validation(evaluate(TURNS, REWARDS, np.array([70.0, 60.0])))
    assert {"val/epoch_loss": 250, "val/roc_auc_happy": 1}.items() <= logged.items()
    assert logged["val/epoch_shaped_loss"] == pytest.approx(0.12625)
    assert {name for name in logged if "running" in name} == {
        f"val_shape_epoch/epoch_running_{name}_mean" for name in ("neg", "pos", "neut", "sup")
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_table_has_a_row_for_each_turn_and_no_text():
    table = turn_table(TURNS, REWARDS)
    assert table.columns.tolist() == [
        "conversation_id", "flip", "user_id", "agent_id", "turn_id", "start", "stop", "affect", "target", "reward"
    ]  # fmt: skip
    assert table.iloc[3].tolist() == ["b", False, "u", "v", "3", 6.0, 7.0, "happiness", 1.0, 0.4]
    assert table["reward"].tolist() == REWARDS.tolist() and table["target"].tolist() == [1, 0, 0, 1, 0, 0]
    assert "turn 1" not in table.to_csv()


class Logged:
    """A tracker that keeps what it is given."""

    name, wandb_run = "x", {"project": "p", "id": "i"}

    def __init__(self):
        self.tables, self.bars, self.summaries, self.finished, self.pictures = {}, {}, {}, False, {}
        self.logged = {"rows": [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0, "val/epoch_loss": 4.0}]}

    def log_pictures(self, pictures):
        self.pictures.update(pictures)

    def log_table(self, key, table, step):
        self.tables[key, step] = table

    def log_bars(self, key, heights):
        self.bars[key] = heights

    def summary(self, values):
        self.summaries.update(values)

    def finish(self):
        self.finished = True


VALIDATION = {"ge_loss": 250.0, "delta_li": None, "reward_mean": 0.25, "reward_spread": 0.2}


def reward_run(started_from=None, **arguments):
    corpus = Corpus([], {"broken": "no survey.csv"}, {}, {})
    defaults = {"seed": 0, "log_text": False, "bar_chart": False, "data_dir": "candor", "reward_class": "affect"}
    return RewardRun(
        title="Stage 2", stage=2, method="GELI", encoder="bart", arguments={**defaults, "seed": 3, **arguments},
        defaults=defaults, corpus=corpus, training=TURNS, validation=TURNS, rewards=REWARDS, paths=[],
        returns=np.array([70.0, 60.0]), metrics={"steps": 7, "validation": dict(VALIDATION)}, started_from=started_from,
        seconds={"reading": 1.0, "training": 3.0},
    )  # fmt: skip


def test_the_record_and_the_closing_table(tmp_path, capsys):
    tracker = Logged()
    finish_run(reward_run(), tracker, tmp_path)
    record = json.loads((tmp_path / "reward1_x.json").read_text())
    assert (record["run"], record["stage"], record["encoder"], record["seed"]) == ("x", 2, "bart", 3)
    assert record["metrics"] == {"steps": 7, "validation": VALIDATION}
    assert record["training_conversations"] == record["validation_conversations"] == ["a", "b"]
    assert record["dropped_conversations"] == {"broken": "no survey.csv"}
    assert record["versions"]["torch"] and record["data"]["dropped_conversations"] == 1
    printed = capsys.readouterr().out
    assert "Stage 2, run x" in printed and "250" in printed and printed.count(str(tmp_path)) == 1
    assert f"  {tmp_path}/\n    learning_x.png, .pdf\n" in printed and printed.endswith("    reward1_x.json\n")
    # squared errors 100 and 400, of the mean score 400 and 400; a resample may have one of the two alone
    assert record["intervals"]["ge_share"] == pytest.approx([0.625, 0.25, 1.0])
    verdict = record["verdict"]
    assert verdict.startswith("Learned in part: L_GE is no lower than") and f"\n{verdict}\nWritten:" in printed
    page = (tmp_path / "report_x.html").read_text()
    assert page.index(verdict.replace("'", "&#39;")) < page.index("<dt>data</dt>")
    assert tracker.finished and tracker.summaries.pop("verdict") == verdict
    assert tracker.summaries == {f"final/{key}": value for key, value in VALIDATION.items()}
    assert not tracker.tables and not tracker.bars


def test_validation_is_written_as_a_table_and_pictures(tmp_path):
    tracker = Logged()
    finish_run(reward_run(), tracker, tmp_path)
    table = (tmp_path / "val_turn_rewards_x.csv").read_bytes()
    assert table.splitlines()[1] == b"a,False,u,v,1,2.000000,3.000000,happiness,1.000000,0.500000"
    names = ["learning_x", "val_affects_x", "val_returns_x", "val_turn_rewards_x"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{name}.png" for name in names]
    assert sorted(path.name for path in tmp_path.glob("*.pdf")) == [f"{name}.pdf" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tracker.pictures.values())
    assert len(tracker.pictures) == 4


def test_a_corpus_without_faces_has_a_report_without_them(tmp_path):
    turns = turn_set(*(trajectory(name, 80.0, ["neutral"] * 2, no_faces="no such file") for name in "ab"))
    run = replace(reward_run(log_text=True), training=turns, validation=turns, rewards=REWARDS[:4])
    finish_run(run, Logged(), tmp_path)
    assert b"3.000000,,,0.500000" in (tmp_path / "val_turn_rewards_x.csv").read_bytes()  # neither affect nor target
    assert sorted(path.name for path in tmp_path.glob("val_*.png")) == ["val_returns_x.png", "val_turn_rewards_x.png"]
    rows = {row["metric"].split(":")[0]: row["this head"] for row in measured_rows(run)}
    assert rows.keys() == {"L_GE"}  # the scores are all the same, too
    assert {row["listener"] for row in extreme_turns(run)} == {"-"}


def test_a_corpus_without_faces_is_measured_by_the_signal_that_is_used(tmp_path, capsys):
    turns = turn_set(*(trajectory(name, 80.0, ["neutral"] * 2, no_faces="no such file") for name in "abc"))
    turns = replace(turns, targets=np.array([1, 0, 1, 0, 0, -1], dtype=np.float32))  # as of what the user says next
    run = replace(reward_run(), training=turns, validation=turns, rewards=np.array([0.6, 0.1, 0.5, 0.2, 0.2, 0.1]))
    run = replace(run, method="LI", returns=np.array([70.0, 60.0, 50.0]))
    finish_run(run, Logged(), tmp_path)
    assert (tmp_path / "val_affects_x.png").is_file() and "delta_li" not in capsys.readouterr().out
    rows = {row["metric"]: row["this head"] for row in measured_rows(run)}
    assert rows["rank correlation of turn reward and LI target"].startswith("0.890")
    assert "L_LI as a share of the mean target's" in rows and not any("happy" in name for name in rows)
    assert run.verdict.startswith("Learned: ") and "LI's targets are followed better than by chance" in run.verdict
    names, _, what = plots.reactions(turn_table(turns, run.rewards))
    assert names.tolist() == ["pleased", "neither", "pleased", "neither", "neither", "displeased"]
    assert what == "the user's reaction, by LI's target"


def test_the_page_tells_the_run_without_text(tmp_path):
    finish_run(reward_run(), Logged(), tmp_path)
    page = (tmp_path / "report_x.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page
    for words in ("Stage 2: run x", "250.0", "no survey.csv", "training", "75%", "<td>--seed</td>"):
        assert words in page, words
    assert "turn 1" not in page


def test_the_page_has_text_only_when_asked_for_and_as_text(tmp_path):
    run = reward_run(log_text=True)
    run.validation.texts[0] = ("", "AI: <script>alert(1)</script>")
    try:
        finish_run(run, Logged(), tmp_path)
    finally:
        run.validation.texts[0] = ("", "AI: a turn 1")
    page = (tmp_path / "report_x.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert (tmp_path / "report_x.html").stat().st_mode & 0o077 == 0


def test_a_page_leads_to_the_run_that_it_started_from(tmp_path):
    finish_run(reward_run(), Logged(), tmp_path / "stage 1")
    head = tmp_path / "stage 1" / "reward1_x"
    finish_run(reward_run(started_from=head), Logged(), tmp_path / "two")
    page = (tmp_path / "two" / "report_x.html").read_text()
    assert '<a href="../stage%201/report_x.html">stage 2: run x</a>' in page
    assert [a.run for a in lineage(tmp_path / "two" / "reward1_x")] == ["x", "x"]
    assert lineage_config(head) == {"stage_2_run": "x", "stage_2_wandb_project": "p", "stage_2_wandb_id": "i"}
    assert lineage(tmp_path / "nowhere" / "reward1_x") == [] == lineage(None)


def test_text_and_bar_charts_are_logged_only_when_asked_for(tmp_path):
    tracker = Logged()
    finish_run(reward_run(log_text=True, bar_chart=True), tracker, tmp_path)
    assert tracker.tables["val/turns", 8]["response"].tolist()[0] == "AI: a turn 1"
    assert tracker.bars == {
        "val/rewards_by_turn_1": {1: 0.5, 2: 0.1},
        "val/rewards_by_turn_2": {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.0},
    }


# ---------------------------------------------------------------------------------------------------------------------
# What an earlier stage was trained on


def test_conversations_seen_are_those_of_the_head_and_of_its_encoder(tmp_path, capsys):
    config = RewardHeadConfig("default", 4, "../s/lang_model_li", True, 9, 2, 2, None)
    path = tmp_path / "g" / "reward1_ge"
    for name, conversations in (("g/reward1_ge", ["a", "c"]), ("s/reward1_li", ["d"])):
        (tmp_path / name).parent.mkdir()
        record = {"metrics": {"steps": 1}, "training_conversations": conversations}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert conversations_seen(path, config) == {"a", "c", "d"}
    assert conversations_seen(path, replace(config, encoder="org/name", encoder_is_folder=False)) == {"a", "c"}
    (tmp_path / "s/reward1_li.json").write_text(json.dumps({"metrics": {}, "training_conversations": ["d"]}))
    assert conversations_seen(path, config) == {"a", "c"}  # that run only evaluated
    warn_of_leaks(frozenset({"c"}), TURNS.trajectories)
    assert capsys.readouterr().out == ""
    warn_of_leaks(frozenset({"a", "c"}), TURNS.trajectories)
    assert capsys.readouterr().out.startswith("Warning: 1 of this run's validation conversations were trained on")
    (tmp_path / "s/reward1_li.json").write_text('{"metrics": []}')
    with pytest.raises(UserError, match="expected the record of a run"):
        conversations_seen(path, config)


def test_conversations_seen_are_those_of_every_head_that_training_started_from(tmp_path):
    """As after `--affect_path li --unfreeze`: the encoder has the run's own name, and no stage-1 run has it."""
    config = RewardHeadConfig("default", 4, "lang_model_geli", True, 9, 2, 2, None)
    started = {"g/reward1_geli": "../s/reward1_li", "s/reward1_li": "../s/reward1_first"}
    for (name, before), conversation in zip([*started.items(), ("s/reward1_first", None)], "abc", strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        record = {"metrics": {"steps": 1}, "training_conversations": [conversation], "started_from": before}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    path = tmp_path / "g" / "reward1_geli"
    assert conversations_seen(path, config) == {"a", "b", "c"}
    (tmp_path / "s/reward1_first.json").write_text('{"started_from": "../g/reward1_geli"}')  # a circle
    assert conversations_seen(path, config) == {"a", "b"}
    (tmp_path / "s/reward1_first.json").write_text('{"started_from": 3}')
    with pytest.raises(UserError, match=r"expected the record of a run, with its .* started_from"):
        conversations_seen(path, config)
