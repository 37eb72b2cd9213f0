"""Asking about windows: what is asked again, what is never asked twice, and what it is said to cost."""

import numpy as np
import pytest
from turn_sets import trajectory

from apps.llm_shares.backends import Reply
from apps.llm_shares.prompt import make_windows
from apps.llm_shares.shares import Asker, ShareOptions, answer_window, duration, estimate, share_out
from apps.openai_server import RequestFailed
from data_utils import split_by_shares
from geli.data.shares import read_shares
from geli.run.errors import UserError

FIRST, SECOND = trajectory("a", 80.0, ["happiness", "neutral"]), trajectory("b", 40.0, ["neutral"] * 5)


class Scripted:
    """A backend that gives prepared replies, and then always the last one. A reply of None is a failure."""

    identity, where, sends_text, form, concurrency, max_tokens = ["scripted"], "script", True, "lines", 1, 100

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def check(self, text, n):
        pass

    def ask(self, text, n):
        self.asked.append(text)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if reply is None:
            raise RequestFailed("timeout")
        text = reply if isinstance(reply, str) else "\n".join(f"{turn}: {reply}" for turn in range(1, n + 1))
        return Reply(text, 10, 4, 0.5)


def window(of=FIRST, size=9):
    return make_windows([of], "overall_affect", size, 0, False)[0]


def test_missing_turns_are_asked_for_again_and_only_they_are_filled():
    backend = Scripted("1: 7\n9: 1", "1: 0\n2: 3")
    found = answer_window(window(), 3, backend.ask)
    assert found.numbers.tolist() == [7, 3] and found.problems == ("missing turns", "extra turns")
    assert (found.replies, found.tokens_in, found.tokens_out, found.seconds) == (2, 20, 8, 1.0)
    first, second = backend.asked
    assert first == window().text and second.startswith(first) and "no points for turns 2." in second


def test_what_would_be_the_same_request_is_not_asked_again():
    backend = Scripted("nothing", "again nothing", "1: 7\n2: 3")
    found = answer_window(window(), 9, backend.ask)
    assert len(backend.asked) == found.replies == 2 and np.isnan(found.numbers).all()
    assert answer_window(window(), 1, Scripted("nothing").ask).replies == 1


def test_replies_on_disk_are_not_asked_for_again(tmp_path):
    path, backend = tmp_path / "replies.jsonl", Scripted("1: 7", "2: 3", 5)
    asker = Asker(backend, 2, path)
    assert asker.unknown([window()]) == [window()] and asker.seconds_a_request() is None
    asker.ask(window())
    path.write_bytes(path.read_bytes() + b'\n{"key": "torn')
    again = Asker(Scripted(None), 2, path)
    assert again.unknown([window()]) == [] and again.known(window()).numbers.tolist() == [7, 3]
    assert again.seconds_a_request() == 0.5
    # a reply belongs to its text and its model
    other = Scripted(5)
    other.identity = ["another"]
    assert Asker(other, 2, path).unknown([window()]) and again.unknown([window(SECOND)])
    # killed after the first of two replies: the second alone is asked for
    path.write_text(path.read_text().splitlines()[1])
    rest = Scripted("2: 4")
    Asker(rest, 2, path).ask(window())
    assert len(rest.asked) == 1 and "no points for turns 2." in rest.asked[0]


def test_windows_of_the_same_text_are_asked_about_once(tmp_path):
    twin = trajectory("a", 80.0, ["happiness", "neutral"])
    assert len(Asker(Scripted(5), 2, tmp_path / "r.jsonl").unknown([window(), window(twin), window(SECOND)])) == 2


def test_shares_are_written_for_what_was_answered_and_the_rest_is_named(tmp_path, capsys):
    third = trajectory("c", 60.0, ["neutral", "anger"])
    backend = Scripted("1: 6\n2: 8", 5, 5, 5, None)  # SECOND has three windows of three turns, c fails
    results = share_out([FIRST, SECOND, third], backend, tmp_path, ShareOptions(window=3, overlap=2))
    shares = read_shares(tmp_path / "shares.csv")
    assert shares["a/0"].turns == {"1": 35.0, "3": 45.0} and set(shares["b/0"].turns.values()) == {8.0}
    kept, dropped = split_by_shares([FIRST, SECOND, third], shares)
    assert kept == [FIRST, SECOND] and list(dropped) == ["c/0"]
    table = {row["what"]: (row["number"], row["of"]) for row in results}
    assert table["replies with a number from 0 to 10 for each turn"] == (4, 5)
    assert table["requests that failed: timeout"] == (1, 5) and table["trajectories without shares"] == (1, 3)
    assert table["turns answered"] == (7, 7) and table["tokens read"] == (40, None)
    said = capsys.readouterr().out
    assert "Sends 3 conversations in 5 requests" in said and "After one: about 4 requests" in said
    backend.replies = [6]
    share_out([FIRST, SECOND, third], backend, tmp_path, ShareOptions(window=3, overlap=2))
    assert len(backend.asked) == 6 and set(read_shares(tmp_path / "shares.csv")) == {"a/0", "b/0", "c/0"}
    assert "4 of 5 are answered in" in capsys.readouterr().out


def test_a_model_that_gives_no_numbers_is_an_error_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"no trajectory has shares.*fewer than half of its turns have a number"):
        share_out([FIRST], Scripted("hello"), tmp_path, ShareOptions())
    assert not (tmp_path / "shares.csv").exists() and (tmp_path / "shares.json").exists()


def test_the_estimate_by_hand(tmp_path, capsys):
    windows = [window()._replace(text="x" * 400)] * 3  # of 100 tokens and 2 turns, which take 6 tokens each
    assert estimate(windows, 2, 50) == (
        "about 3 requests, 300 tokens in, 36 out; at most 6 requests, 600 tokens in, 300 out"
    )
    assert estimate(windows, 2, None, (2000.0, 10_000.0), 100.0) == (
        "about 3 requests, 300 tokens in, 36 out, $0.96, 5.0 minutes"
    )
    assert [duration(seconds) for seconds in (0.4, 119, 120, 7200)] == [
        "0 seconds", "119 seconds", "2.0 minutes", "2.0 hours"
    ]  # fmt: skip
    backend = Scripted(5)
    assert share_out([FIRST], backend, tmp_path, ShareOptions(), only_estimate=True) is None
    assert not backend.asked and "Estimate: about 1 requests" in capsys.readouterr().out
