"""Turn rewards against people's labels of single turns."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import rankdata, spearmanr
from turn_sets import trajectory

from geli.run.errors import UserError
from tools.turn_labels import centred, label_metrics, labels_of, partial_within, read_labels, within

ONES = np.ones((1, 2))
OF = np.array([0, 0, 0, 1, 1, 1])  # two conversations of three turns
PLACES = np.array([0, 1, 2, 0, 1, 2])


def test_a_small_case_by_hand():
    # The labels fall along both conversations; the second one's are higher as a whole, and so are its rewards.
    labels = np.array([1.0, 1, 0, 2, 2, 1])
    rewards = np.array([2.0, 3, 1, 12, 13, 11])
    found = {name: metric(ONES)[0] for name, metric in label_metrics(rewards, labels, PLACES, OF).items()}
    # within: rewards 0, 1, -1 and labels 1/3, 1/3, -2/3, twice; ranks 3.5, 5.5, 1.5 and 4.5, 4.5, 1.5
    assert found["label_within"] == pytest.approx(3 / np.sqrt(12))
    # place: ranks 1.5, 3.5, 5.5; with rewards -0.5, with labels -3/sqrt(12); partial (0.866 - 0.433) / (0.866 * 0.5)
    assert found["label_given_place"] == pytest.approx(1)
    assert found["label_auc"] == 1  # 12 and 13 against 1
    assert found["label_correlation"] == pytest.approx(spearmanr(rewards, labels).statistic)
    unknown = np.array([3, np.nan]), np.append(labels, [np.nan] * 2), np.append(PLACES, [3, 3]), np.append(OF, [1, 0])
    more = label_metrics(np.append(rewards, unknown[0]), *unknown[1:])
    assert {name: metric(ONES)[0] for name, metric in more.items()} == found


def test_what_is_of_the_whole_conversation_or_of_the_place_is_no_credit():
    rng = np.random.default_rng(0)
    of, places = np.repeat(np.arange(50), 8), np.tile(np.arange(8), 50)
    labels, weights = rng.normal(size=400) - places, np.ones((1, 50))
    falls = 100 * rng.normal(size=50)[of] - places + 0.01 * rng.normal(size=400)
    assert within(falls, labels, of)(weights)[0] > 0.8
    assert abs(partial_within(falls, labels, places, of)(weights)[0]) < 0.15
    assert np.isnan(partial_within(-2.0 * places, labels, places, of)(weights)[0])
    assert np.isnan(within(np.repeat(rng.normal(size=50), 8), labels, of)(weights)[0])


def test_the_partial_correlation_is_that_of_the_residuals_of_ranks():
    rng = np.random.default_rng(1)
    of, places = np.repeat(np.arange(30), 6), np.tile(np.arange(6.0), 30)
    labels = rng.integers(3, size=180).astype(float)
    rewards = labels + rng.normal(size=180) + places
    x, y, z = (rankdata(centred(values, of)) for values in (rewards, labels, places))
    left = [values - np.polyval(np.polyfit(z, values, 1), z) for values in (x, y)]
    expected = np.corrcoef(*left)[0, 1]
    assert partial_within(rewards, labels, places, of)(np.ones((1, 30)))[0] == pytest.approx(expected)


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
