"""Rated chats that no honest program writes: a second reader agrees about what each line is."""

import fuzz_chats
import pytest

from geli.data import chats


def test_mutated_lines_are_read_right_or_dropped():
    counts, failures = fuzz_chats.fuzz(range(10 * len(fuzz_chats.MUTATIONS)), seed=7)
    assert failures == []
    outcomes = {outcome for _, outcome in counts}
    assert outcomes >= {"unchanged", "changed", "dropped"} and not outcomes & {"wrong", "crash", "hang"}


@pytest.mark.parametrize(
    ("name", "errs"),
    [
        ("_mean", lambda ratings, place, scale: 50.0),
        ("_reaction", lambda found, place: 1 if found else None),
        ("_seconds", lambda time, place: None),
    ],
)
def test_the_fuzzer_sees_a_reader_that_errs(name, errs, monkeypatch):
    monkeypatch.setattr(chats, name, errs)
    assert fuzz_chats.fuzz(range(12 * len(fuzz_chats.MUTATIONS)), seed=7)[1]
