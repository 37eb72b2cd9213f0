"""What users' next turns say about scores: by hand, and that no target knows its own conversation's score."""

import numpy as np
import pytest

from data_utils import DataOptions, SignalOptions, TurnSet, load_turns, read_corpus, split
from geli.data.hindsight import hindsight

WORDS = ("good", "bad")


def heard(n: int, start: int = 0):
    """Conversations of one answer that says what the score is; two for every one, each rated by a side."""
    return [(f"c{start + i}", 90.0 - 80 * side, [WORDS[side]]) for i in range(n) for side in (0, 1)]


def test_answers_by_hand():
    training = heard(10)
    new = [("new", 0.0, ["good", "", "bad", "good"])]
    points, ranks = hindsight(new, training)
    assert np.isnan(points[1]) and points[0] == points[3] > 50 > points[2] and points[0] + points[2] == 100
    assert ranks == pytest.approx([0.75, np.nan, 0.25, 0.75], nan_ok=True)  # half of the training answers are equal
    assert np.array_equal(hindsight(training, training)[1], [0.75, 0.25] * 10)


def test_no_target_knows_a_score_of_its_own_conversation():
    rng = np.random.default_rng(0)
    training = [(name, score + rng.normal(), said) for name, score, said in heard(20)]
    before = hindsight(training, training)
    for place in (0, 7):  # both trajectories of a conversation
        both = slice(2 * place, 2 * place + 2)
        changed = [(one[0], 5.0, one[2]) if one in training[both] else one for one in training]
        after = hindsight(changed, changed)
        same = [np.array_equal(a[both], b[both]) for a, b in zip(before, after, strict=True)]
        assert same == [True, True] and (after[0] != before[0]).any()
    shuffled = [training[i] for i in rng.permutation(len(training))]
    assert np.sort(hindsight(shuffled, shuffled)[0]) == pytest.approx(np.sort(before[0]))


def test_validation_changes_no_model():
    training, validation = heard(10), heard(3, start=10)
    found = hindsight(validation, training)
    others = [(name, 7.0, said) for name, _, said in validation]
    assert np.array_equal(found, hindsight(others, training))
    assert np.array_equal(found[:, :2], hindsight(validation[:2], training))


def test_too_few_conversations_give_no_targets(capsys):
    silent = ("silent", 50.0, ["", ""])
    assert np.isnan(hindsight(heard(4), [*heard(4), silent])).all()
    assert "needs 5 training conversations in which users answer, found 4: no targets" in capsys.readouterr().out
    assert np.isnan(hindsight([silent], heard(5))).all() and hindsight([], heard(5)).shape == (2, 0)


def test_targets_of_the_signal(sample, capsys):
    data = DataOptions(str(sample), context_turns=1)
    _, training, validation = load_turns(data, SignalOptions("hindsight"), cache=None, validate=True)
    assert capsys.readouterr().out.count("have not seen: r = 0.") == 2
    assert np.array_equal(np.isnan(training.targets), ~training.known) and training.known.mean() > 0.8
    assert set(training.targets[training.known]) == {0, 1} and set(training.labels) == {0, 1, 2}
    assert 0.4 < np.nanmean(training.targets) < 0.6 and 0.3 < np.nanmean(validation.targets) < 0.7

    parts = split(read_corpus(sample, "overall_affect"), 500)

    def targets(**more):
        signal = SignalOptions("hindsight", **more)
        return TurnSet.from_trajectories(parts[1], 1, signal, training=parts[0]).targets

    signs, ranks = targets(negative_affect="negative"), targets(reaction_type="mean")
    known = validation.known
    assert np.array_equal(signs[known], np.sign(ranks[known] - 0.5)) and 0 <= np.nanmin(ranks) < 0.1
    assert (targets(reaction_type="mean", unknown_reaction="neutral")[~known] == 0.5).all()
    assert (targets(unknown_reaction="neutral")[~known] == 0).all()
