"""What real transcripts and tables do to programs that read them: each form by its smallest file, and the right result.

The first of each kind is a row of a table of inputs; the others are files of the same kind.
"""

import pytest

from apps.calls.calls import read_call, turns_of_call, write_call
from apps.calls.transcripts import NO_TIMES
from geli.data.candor import MIN_WORDS, Dropped, read_conversation

RATINGS = "person,name,overall_affect\nana,{},8\nben,Ben,5\n"
FIRST, SECOND = "00:00:01.000 --> 00:00:04.500", "00:00:05.000 --> 00:00:06.250"
SLEEP, STONE = "Did you sleep well?", "Like a stone."
TWO = [("ana", 1.0, 4.5, SLEEP), ("ben", 5.0, 6.25, STONE)]


def vtt(*parts):
    return "\n\n".join(["WEBVTT", *("\n".join(part) for part in parts)]) + "\n"


def zoom(name, other="Ben", colon=": "):
    """The usual two cues with another name of the first person."""
    return vtt((FIRST, f"{name}{colon}{SLEEP}"), (SECOND, f"{other}{colon}{STONE}"))


def srt(*parts, between=""):
    """SubRip; `between`: cues."""
    cues = [f"{i}\n{times.replace('.', ',')}\n{said}\n" for i, (times, said) in enumerate(parts, start=1)]
    return between.join(cues)


