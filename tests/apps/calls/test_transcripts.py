"""Transcripts of three meeting programs to utterances and turns: by hand, and what is incomplete or contradictory."""

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.calls.transcripts import (
    GIVEN,
    NO_END,
    NO_NAME,
    NO_TIMES,
    Utterance,
    make_turns,
    parse_transcript,
    read_transcript,
)
from geli.data.candor import Dropped

NAMES = {"Ana Silva": "ana", "Ben": "ben"}

ZOOM = """WEBVTT

1
00:00:01.000 --> 00:00:04.500
Ana Silva: Hi Ben, one question: how are you?

2
00:00:05.000 --> 00:00:06.250
Ben: Fine.
"""
TEAMS = """WEBVTT

c8b1a6f0-0000-4d7e-9a1b-000000000001/12-0
00:00:01.000 --> 00:00:04.500
<v Ana Silva>Hi Ben, one question:
how are you?</v>

c8b1a6f0-0000-4d7e-9a1b-000000000001/15-0
00:00:05.000 --> 00:00:06.250
<v Ben (Guest)>Fine.</v>
"""
MEET = """WEBVTT

00:00:01.000 --> 00:00:04.500
(Ana Silva)
Hi Ben, one question: how are you?

00:00:05.000 --> 00:00:06.250
(Ben)
Fine.
"""
MEET_SBV = """0:00:01.000,0:00:04.500
Ana Silva: Hi Ben, one question: how are you?

0:00:05.000,0:00:06.250
Ben: Fine.
"""
SUBRIP = """1
00:00:01,000 --> 00:00:04,500
Ana Silva: Hi Ben, one question: how are you?

2
00:00:05,000 --> 00:00:06,250
Ben: Fine.
"""


def read(text, names=NAMES):
    return parse_transcript(text.splitlines(), names)


def cues(*parts):
    """WebVTT of (times, text)."""
    return "\n\n".join(["WEBVTT", *(f"{times}\n{text}" for times, text in parts)])


