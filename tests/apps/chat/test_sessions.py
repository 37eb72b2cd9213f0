"""Sessions of the page: two columns, who may talk, what is stored, and what cannot be done."""

import json
import time
from functools import partial

import pytest
from talks import LetterPolicy

from apps.chat import sessions as module
from apps.chat.collect import Collection
from apps.chat.partner import Partner
from apps.chat.sessions import Phase, Session, Sessions
from apps.chat.talk import Talk
from geli.run.errors import UserError

SEEN = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def sessions_with(*replies: str, collection=None, compare=False, people=9, tuned=True, **more) -> Sessions:
    """Sessions in which the policy gives these replies."""
    partner = Partner(LetterPolicy(*(f"{reply}|" for reply in replies)), "it", tuned=tuned)
    return Sessions(partial(Talk, partner, None), compare, collection, people, **more)


def opened(sessions: Sessions, agreed: bool = True, window: str = "w", **more) -> Session:
    """A session whose person may talk."""
    session = sessions.open(window, **more)
    if session.phase is Phase.CONSENT:
        session.consent(agreed)
    return session


def say(session: Session, text: str = "Hi") -> None:
    session.say(text)
    for _ in session.reply():
        pass


def said(session: Session) -> list[list[str]]:
    return [[turn.text for turn in talk.turns] for talk in session.talks]


@pytest.fixture
def collection(tmp_path):
    return Collection(tmp_path / "talks")


# ---------------------------------------------------------------------------------------------------------------------
# Talking


def test_both_columns_get_the_message_and_grow_at_the_same_time(monkeypatch):
    monkeypatch.setattr(module.secrets, "randbelow", lambda n: 0)  # the coin: tuned on the left
    session = opened(sessions_with("abc", "defg", compare=True, seed=3))
    assert [talk.base for talk in session.talks] == [False, True] and {talk.seed for talk in session.talks} == {3}
    session.say("Hi")
    seen = [[*session.growing] for _ in session.reply()]
    # a reply's last step gives the whole of it again, and ends it
    assert seen[:4] == [["a", "."], ["ab", ".."], ["abc", "..."], ["abc", "...."]] and session.growing is None
    assert said(session) == [["Hi", "abc"], ["Hi", "...."]]


def test_the_coin_falls_on_both_sides():
    sessions = sessions_with(compare=True)
    bases = {tuple(talk.base for talk in sessions.open(str(n)).talks) for n in range(40)}
    assert bases == {(False, True), (True, False)}
    alone = sessions_with(compare=False)
    assert {tuple(talk.base for talk in alone.open(str(n)).talks) for n in range(9)} == {(False,)}


def test_a_reply_is_given_up_when_the_person_leaves_and_leaves_nothing(collection):
    session = opened(sessions_with("abcdef", collection=collection))
    session.say("Hi")
    reply = session.reply()
    next(reply)
    session.leave()
    assert [*reply] == [] and said(session) == [["Hi"]] and session.growing is None
    (broken_off,) = collection.broken_off.iterdir()
    assert broken_off.name == session.talks[0].id


def test_while_a_reply_is_made_nothing_else_is_done():
    session = opened(sessions_with("abc", "de"))
    session.say("Hi")
    reply = session.reply()
    next(reply)
    for act in (lambda: session.say("x"), session.undo, session.retry, session.finish):
        with pytest.raises(UserError, match="wait for the reply"):
            act()
    assert [*session.reply()] == []  # a second one
    assert len([*reply]) > 1 and said(session) == [["Hi", "abc"]]


def test_undo_and_retry_change_both_columns():
    session = opened(sessions_with("a", "b", "c", "d", compare=True))
    say(session, "one")
    session.retry()
    assert said(session) == [["one"], ["one"]]
    assert [*session.reply()] and [len(column) for column in said(session)] == [2, 2]
    assert session.undo() == "one" and said(session) == [[], []]
    with pytest.raises(UserError, match="nothing has been said yet"):
        session.undo()


def test_faces_count_while_a_reply_is_read_and_only_with_consent(collection):
    session = opened(sessions_with("abc", "d", collection=collection), camera=True)
    session.see(SEEN, "fer")
    session.say("Hi")
    assert session.talks[0].frames == {}
    for _ in session.reply():
        session.see(SEEN, "fer")
        assert session.talks[0].frames == {0: SEEN}
    assert session.talks[0].notes == {"camera": "fer"}
    session.finish()
    session.see(None, "fer")
    assert session.talks[0].frames == {0: SEEN}
    for refused in (opened(sessions_with("a", collection=collection), False, camera=True), opened(sessions_with("a"))):
        say(refused)
        refused.see(SEEN, "fer")
        assert refused.talks[0].frames == {}


# ---------------------------------------------------------------------------------------------------------------------
# Ending