# kind -> (transcript, ratings, utterances joined to turns)
CASES = {
    "t01_teams_unpadded": (
        vtt(("0:0:1.0 --> 0:0:4.50", f"<v Ana Silva>{SLEEP}</v>"), ("0:0:5.0 --> 0:0:6.250", f"<v Ben>{STONE}</v>")),
        RATINGS.format("Ana Silva"), TWO,
    ),
    "t01_seven_digits": (
        vtt(("0:0:1.0000000 --> 0:0:4.5000000", f"<v Ana>{SLEEP}"), ("0:00:5 --> 00:0:6.2500000", f"<v Ben>{STONE}")),
        RATINGS.format("Ana"), TWO,
    ),
    "t02_srt_no_blank": (
        srt((FIRST, f"Ana Silva: {SLEEP}"), (SECOND, f"Ben: {STONE}"), ("00:07.000 --> 00:09.000", "Ben: At 7\n7")),
        RATINGS.format("Ana Silva"), [TWO[0], ("ben", 5.0, 9.0, f"{STONE} At 7 7")],
    ),
    "t02_srt_wrong_numbers": (
        srt((FIRST, f"Ana: {SLEEP}"), (SECOND, f"Ben: {STONE}")).replace("2\n", "7\n", 1), RATINGS.format("Ana"), TWO,
    ),
    "t02_teams_no_blank": (
        f"WEBVTT\n\nc8b1a6f0-0000-4d7e-9a1b-000000000001/12-0\n{FIRST}\n<v Ana>{SLEEP}</v>\n"
        f"c8b1a6f0-0000-4d7e-9a1b-000000000001/15-0\n{SECOND}\n<v Ben>{STONE}</v>",
        RATINGS.format("Ana"), TWO,
    ),
    "t03_crcrlf": (zoom("Ana").replace("\n", "\r\r\n"), RATINGS.format("Ana"), TWO),
    "t03_crcrlf_srt_and_ratings": (
        srt((FIRST, f"Ana: {SLEEP}"), (SECOND, f"Ben: {STONE}")).replace("\n", "\r\r\n"),
        RATINGS.format("Ana").replace("\n", "\r\r\n"), TWO,
    ),
    "t03_every_line_end_twice": (zoom("Ana").replace("\n", "\n\n"), RATINGS.format("Ana"), TWO),
    "t04_rtl_marks": (zoom("\u200fדנה", "\u200f\u202bBen\u202c"), RATINGS.format("דנה"), TWO),
    "t04_rtl_marks_in_ratings": (zoom("דנה"), RATINGS.format("\u2067דנה\u2069"), TWO),
    "t04_rtl_marks_in_voice_tags": (
        vtt((f"\u200f{FIRST}", f"<v \u200eדנה\u200b>{SLEEP}"), (SECOND, f"<v &rlm;Ben>{STONE}")),
        RATINGS.format("דנה"), TWO,
    ),
    "t05_amp_prefix": (zoom("Ana &amp; Co"), RATINGS.format("Ana & Co"), TWO),
    "t05_amp_everywhere": (
        vtt((FIRST, f"<v Ana &amp; Co>{SLEEP}"), (SECOND, f"<v Ben>{STONE}")), RATINGS.format("Ana &amp; Co"), TWO,
    ),
    "t05_apostrophe": (zoom("Ana O&#39;Neil"), RATINGS.format("Ana O’Neil"), TWO),
    "t06_bold_name": (
        srt((FIRST, f"<b>Ana Silva:</b> {SLEEP}"), (SECOND, f"<i>Ben: {STONE}</i>")), RATINGS.format("Ana Silva"), TWO,
    ),
    "t06_other_tags": (
        srt((FIRST, f'{{\\an8}}<font color="#fff"><b>Ana</b></font>: {SLEEP}'), (SECOND, f"<u>Ben</u> : {STONE}")),
        RATINGS.format("Ana"), TWO,
    ),
    "t06_tags_of_google_meet": (
        vtt((FIRST, "(<b>Ana</b>)", SLEEP), (SECOND, "(Ben)", STONE)), RATINGS.format("Ana"), TWO,
    ),
    "t07_name_on_change": (
        vtt(
            (FIRST, f"Ana Silva: {SLEEP}"), (SECOND, "I did not close an eye."),
            ("00:00:07.000 --> 00:00:09.000", "Ben: Like a stone,"),
            ("00:00:10.000 --> 00:00:12.000", "until the dog came in."),
        ),
        RATINGS.format("Ana Silva"),
        [("ana", 1.0, 6.25, f"{SLEEP} I did not close an eye."),
         ("ben", 7.0, 12.0, "Like a stone, until the dog came in.")],
    ),
    "t07_voice_on_change": (
        vtt((FIRST, f"<v Ana>{SLEEP}</v>"), (SECOND, "You?"), ("00:07.000 --> 00:09.000", f"<v Ben>{STONE}"),
            ("00:10.000 --> 00:12.000", "Really.")),
        RATINGS.format("Ana"), [("ana", 1.0, 6.25, f"{SLEEP} You?"), ("ben", 7.0, 12.0, f"{STONE} Really.")],
    ),
    "t07_google_meet_on_change": (
        vtt((FIRST, "(Ana)", SLEEP), *[(SECOND, "You?")] * 3, ("00:07.000 --> 00:09.000", "(Ben)", STONE)),
        RATINGS.format("Ana"), [("ana", 1.0, 6.25, f"{SLEEP} You? You? You?"), ("ben", 7.0, 9.0, STONE)],
    ),
    "t09_colon_in_name": (zoom("Room 4: Ana"), RATINGS.format("Room 4: Ana"), TWO),
    "t09_full_width_colon": (zoom("田中：太郎", colon="："), RATINGS.format("田中: 太郎"), TWO),
    "t09_name_and_text_with_colons": (
        zoom("Room 4: Ana (Guest)").replace(SLEEP, "Ben: no: yes"), RATINGS.format("Room 4: Ana"),
        [("ana", 1.0, 4.5, "Ben: no: yes"), TWO[1]],
    ),
    "t15_minutes_over_59": (
        vtt(("59:58.000 --> 59:59.000", f"Ana: {SLEEP}"), ("61:05.000 --> 61:06.250", f"Ben: {STONE}")),
        RATINGS.format("Ana"), [("ana", 3598.0, 3599.0, SLEEP), ("ben", 3665.0, 3666.25, STONE)],
    ),
    "t15_three_digits_in_srt": (
        srt(("99:58.000 --> 99:59.000", f"Ana: {SLEEP}"), ("100:05.000 --> 100:06.250", f"Ben: {STONE}")),
        RATINGS.format("Ana"), [("ana", 5998.0, 5999.0, SLEEP), ("ben", 6005.0, 6006.25, STONE)],
    ),
    "t20_trailing_commas": (zoom("Ana"), RATINGS.format("Ana") + ",,\n,,\n", TWO),
    "t20_empty_columns": (zoom("Ana"), RATINGS.format("Ana").replace("\n", ",,\n") + " ,, , ,\n\n", TWO),
    "line_separator_in_a_cue": (zoom("Ana").replace("you sleep", "you\u2028\u2028sleep"), RATINGS.format("Ana"), TWO),
    "byte_order_mark_twice": ("\ufeff\ufeff" + zoom("Ana"), "\ufeff\ufeff" + RATINGS.format("Ana"), TWO),
}  # fmt: skip


