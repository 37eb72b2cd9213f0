"""Which pairs are judged, and how a conversation is shown."""

import pytest
from judged_responses import INSTRUCTION, write_responses

from apps.judge.pairs import CRITERIA, conversation_of, read_pairs
from geli.run.errors import UserError


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (f"{INSTRUCTION} User: Hi,  you!  AI: Hello. AI:", "User: Hi, you!\nAI: Hello."),
        (f"{INSTRUCTION} AI:", ""),  # the conversation begins with the response
        (f"{INSTRUCTION} User: two\nlines AI:", "User: two lines"),
        ("User: my SuperUser: account AI:", "User: my SuperUser: account"),
        (" no turns\nare marked ", "no turns\nare marked"),
    ],
)
def test_a_conversation_is_its_turns(prompt, shown):
    assert conversation_of(prompt) == shown


def test_there_are_the_papers_eight_criteria():
    assert len(CRITERIA) == len(set(CRITERIA.values())) == 8


def test_prompts_are_drawn_by_the_seed_and_stay_in_order(tmp_path):
    path = write_responses(tmp_path / "r.csv", 40)
    drawn = read_pairs(path, ["tuned", "human"], 10, seed=1)
    assert drawn == read_pairs(path, ["tuned", "human"], 10, seed=1) != read_pairs(path, ["tuned", "human"], 10, seed=2)
    rows = [pair.row for pair in drawn]
    assert rows == sorted(set(rows)) and len(rows) == 10
    assert (drawn[0].first, drawn[0].second) == (f"after, {rows[0]}", f"person of {rows[0]}")


def test_texts_stay_as_they_are_but_for_spaces_around_them(tmp_path):
    path = write_responses(tmp_path / "r.csv", 1, tuned=' "None",\n=1 ', base="nan")
    pair = read_pairs(path, ["tuned", "base"], 1, seed=0)[0]
    assert (pair.first, pair.second) == ('"None",\n=1', "nan")


@pytest.mark.parametrize(
    ("compare", "number", "message"),
    [
        (["tuned", "tuned"], 2, "--compare tuned tuned: two different columns"),
        (["prompt", "tuned"], 2, "two different columns of responses"),
        (["tuned", "grpo"], 2, "among them 'grpo', found ['prompt', 'human', 'base', 'tuned']"),
        (["tuned", "base"], 4, "expected at least 4 prompts, found 3; give --prompts 3"),
    ],
)
def test_mistakes_are_named(tmp_path, compare, number, message):
    path = write_responses(tmp_path / "r.csv", 3)
    with pytest.raises(UserError) as error:
        read_pairs(path, compare, number, seed=0)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"prompt,tuned,base\na,b\n", b'prompt,tuned,base\n"a,b', b""])
def test_what_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.csv: "):
        read_pairs(tmp_path / "r.csv", ["tuned", "base"], 1, seed=0)
