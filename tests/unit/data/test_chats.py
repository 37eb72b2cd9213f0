"""Rated chats in JSONL: what a line becomes, what is dropped, and the corpus that they are."""

import gzip
import json

import numpy as np
import pytest
from cases import case
from conftest import ROOT

from data_utils import DataOptions, SignalOptions, TurnSet, load_turns, read_corpus, split
from geli.data import corpus as corpus_module
from geli.data.chats import ChatFiles, _chat
from geli.data.corpus import read_conversations
from geli.run.errors import UserError

HEADER = {"format": "rated-chats", "rating_range": [1, 5]}
SAID = [
    ("system", "Be kind."),
    ("user", "I lost my job."),
    ("assistant", "<think>sad</think>I am sorry."),
    ("user", "Ok"),
]
DSTC9 = ROOT.parent / "shared" / "data" / "dstc9" / "chats.jsonl"


def chat(name="a", said=SAID, **more) -> dict:
    return {"id": name, "messages": [{"role": role, "content": text} for role, text in said], "rating": 4} | more


def with_message(**more) -> dict:
    changed = chat()
    changed["messages"][2] |= more
    return changed


def write(path, *lines, header=HEADER):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in (header, *lines) if line is not None]
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path, *lines, rated=True, **more):
    """(file:line, chat or reason) of a file with these lines."""
    return list(ChatFiles([write(path, *lines, **more)], rated=rated).chats())


@pytest.fixture
def file(tmp_path):
    return tmp_path / "chats.jsonl"


def test_a_chat_by_hand(file):
    timed = with_message(reaction="👍🏽", turn_rating=2, time=107.5)
    for message, time in ((1, 100), (3, 108)):
        timed["messages"][message]["time"] = time
    ((place, found),) = read(file, timed)
    assert place == "chats.jsonl:2" and found.id == "a" and found.speakers == ("user", "assistant")
    # 4, 3 and 1 words at 2.5 a second, but a turn ends where the next one begins
    assert [turn[:6] for turn in found.turns] == [
        ("1", "user", 0.0, 1.6, "I lost my job.", 4),
        ("2", "assistant", 7.5, 8.0, "I am sorry.", 3),
        ("3", "user", 8.0, 8.4, "Ok", 1),
    ]
    assert [(turn.reaction, turn.rating) for turn in found.turns] == [(None, None), (1, 2.0), (None, None)]
    assert found.answers == {"user": {"overall_affect": 7.5}}  # 4 of 1 to 5 is 75 points, of which 10 are one unit
    assert found.no_faces and found.unseen == (0, 1, 2)


def test_times_may_be_iso_or_missing(file):
    iso = chat(said=SAID[1:])
    for message, time in zip(
        iso["messages"], ("2026-01-31T12:00:00Z", "2026-01-31T13:00:10+01:00", "2026-01-31 12:01"), strict=True
    ):
        message["time"] = time
    (_, found), (_, estimated) = read(file, iso, chat("b", SAID[1:]))
    assert [turn.start for turn in found.turns] == [0, 10, 60]
    assert [turn.start for turn in estimated.turns] == pytest.approx([0, 1.6 + 0.5, 2.1 + 1.2 + 0.5])


NAMED = [("ana", "Hello."), ("ben", "Hi there.")]


