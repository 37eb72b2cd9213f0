"""Turn rewards against people's labels of single turns."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score
from turn_sets import trajectory

from geli.run.errors import UserError
from tools.turn_labels import label_metrics, labels_of, read_labels


def measured(labels, rewards, lengths):
    """The metrics of some conversations' turns."""
    trajectories = [trajectory(str(i), 50.0, ["neutral"] * n) for i, n in enumerate(lengths)]
    of = np.repeat(np.arange(len(lengths)), lengths)
    found = label_metrics(np.array(labels, dtype=float), np.array(rewards), trajectories, of)
    return {name: metric(np.ones((1, len(lengths))))[0] for name, metric in found.items()}


def test_by_hand():
    # two conversations: the first one's labels and rewards have one order, the second one's the opposite one
    found = measured([0, 1, 2, 2, 0], [0.1, 0.2, 0.3, -1.0, -0.5], [3, 2])
    # ranks/n in the middle: ±1/3 and 0, ±1/4: (2/9 - 1/8) / (2/9 + 1/8)
    assert found["label_within"] == pytest.approx((2 / 9 - 1 / 8) / (2 / 9 + 1 / 8))
    assert found["label_auc"] == pytest.approx(2 / 4)  # of 2 (0.3, -1) against 0 (0.1, -0.5): 0.3 beats both
    assert found["label_correlation"] == pytest.approx(
        spearmanr([0, 1, 2, 2, 0], [0.1, 0.2, 0.3, -1.0, -0.5]).statistic
    )


def test_what_only_follows_the_place_or_the_conversation_has_no_credit():
    rng = np.random.default_rng(0)
    place = np.tile(np.arange(10.0), 200)
    labels = rng.random(2000) - 0.1 * place
    found = measured(labels, -0.1 * place + 0.4 * rng.random(2000), [10] * 200)
    assert found["label_within"] > 0.5 and abs(found["label_given_place"]) < 0.08
    of_conversation = np.repeat(rng.random(200), 10)
    found = measured(labels + of_conversation, of_conversation, [10] * 200)
    assert found["label_correlation"] > 0.3 and np.isnan(found["label_within"])
    assert np.isnan(measured(labels, place, [10] * 200)["label_given_place"])


def test_against_scipy_and_scikit_learn_and_resamples_count_conversations():
    rng = np.random.default_rng(1)
    lengths = [4, 7, 1, 5]
    labels, rewards = rng.integers(0, 3, 17).astype(float), rng.random(17)
    labels[[2, 9]] = np.nan
    known, of = ~np.isnan(labels), np.repeat(np.arange(4), lengths)
    found = measured(labels, rewards, lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    parts = [known & (of == i) for i in range(4)]
    x, y, z = (
        np.concatenate([rankdata(v[p]) / p.sum() - np.mean(rankdata(v[p]) / p.sum()) for p in parts])
        for v in (labels, rewards, place)
    )
    residuals = [v - z * (v @ z) / (z @ z) for v in (x, y)]
    assert found["label_within"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["label_given_place"] == pytest.approx(np.corrcoef(*residuals)[0, 1])
    extreme = known & (labels != 1)
    assert found["label_auc"] == pytest.approx(roc_auc_score(labels[extreme] == 2, rewards[extreme]))
    trajectories = [trajectory(str(i), 50.0, ["neutral"] * n) for i, n in enumerate(lengths)]
    twice = label_metrics(labels, rewards, trajectories, of)["label_within"](np.array([[1, 2, 0, 1]]))
    again = np.concatenate([np.flatnonzero(p) for p in (parts[0], parts[1], parts[1], parts[3])])
    order = {place: i for i, place in enumerate(np.flatnonzero(known))}
    rows = [order[i] for i in again]
    assert twice[0] == pytest.approx((x[rows] @ y[rows]) / np.sqrt((x[rows] @ x[rows]) * (y[rows] @ y[rows])))


def test_labels_are_read_from_a_table_or_chats(tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "turn_rating": 2}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"id": "a", "messages": said}))
    (tmp_path / "labels.csv").write_text("conversation_id,turn_id,label,more\na,1,2,x\nb,0,,y\n")
    assert read_labels(tmp_path / "chats.jsonl") == read_labels(tmp_path / "labels.csv") == {("a", "1"): 2.0}
    (tmp_path / "labels.csv").write_text("conversation_id,turn\na,1\n")
    with pytest.raises(UserError, match="expected a CSV file with conversation_id, turn_id, label"):
        read_labels(tmp_path / "labels.csv")
    found = trajectory("a", 50.0, ["neutral", "neutral"])
    second = found.conversation.turns[found.agent_turns[1]].turn_id
    assert labels_of([found], {("a", second): 1.0}) == pytest.approx([np.nan, 1.0], nan_ok=True)
    assert np.isnan(labels_of([found], None)).all()


def test_no_training_reads_the_labels():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("geli/**/*.py")]
    assert len(sources) > 30
    assert not [path.name for path in sources if re.search(r"\.rating\b", path.read_text())]
    assert [path.name for path in sources if "turn_rating" in path.read_text()] == ["chats.py"]
