"""What a judge is asked, what is read from its replies, and what its answers in both orders come to."""

import json

import numpy as np
import pytest

from apps.judge.pairs import CRITERIA, Pair
from apps.judge.server import make_questions, parse_reply, read_answers, votes_of

PAIR = Pair(3, "User: hi", "first one", "second one")
ANSWERS = ["A", "B", "tie", "A", "A", "B", "tie", "B"]
OBJECT = json.dumps({str(number): answer for number, answer in enumerate(ANSWERS, start=1)})
LINES = "\n".join(f"{number}: {answer}" for number, answer in enumerate(ANSWERS, start=1))


@pytest.mark.parametrize(
    "reply",
    [
        OBJECT,
        f"Here it is:\n```json\n{OBJECT}\n```\nI hope this helps {{really}}.",
        f"<think>1: B, {OBJECT.replace('A', 'B')}</think>{OBJECT}",
        f"First {OBJECT.replace('A', 'B')}, but rather {OBJECT}",
        json.dumps({"answers": json.loads(OBJECT)}),
        json.dumps({"reason": "{", **json.loads(OBJECT)}, indent=2),
        OBJECT.replace('"A"', '"Response a"').replace("tie", "Tie."),
        LINES,
        LINES.replace(": ", ") **").replace("\n", "**\n"),
        f"My answers\n- {LINES}".replace("\n", "\n- "),
    ],
)
def test_answers_are_found_in_replies(reply):
    assert parse_reply(reply) == ANSWERS


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Response A is the better one in every respect.",
        "{" * 50,
        "[1, 2]",
        LINES.rpartition("\n")[0],  # seven of eight
        LINES.replace("1: A", "1: A bit of both"),
        OBJECT.replace('"tie"', '"C"'),
        OBJECT.replace('"A"', "null"),
        f"{OBJECT[:-5]}",
    ],
)
def test_replies_without_every_answer_are_unparsed(reply):
    assert parse_reply(reply) is None


def test_a_pair_is_asked_about_in_both_orders():
    first, second = make_questions([PAIR], "model")
    assert first.text.index("first one") < first.text.index("second one")
    assert second.text.index("second one") < second.text.index("first one")
    assert all(question in first.text for question in CRITERIA.values())
    same = make_questions([PAIR._replace(second="first one")], "model")
    assert same[0].text == same[1].text and same[0].key != same[1].key
    assert {q.key for q in make_questions([PAIR], "model")} == {first.key, second.key}
    assert not {q.key for q in make_questions([PAIR], "other")} & {first.key, second.key}


@pytest.mark.parametrize(
    ("forward", "backward", "vote", "flipped"),
    [
        ("A", "B", 1, 0),  # the first response in both orders
        ("B", "A", -1, 0),
        ("tie", "tie", 0, 0),
        ("A", "A", 0, 1),  # the left response in both orders
        ("B", "B", 0, 1),
        ("A", "tie", 0, 1),
        ("A", None, np.nan, np.nan),
        (None, None, np.nan, np.nan),
    ],
)
def test_a_vote_counts_if_both_orders_give_it(forward, backward, vote, flipped):
    questions = make_questions([PAIR, PAIR._replace(conversation="another")], "model")
    found = [answer and [answer] * 8 for answer in (forward, backward, "A", "B")]
    votes, flips = votes_of(questions, {question.key: f for question, f in zip(questions, found, strict=True)})
    assert np.array_equal(votes, [[vote] * 8, [1] * 8], equal_nan=True)
    assert np.array_equal(flips, [[flipped] * 8, [0] * 8], equal_nan=True)


def test_answers_on_disk_survive_a_torn_line(tmp_path):
    first, last = (json.dumps({"key": key, "answers": ANSWERS}) for key in "ac")
    (tmp_path / "a.jsonl").write_text(f'\n{first}\n\n{{"key": "b", "answ\n{last}\n7\n')
    assert read_answers(tmp_path / "a.jsonl") == {"a": ANSWERS, "c": ANSWERS}
    assert read_answers(tmp_path / "none.jsonl") == {}