@pytest.mark.parametrize(
    ("line", "points"),
    [
        (chat(rating=1), {"user": {"overall_affect": 0}}),
        (chat(rating=[4, 5, 4]), {"user": {"overall_affect": 100 * (13 / 3 - 1) / 4}}),
        (chat(rating=None, ratings=[5]), {"user": {"overall_affect": 100}}),
        (chat(rating=None, ratings={"i_like_you": 2, "good_for_advice": [3, 4]}),
         {"user": {"i_like_you": 25, "good_for_advice": 62.5}}),
        (chat(rating=None, ratings={"assistant": 3}), {"assistant": {"overall_affect": 50}}),
        (chat(said=NAMED, rating=None, ratings={"ana": 5, "ben": {"i_like_you": 1}, "zoe": 3}),
         {"ana": {"overall_affect": 100}, "ben": {"i_like_you": 0}}),
    ],
)  # fmt: skip
def test_ratings_are_points_of_the_range_by_question_and_by_name(line, points, file):
    ((_, found),) = read(file, line)
    read_corpus(file, next(iter(found.questions)))
    for name, of_name in points.items():
        for question, expected in of_name.items():
            trajectories = read_corpus(file, question).trajectories["a"]
            assert {t.user: t.score for t in trajectories}[name] == pytest.approx(expected, abs=1e-9)
    assert {name: set(given) for name, given in found.answers.items()} == {n: set(p) for n, p in points.items()}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (chat(rating=None), "no rating"),
        (chat(ratings=[3]), "both rating and ratings"),
        (chat(rating=6), "rating [6]: expected numbers from 1 to 5"),
        (chat(rating=[4, None]), "rating [4, None]: expected numbers from 1 to 5"),
        (chat(rating="4"), "rating ['4']: expected"),
        (chat(rating=True), "rating [True]: expected"),
        (json.dumps(chat()).replace('"rating": 4', '"rating": NaN'), "not JSON"),
        (json.dumps(chat()).replace('"rating": 4', '"rating": 1e400'), "rating [inf]: expected"),
        (chat(rating=None, ratings={"helpful": 4}), "ratings of helpful: expected a speaker's name, or one of you_are"),
        (chat(said=NAMED), "a rating of nobody who speaks: expected ratings by name"),
        (chat(said=[*NAMED, ("zoe", "Me too.")]), "2 speakers are expected, 3 found: ana, ben, zoe"),
        (chat(said=SAID[:2]), "2 speakers are expected, 1 found: user"),
        (with_message(reaction=0), "message 2: reaction 0: expected one of 1 -1 👍"),
        (with_message(reaction="🤷"), "message 2: reaction '🤷': expected one of"),
        (with_message(reaction=True), "message 2: reaction True"),
        (with_message(turn_rating="good"), "message 2: turn_rating 'good': expected a number"),
        (with_message(time="soon"), "message 2: time 'soon': expected seconds"),
        (with_message(content=None), 'message 2: expected {"role"'),
        (with_message(content="[INST] hi"), "message 2: expected text without a chat template's markup"),
        (with_message(content="\ud800"), "text that is not valid Unicode"),
        (chat("a\nb"), "an id or a name with characters that cannot be printed"),
        ({"id": "a", "rating": 4}, "no messages, but id, rating"),
        ("{", "not JSON"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_rated_chat_is_dropped_and_named(line, reason, file):
    found = read(file, line, chat("b"))
    assert found[0][0] == "chats.jsonl:2" and found[0][1].startswith(reason)
    assert found[1][1].id == "b"


def test_times_that_go_back_are_refused(file):
    back = chat(said=SAID[1:])
    for message, time in zip(back["messages"], (5, 9, 8), strict=True):
        message["time"] = time
    assert read(file, back)[0][1] == "message 1: the next message's time is before its own"


def test_scoring_reads_the_same_without_ratings(file):
    found = read(file, chat(rating=9), chat("b", SAID[:2], rating=None), SAID and chat("c")["messages"], rated=False)
    assert [conversation.id for _, conversation in found] == ["a", "b", "chats.jsonl:4"]
    ((_, rated),) = read(file, chat())
    assert rated.turns == found[0][1].turns


def test_the_range_is_stated_by_a_line_or_the_option_and_never_guessed(file):
    write(file, chat(), header=None)
    assert read_corpus(file, "overall_affect", rating_range=(0, 8)).trajectories["a"][0].score == 50
    with pytest.raises(UserError, match=r"chats\.jsonl:1: the range of its rating is not stated: give --rating_range"):
        read_corpus(file, "overall_affect")
    write(file, chat(rating=4), {**HEADER, "rating_range": [0, 10]}, chat("b", rating=4))  # two files in one
    assert [c.answers["user"]["overall_affect"] for _, c in ChatFiles([file]).chats()] == [7.5, 4]
    with pytest.raises(UserError, match=r"--rating_range: 1 to 5, but chats\.jsonl:3 states 0 to 10"):
        read_corpus(file, "overall_affect", rating_range=(1, 5))
    for wrong in ([5, 1], [1], "1 5", [1, True], None):
        with pytest.raises(
            UserError, match=r"chats\.jsonl:1: rating_range: expected the lowest and the highest rating"
        ):
            read(file, chat(), header={**HEADER, "rating_range": wrong})


def test_a_folder_of_files_and_gzip_are_one_corpus_in_the_order_of_the_hash(tmp_path):
    write(tmp_path / "a.jsonl", chat("x"), chat("y"))
    write(tmp_path / "b.jsonl.gz", chat("z"), chat("y", rating=1))
    conversations, dropped = read_conversations(tmp_path)
    expected = sorted("xyz", key=corpus_module.split_key)
    assert [c.id for c in conversations] == expected
    assert dropped == {"b.jsonl.gz:3": "an id that a conversation before it has"}
    content = (tmp_path / "b.jsonl.gz").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(content[:-12])
    assert "cannot be read" in "".join(read_conversations(tmp_path)[1].values())
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"found a.jsonl and folder/"):
        read_conversations(tmp_path)