@pytest.mark.parametrize("text", [ZOOM, TEAMS, MEET, MEET_SBV, SUBRIP])
def test_the_same_words_in_each_programs_form(text, tmp_path):
    (tmp_path / "t.vtt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    for utterances, notes in (read(text), read_transcript(tmp_path / "t.vtt", NAMES)):
        assert utterances == [
            Utterance("ana", 1.0, 4.5, "Hi Ben, one question: how are you?"),
            Utterance("ben", 5.0, 6.25, "Fine."),
        ]
        assert not notes


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names_differ_in_case_spaces_and_additions():
    text = cues(
        ("00:01.000 --> 00:02.000", "ANA  SILVA (she/her): a"),
        ("00:03.000 --> 00:04.000", "ben: b"),
        ("00:05.000 --> 00:06.000", "Ben:\nc"),
    )
    assert [(said.speaker, said.text) for said in read(text).utterances] == [("ana", "a"), ("ben", "b"), ("ben", "c")]


def test_several_voices_in_a_cue_share_its_time_by_words():
    text = cues(("00:10.000 --> 00:20.000", "<v.loud Ana Silva>one two &amp; four</v> <v Ben><i>five</i>"))
    assert read(text).utterances == [
        Utterance("ana", 10.0, 18.0, "one two & four"),
        Utterance("ben", 18.0, 20.0, "five"),
    ]


@pytest.mark.parametrize("separator", ["-\n\n", "-\n \n", "-\n"])
def test_meet_separates_two_speakers_of_a_cue_by_a_dash_and_an_empty_line(separator):
    text = cues(("00:16.000 --> 00:20.000", f"(Ben)\nsure\n{separator}(Ana Silva)\nthat (I mean\nall) of it"))
    assert read(text).utterances == [
        Utterance("ben", 16.0, pytest.approx(16 + 4 / 7), "sure"),
        Utterance("ana", pytest.approx(16 + 4 / 7), 20.0, "that (I mean all) of it"),
    ]


def test_subtitles_with_dashes_have_two_speakers_in_a_cue():
    text = cues(("00:00.000 --> 00:02.000", "- Ana Silva: a b\n- Ben: c d"))
    assert [said.speaker for said in read(text).utterances] == ["ana", "ben"]
    assert read(text).utterances[1].start == 1.0


def test_what_only_looks_like_a_name_is_text():
    text = cues(
        ("00:00.000 --> 00:01.000", "Ana Silva: at 10:30\nNote: or later"),
        ("00:02.000 --> 00:03.000", "Ben: no: it is"),
    )
    assert [said.text for said in read(text).utterances] == ["at 10:30 Note: or later", "no: it is"]


@pytest.mark.parametrize("unnamed", ["so: hello", "hello"])
def test_cues_without_a_name_belong_to_who_spoke_last_and_are_counted(unnamed):
    text = cues(("00:01.000 --> 00:02.000", "Ana Silva: a"), ("00:03.000 --> 00:04.000", unnamed))
    transcript = read(text)
    assert [(said.speaker, said.text) for said in transcript.utterances] == [("ana", "a"), ("ana", unnamed)]
    assert transcript.notes == {GIVEN: 1}


def test_names_are_carried_on_in_the_order_of_the_file():
    text = cues(
        ("00:05.000 --> 00:06.000", "Ana Silva: a"),
        ("00:01.000 --> 00:02.000", "Ben: b"),
        ("00:07.000 --> 00:08.000", "c"),
    )
    assert [(said.speaker, said.text) for said in read(text).utterances] == [("ben", "b"), ("ana", "a"), ("ben", "c")]


@pytest.mark.parametrize("said", ["Unknown Speaker: {}", "UNKNOWN: {}", "<v >{}</v>", "<v>{}", "<v Unknown Speaker>{}"])
def test_what_an_unknown_speaker_says_is_left_out_and_counted(said):
    known = "<v Ana Silva>hello there" if "<" in said else "Ana Silva: hello there"
    text = cues(
        ("00:01.000 --> 00:02.000", known), ("00:03.000 --> 00:04.000", said.format("b")),
        ("00:05.000 --> 00:06.000", "and c"),
    )  # fmt: skip
    transcript = read(text)
    assert [said.text for said in transcript.utterances] == ["hello there"]
    assert transcript.notes == {NO_NAME: 2}


@pytest.mark.parametrize("lost", [("00:03.000 --> 00:04.000", "Unknown: twelve chars"), ("Ben: and no", "times")])
def test_half_of_the_text_without_names_or_times_is_refused(lost):
    text = cues(("00:01.000 --> 00:02.000", "Ana Silva: twelve chars"), lost)
    with pytest.raises(Dropped, match="half of the text or more has no times or no speaker's name"):
        read(text)


@pytest.mark.parametrize("said", ["<v Eve>hi</v>", "Eve: hi", "(Eve)\nhi", "[SPEAKER_02]: hi"])
def test_somebody_else_is_refused_with_the_name(said):
    form = {"<": "<v Ben>b</v>", "(": "(Ben)\nb"}.get(said[0], "Ben: b")
    text = cues(("00:01.000 --> 00:02.000", form), ("00:03.000 --> 00:04.000", said))
    with pytest.raises(Dropped, match=r"^'(Eve|\[SPEAKER_02\])' speaks \(1 cues\), expected only Ana Silva and Ben$"):
        read(text)


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


@pytest.mark.parametrize("stop", ["", "00:02.000"])
def test_an_end_that_is_missing_or_too_early_is_estimated(stop):
    text = cues((f"00:04.000 --> {stop}", "Ana Silva: one two three four five"), ("00:30.000 --> 00:31.000", "Ben: b"))
    transcript = read(text)
    assert transcript.utterances[0] == Utterance("ana", 4.0, 6.0, "one two three four five")  # 2.5 words a second
    assert transcript.notes == {NO_END: 1}


def test_an_estimated_end_is_not_after_the_next_start():
    text = cues(("00:04.000 --> ", "Ana Silva: one two three four five"), ("00:05.000 -->", "Ben: b"))
    transcript = read(text)
    assert [said.stop for said in transcript.utterances] == [5.0, 5.4] and transcript.notes == {NO_END: 2}


def test_cues_in_another_order_are_sorted():
    text = cues(("00:09.000 --> 00:10.000", "Ben: b"), ("00:01.000 --> 00:08.000", "Ana Silva: a"))
    assert [said.text for said in read(text).utterances] == ["a", "b"]


def test_a_clock_that_was_set_back_is_refused_with_the_line():
    text = cues(("10:00.000 --> 10:01.000", "Ben: b"), ("00:01.000 --> 00:02.000", "Ana Silva: a"))
    with pytest.raises(
        Dropped, match=r"line 6: begins at 1 s, after a cue that begins at 600 s: the clock was set back"
    ):
        read(text)


@pytest.mark.parametrize("times", ["00:99.000 --> 00:02.000", "--> 00:02.000", "a --> b", "-00:01.000 --> 00:02.000"])
def test_times_that_cannot_be_read_are_refused_with_the_line(times):
    with pytest.raises(Dropped, match="line 3: no times that can be read in"):
        read(cues((times, "Ben: b")))


def test_hours_settings_and_missing_fractions():
    text = cues(("01:00:00 --> 01:00:02.5 align:start position:0%", "Ben: b"))
    assert read(text).utterances == [Utterance("ben", 3600.0, 3602.5, "b")]


# ---------------------------------------------------------------------------------------------------------------------
# Other content


def test_comments_and_styles_are_no_speech_and_text_without_times_is_counted():
    text = "WEBVTT - made by hand\nKind: captions\n\nSTYLE\n::cue { color: red }\n\nNOTE Ben: psst\n\n7\n"
    text += "00:01.000 --> 00:02.000\nBen: this is longer\n\nBen: lost\nmore\n\nNOTE x\ny\n\n\n8\n"
    transcript = read(text + "00:03.000 --> 00:04.000\nBen: c")
    assert [said.text for said in transcript.utterances] == ["this is longer", "c"]
    assert transcript.notes == {NO_TIMES: 2}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "nothing is said"),
        (b"WEBVTT\n\n00:01.000 --> 00:02.000\n\n", "nothing is said"),
        (b"Hello.\n\nThere.", "half of the text or more has no times"),
        ("WEBVTT".encode("utf-16"), "no UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_a_file_with_nothing_to_read_is_refused_with_its_name(content, reason, tmp_path):
    path = tmp_path / "t.vtt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(Dropped, match=f"^t.vtt: {reason}"):
        read_transcript(path, NAMES)


def test_text_keeps_its_characters_in_one_line():
    text = cues(("00:01.000 --> 00:02.000", "Ben: 你好 👩‍💻\tcafé\0 &lt;3"))
    assert read(text).utterances[0].text == "你好 👩‍💻 café <3"


@pytest.mark.parametrize("part", ["<v.", "<v ", "1:1:1 ", ":", "<a ", "- "])
def test_long_lines_take_time_in_proportion(part):  # a pattern that looks back would take hours
    with suppress(Dropped):
        read(cues(("00:01.000 --> 00:02.000", ("<v Ben>b\n" if "<" in part else "Ben: b\n") + part * 50_000 + "x")))


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def test_a_turn_ends_where_the_other_begins_to_speak():
    utterances = [
        Utterance("ana", 0.0, 3.0, "a"),
        Utterance("ana", 3.5, 10.0, "b"),
        Utterance("ben", 5.0, 6.0, "mhm"),
        Utterance("ana", 10.5, 12.0, "c"),
        Utterance("ben", 10.5, 14.0, "d"),
    ]
    assert make_turns(utterances) == [
        Utterance("ana", 0.0, 5.0, "a b"),
        Utterance("ben", 5.0, 6.0, "mhm"),
        Utterance("ana", 10.5, 10.5, "c"),
        Utterance("ben", 10.5, 14.0, "d"),
    ]


@given(st.lists(st.tuples(st.sampled_from(["ana", "ben"]), st.floats(0, 100), st.floats(0, 30)), max_size=30))
def test_turns_alternate_do_not_overlap_and_lose_no_word(drawn):
    drawn = sorted(drawn, key=lambda said: said[1])
    utterances = [Utterance(who, start, start + length, f"w{i}") for i, (who, start, length) in enumerate(drawn)]
    turns = make_turns(utterances)
    assert " ".join(turn.text for turn in turns).split() == [said.text for said in utterances]
    assert all(turn.start <= turn.stop for turn in turns)
    for turn, following in pairwise(turns):
        assert turn.speaker != following.speaker and turn.stop <= following.start
