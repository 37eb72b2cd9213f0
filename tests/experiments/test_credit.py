"""The comparison with people's labels: shares by hand, the readers, and the whole command on a few made-up chats."""

import json

import numpy as np
import pytest
from conftest import call_script

from experiments.credit import agreement, shared_out, split
from experiments.credit_data import Chat, inputs, read_casino, read_dstc9


def test_shares_by_hindsight_sum_to_the_score():
    # a chat rated 60 of three turns, of which the last got no answer, and one rated 20 of one turn
    witness, of = np.array([70.0, 50.0, np.nan, 30.0]), np.array([0, 0, 0, 1])
    shares = shared_out(witness, of, np.array([60.0, 20.0]))
    assert shares == pytest.approx([70, 50, 60, 20])  # T times the shares: their means are the scores


def test_conversations_with_labels_are_in_no_training():
    chats = [Chat(f"c{i // 2}", [(True, "a")], 50.0, labels={0: 1} if i == 6 else {}) for i in range(60)]
    parts = split(chats)
    assert list(np.flatnonzero(parts == 2)) == [6, 7]  # both sides of the conversation
    assert 0 < (parts == 1).sum() <= 6 and all(parts[::2] == parts[1::2])


def test_raters_that_do_not_agree_bound_what_a_return_can_find():
    chats = [Chat("a", [], 0.0, [1, 1]), Chat("b", [], 0.0, [3, 3]), Chat("c", [], 0.0, [2, 2])]
    assert "correlate 1.000" in agreement(chats)
    chats = [Chat("a", [], 0.0, [1, 2]), Chat("b", [], 0.0, [2, 1])]
    assert "above 0.00" in agreement(chats)


def test_casino_is_read_from_both_sides(tmp_path):
    liked = {"mturk_agent_1": "Slightly like", "mturk_agent_2": "Extremely dislike"}
    said = [("mturk_agent_1", "Hi!"), ("mturk_agent_2", "I need all water."), ("mturk_agent_1", "Submit-Deal")]
    dialogue = {
        "dialogue_id": 7,
        "chat_logs": [{"id": who, "text": text} for who, text in said],
        "participant_info": {who: {"outcomes": {"opponent_likeness": level}} for who, level in liked.items()},
        "annotations": [["Hi!", "small-talk"], ["I need all water.", "self-need,non-strategic"]],
    }
    (tmp_path / "casino_test.json").write_text(json.dumps([dialogue]))
    second, first = sorted(read_casino(tmp_path), key=lambda chat: chat.turns[0][0])
    assert (first.score, first.labels, first.turns) == (0, {0: 1}, [(True, "Hi!"), (False, "I need all water.")])
    assert (second.score, second.labels, second.agent_turns) == (75, {1: 0}, [1])
    assert inputs(second, 0) == [("", "I need all water.")]
    assert inputs(second, 1) == [(" User: Hi!", "AI: I need all water.")]


@pytest.fixture
def chats_file(tmp_path):
    """Thirty chats, in which `fine` under a turn goes with a high rating; a third have labels."""
    rng, lines = np.random.default_rng(0), []
    for i in range(30):
        good, messages = rng.integers(2, size=6), []
        for kind in good:
            messages.append({"role": "assistant", "content": "how nice" if kind else "what is that"})
            messages[-1] |= {"turn_rating": int(2 * kind)} if i % 3 == 0 else {}
            messages.append({"role": "user", "content": "fine" if kind else "no"})
        ratings = [1 + 4 * good.mean()] * 2
        lines.append(json.dumps({"id": f"c{i}", "ratings": ratings, "messages": messages}))
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_the_command_finds_credit_where_there_is_some_and_does_not_train_twice(chats_file, tiny, tmp_path):
    assert read_dstc9(chats_file)[0].labels.keys() == {0, 2, 4, 6, 8, 10}
    out = tmp_path / "out"
    arguments = [out, "--dstc9", chats_file, "--encoder", tiny / "bart", "--contexts", 0, "--seeds", 0, 1]
    printed = call_script("experiments/credit.py", *arguments, "--repetitions", 20).stdout
    rows = {line.split(" | ")[1]: line.split(" | ") for line in printed.splitlines() if line.startswith("| DSTC9")}
    assert len(rows) == 12 + 12 + 2 + 1 + 8
    assert float(rows["ridge on hindsight"][5].split()[0]) > 0.9
    assert rows["the turn's place"][5].startswith("-")  # not defined
    before = {path: path.stat().st_mtime_ns for path in (out / "rewards").iterdir()}
    assert len(before) == 24
    call_script("experiments/credit.py", *arguments, "--repetitions", 20)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "rewards").iterdir()}