def test_the_cache_gives_the_same_and_a_changed_line_or_range_is_read_again(file, tmp_path, monkeypatch):
    write(file, chat(), with_message(reaction=-1, turn_rating=0) | {"id": "b"}, "{")
    cold, warm = (read_conversations(file, cache=tmp_path / "cache") for _ in range(2))
    assert cold == warm and cold[1] == {"chats.jsonl:4": "not JSON"} and [c.unseen for c in cold[0]] == [(0, 1, 2)] * 2
    calls = []
    monkeypatch.setattr("geli.data.chats._chat", lambda *args, made=_chat: calls.append(args[1]) or made(*args))
    assert read_conversations(file, cache=tmp_path / "cache") == cold and calls == []
    write(file, chat(rating=5), with_message(reaction=-1, turn_rating=0) | {"id": "b"}, "{")
    changed = {c.id: c for c in read_conversations(file, cache=tmp_path / "cache")[0]}
    assert calls == ["chats.jsonl:2"] and changed["a"].answers == {"user": {"overall_affect": 10}}
    write(file, chat(rating=5), header={**HEADER, "rating_range": [0, 5]})
    assert len(read_conversations(file, cache=tmp_path / "cache")[0]) == 1 and len(calls) == 2
    (cache,) = (tmp_path / "cache").iterdir()
    assert cache.stat().st_mode & 0o777 == 0o600


def test_options_of_the_other_kind_of_data_are_refused(file, sample):
    write(file, chat())
    with pytest.raises(UserError, match="--transcript backbiter is for folders"):
        read_corpus(file, "overall_affect", "backbiter")
    with pytest.raises(UserError, match="--rating_range is for JSONL files"):
        read_corpus(sample, "overall_affect", rating_range=(1, 5))
    with pytest.raises(
        UserError, match=r"no trajectory .* no faces to learn from \(chats have none; --li_signal reaction"
    ):
        read_corpus(file, "overall_affect", needs_faces=True)
    with pytest.raises(UserError, match=r"no survey\.csv or chat under .* has it; present: overall_affect"):
        read_corpus(file, "i_like_you")
    with pytest.raises(UserError, match=r"expected rated chats, one a line .*; found 1 chats, none usable: no rating"):
        read_corpus(write(file, chat(rating=None)), "overall_affect")


def test_thumbs_are_the_li_targets_and_turns_without_one_have_none(file):
    said = [("user", "Hm"), *[("assistant", f"Reply {i}") for i in range(4)], ("user", "Bye")]
    thumbs = chat(said=said)
    for place, reaction in ((1, 1), (2, "👎"), (3, None)):
        thumbs["messages"][place]["reaction"] = reaction
    write(file, thumbs)
    trajectories = [t for part in split(read_corpus(file, "overall_affect"), 9) for t in part]

    def targets(**more):
        return TurnSet.from_trajectories(trajectories, 1, SignalOptions("reaction", **more)).targets.tolist()

    assert targets() == pytest.approx([1, 0, np.nan, np.nan], nan_ok=True)
    assert targets(negative_affect="negative") == pytest.approx([1, -1, np.nan, np.nan], nan_ok=True)
    assert targets(unknown_reaction="neutral", reaction_type="mean") == [1, 0, 0, 0]
    turns = TurnSet.from_trajectories(trajectories, 1, SignalOptions("reaction"))
    assert turns.known.tolist() == [True, True, False, False] and turns.labels.tolist() == [2, 0, 1, 1]


def test_an_assistant_that_nobody_asked_is_not_told_as_dropped(file):
    by_name = chat("b", said=[("ana", "Hi"), ("ben", "Hello")], rating=None, ratings={"ana": 4})
    corpus = read_corpus(write(file, chat(), by_name), "overall_affect")
    assert sorted(t.key for both in corpus.trajectories.values() for t in both) == ["a/0", "b/0"]
    assert corpus.dropped_trajectories == {"b/1": "the user has no survey row"}  # somebody, who could have rated


def test_validation_without_any_thumb_is_one_clear_error(file):
    write(file, *[chat(f"{i}") for i in range(10)])
    with pytest.raises(UserError, match="--li_signal reaction: none of the 9 training turns has a reaction"):
        load_turns(DataOptions(str(file)), SignalOptions("reaction"), cache=None, validate=True)


@pytest.mark.skipif(not DSTC9.is_file(), reason="DSTC9's conversations are not beside this repository")
def test_the_whole_of_dstc9_is_usable():
    corpus = read_corpus(DSTC9, "overall_affect", rating_range=(1, 5))
    assert len(corpus.conversations) == 2193 and not corpus.dropped
    labelled = [t for both in corpus.trajectories.values() for t in both for i in t.agent_turns
                if t.conversation.turns[i].rating is not None]  # fmt: skip
    assert len(labelled) == 1007


@pytest.mark.parametrize(("name", "said"), [("bom", 2), ("think", 2), ("whole_array", "JSON over several lines"),
                                            ("sharegpt", "ShareGPT"), ("utf16", "UTF-16")])  # fmt: skip
def test_cases_of_jsonl_as_a_corpus(name, said):
    path = case(f"jsonl/{name}.jsonl")
    if isinstance(said, str):
        with pytest.raises(UserError, match=f"found {said}"):
            read_corpus(path, "overall_affect")
        return
    found = [conversation for _, conversation in ChatFiles([path], rated=False).chats()]
    assert len(found) == said
    assert name != "think" or found[0].turns == found[1].turns