def call_of(folder, transcript, ratings):
    folder.mkdir(exist_ok=True)
    (folder / ("t.vtt" if "WEBVTT" in transcript else "t.srt")).write_bytes(transcript.encode())
    (folder / "ratings.csv").write_bytes(ratings.encode())
    return read_call(folder, no_video=True)


@pytest.mark.parametrize("kind", CASES)
def test_case(kind, tmp_path):
    transcript, ratings, turns = CASES[kind]
    assert turns_of_call(call_of(tmp_path, transcript, ratings), "small")[0] == turns


SENTENCES = {  # each of 6 to 20 words
    "t30_japanese": "昨日は仕事でとても大変なことがあったんですけど、聞いてもらえますか？",
    "chinese": "你昨天晚上睡得好吗？我一直没睡着。",
    "thai": "เมื่อคืนคุณนอนหลับสบายดีไหมครับ",
    "khmer": "តើយប់មិញអ្នកគេងលក់ស្រួលទេ?",
    "burmese": "မနေ့ညက ကောင်းကောင်း အိပ်ပျော်ရဲ့လား ကျွန်တော် မအိပ်ပျော်ဘူး",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_case_of_a_language_without_spaces(language, tmp_path):
    said = SENTENCES[language]
    transcript = vtt((FIRST, f"Ana: {said}"), ("00:00:05.000 -->", f"Ben: {said}"))
    call = call_of(tmp_path, transcript, RATINGS.format("Ana"))
    turns, _ = turns_of_call(call, "small")
    assert 6 / 2.5 <= turns[1].stop - turns[1].start <= 20 / 2.5
    write_call(tmp_path / "out" / "c", call, turns, {})
    assert all(MIN_WORDS <= turn.n_words <= 20 for turn in read_conversation(tmp_path / "out" / "c").turns)


@pytest.mark.parametrize(
    "line",
    [
        "00:00:05.000 -> 00:00:06.250", "00:00:05.000 – 00:00:06.250", "00:00:05,000", "0:05:06.250 Ben",
        f"{SECOND} Ben: {STONE}", "--> 00:00:06.250",
    ],
)  # fmt: skip
def test_case_of_a_line_that_was_meant_for_times_is_refused(line, tmp_path):
    call = call_of(tmp_path, zoom("Ana").replace(SECOND, line), RATINGS.format("Ana"))
    with pytest.raises(Dropped, match="line 6: no times that can be read in"):
        turns_of_call(call, "small")


def test_case_of_a_number_without_times_below_text(tmp_path):
    transcript = srt((FIRST, f"Ana: {SLEEP}"), ("", "Ben: no"), (SECOND, f"Ben: {STONE}")).replace("2\n\n", "2\n")
    turns, notes = turns_of_call(call_of(tmp_path, transcript, RATINGS.format("Ana")), "small")
    assert turns == TWO and notes == {NO_TIMES: 2}


def test_case_of_a_voice_tag_without_end_is_refused(tmp_path):
    transcript = vtt((FIRST, f"<v Ana>{SLEEP}</v>"), (SECOND, "<v Ben", f"{STONE}</v>"))
    with pytest.raises(Dropped, match="no name that can be read in '<v Ben'"):
        turns_of_call(call_of(tmp_path, transcript, RATINGS.format("Ana")), "small")


def test_case_of_two_people_with_one_name(tmp_path):
    with pytest.raises(Dropped, match="both people have the name 'BEN'"):
        call_of(tmp_path, zoom("Ana"), RATINGS.format("BEN"))