def test_what_was_rated_is_stored_with_its_column(collection, capsys):
    session = opened(sessions_with("a", "b", "c", "d", compare=True, collection=collection, user="ann"))
    say(session)
    session.react(1, "sadness")
    session.finish()
    session.rate([{"overall_affect": "7"}, {"overall_affect": "2", "i_like_you": "3"}], agreed=True)
    assert session.phase is Phase.DONE and capsys.readouterr().out == f"{collection.folder}: 2 finished, 0 broken off\n"
    left, right = session.talks
    assert left.answers == {"overall_affect": 7} and right.answers == {"overall_affect": 2, "i_like_you": 3}
    about = [json.loads((collection.folder / talk.id / "metadata.json").read_text()) for talk in session.talks]
    assert [each["column"] for each in about] == ["A", "B"] and [each["beside"] for each in about] == [
        right.id,
        left.id,
    ]
    assert [each["adapter"] for each in about] == [not talk.base for talk in session.talks]
    assert [talk.replies[0].reaction for talk in session.talks] == [None, "sadness"]
    session.begin()  # consent holds for the next one
    assert session.phase is Phase.TALKING and all(talk.agreed and not talk.turns for talk in session.talks)
    assert {talk.user for talk in session.talks} == {"ann"} and left not in session.talks


def test_an_impossible_answer_changes_nothing(collection):
    session = opened(sessions_with(*"abcd", compare=True, collection=collection))
    say(session)
    session.finish()
    with pytest.raises(UserError, match="a number from 1 to 9 is expected, not '12'"):
        session.rate([{"overall_affect": "7"}, {"overall_affect": "12"}], agreed=True)
    assert session.phase is Phase.RATING and [talk.answers for talk in session.talks] == [{}, {}]
    session.go_on()
    say(session, "More")
    session.leave()
    assert collection.counts() == (0, 2)


@pytest.mark.parametrize(("at_first", "at_last", "stored"), [(True, False, 0), (False, True, 1), (False, False, 0)])
def test_the_last_word_about_storing_counts(at_first, at_last, stored, collection):
    session = opened(sessions_with("a", collection=collection), agreed=at_first)
    say(session)
    session.finish()
    session.rate([{"overall_affect": "7"}], agreed=at_last)
    session.leave()
    assert collection.counts() == (stored, 0)


def test_nothing_is_stored_without_a_collection():
    session = opened(sessions_with("a"))
    assert session.phase is Phase.TALKING and session.consent_text == "Nothing is stored."
    say(session)
    session.finish()
    session.rate([{"overall_affect": "7"}], agreed=True)
    assert session.phase is Phase.DONE and not session.agreed


def test_reading_ends_when_the_survey_begins_and_goes_on_behind_it():
    session = opened(sessions_with("abc"))
    (talk,), seconds = session.talks, iter((5, 60, 90))
    say(session)

    def wait() -> None:
        now = talk._began + next(seconds)
        talk.clock = lambda: now

    wait()
    session.finish()
    assert talk.replies[0].stop == 5
    wait()
    session.go_on()
    session.finish()
    assert talk.replies[0].stop == 60
    wait()
    session.rate([{"overall_affect": "7"}], agreed=False)
    assert talk.replies[0].stop == 60


# ---------------------------------------------------------------------------------------------------------------------
# Many people


def test_those_who_come_last_wait_and_follow_in_order():
    sessions = sessions_with(people=2)
    windows = [sessions.open(name) for name in "abcd"]
    assert [each.phase for each in windows] == [Phase.TALKING] * 2 + [Phase.WAITING] * 2
    assert [sessions.place_in_queue(name) for name in "abcdx"] == [0, 0, 1, 2, 0]
    with pytest.raises(UserError, match="not possible now"):
        windows[2].say("Hi")
    sessions.leave("b")
    assert windows[2].phase is Phase.TALKING and sessions.place_in_queue("d") == 1
    sessions.leave("c"), sessions.leave("nobody")
    assert windows[3].phase is Phase.TALKING and sessions.find("c") is None


def test_a_place_that_is_not_used_goes_to_somebody_who_waits(monkeypatch, collection):
    sessions = sessions_with("a", people=1, collection=collection)
    idle = opened(sessions)
    say(idle)
    waiting = sessions.open("x")
    assert sessions.place_in_queue("x") == 1
    later = time.monotonic() + module.IDLE + 1
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    assert sessions.place_in_queue("x") == 0 and waiting.phase is Phase.CONSENT
    assert idle.phase is Phase.LEFT and collection.counts() == (0, 1)


def test_sessions_are_apart_and_found_by_their_secret_keys_alone():
    sessions = sessions_with("a", "b")
    ann, bob = (opened(sessions, window=name) for name in ("ann", "bob"))
    say(ann, "I am Ann"), say(bob, "I am Bob")
    assert said(ann) == [["I am Ann", "a"]] and said(bob) == [["I am Bob", "b"]]
    assert sessions.by_key(ann.key) is ann and sessions.by_key(bob.key) is bob and len(ann.key) == 32
    assert sessions.by_key("ann") is None and ann.talks[0].user != bob.talks[0].user


def test_the_end_stores_what_is_open_and_goes_on_after_a_full_disk(collection, monkeypatch, capsys):
    sessions = sessions_with(*"abc", collection=collection)
    opened_ones = [opened(sessions, window=name) for name in "abc"]
    for session in opened_ones[:2]:
        say(session)
    store, failing = collection.store, opened_ones[0].talks[0]

    def fail(talk):
        if talk is failing:
            raise UserError("no space")
        return store(talk)

    monkeypatch.setattr(collection, "store", fail)
    sessions.close()
    printed = capsys.readouterr()
    assert collection.counts() == (0, 1) and printed.err == "Not stored: no space\n"
