"""Whatever lies in a folder, its conversation loads as it is or is dropped with a reason.

`fuzz_reader.py` looks for more of these; what it found is here by name.
"""

import os
import time
from collections import Counter
from dataclasses import replace as replaced

import fuzz_reader
import numpy as np
import pytest
from conversations import HAPPY, NEUTRAL, frames, write
from fuzz_reader import NO_FILES, csv_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from second_reader import FEATURES_FILE, FILES, SURVEY_FILE, TRANSCRIPT, Refused, reference

from data_utils import read_corpus
from geli.data import candor
from geli.data.candor import Dropped, affect_of_turns, read_conversation
from geli.run.errors import UserError

HEADER = b"turn_id,speaker,start,stop,utterance,n_words\n"


def transcript(folder, content: bytes):
    """The conversation of `write`, with another transcript."""
    (folder / TRANSCRIPT).write_bytes(content)
    return read_conversation(folder)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "c", faces=[("u", 3, 6, "happiness")])


def replace(folder, file, old: bytes, new: bytes, count=-1):
    content = (folder / file).read_bytes()
    assert old in content
    (folder / file).write_bytes(content.replace(old, new, count))


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_dropped_and_nobody_waits_for_it(folder, kind, file):
    (folder / file).unlink()
    NO_FILES[kind](folder / file)
    outcome, reason = fuzz_reader.read(folder)
    if file == FEATURES_FILE and kind in ("no files: nothing", "links: to nothing"):  # only who learns from faces minds
        assert outcome == "loaded" and reason.no_faces == f"{FEATURES_FILE}: no such file"
        return
    assert outcome == "dropped"
    assert any(words in reason for words in ("not a file", "no such file", "symbolic links", "larger than 64 MiB"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_may_not_be_read_is_dropped(folder, file, monkeypatch):  # chmod would stop nobody who is root
    def refuse(path, *how):
        if str(path).endswith(file):
            raise PermissionError(13, "Permission denied")
        return open(path, *how)

    monkeypatch.setattr(candor, "open", refuse, raising=False)
    with pytest.raises(Dropped, match=r"cannot be read \(permission denied\)"):
        read_conversation(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp037"])
def test_another_encoding_is_named_as_such(folder, file, encoding):
    (folder / file).write_bytes((folder / file).read_text().encode(encoding))
    with pytest.raises(Dropped, match=r"no UTF-8 text|NUL bytes; UTF-8 is expected|no column"):
        read_conversation(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_NUL_byte_never_cuts_a_cell_short(folder, file):  # pandas ends a cell at it
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-3] + b"\0" + content[-3:])
    with pytest.raises(Dropped, match="NUL bytes"):
        read_conversation(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and columns


@pytest.mark.parametrize("file", FILES)
def test_a_comma_without_quotes_never_shifts_columns(folder, file):  # pandas cuts off what is too much
    lines = (folder / file).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b",", b",more,", 1)
    (folder / file).write_bytes(b"".join(lines))
    with pytest.raises(Dropped, match="line 3: more cells than the header"):
        read_conversation(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_row_that_was_cut_is_no_row(folder, file):  # pandas fills it up
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: content.rstrip().rindex(b",")])
    with pytest.raises(Dropped, match="fewer cells than the header"):
        read_conversation(folder)


@pytest.mark.parametrize(
    "rows",
    [
        b'0,u,0,1,"hello,1\n1,v,1,2,you,1\n2,u,2,3,"how, are",2\n3,v,3,4,you,1\n',  # closes where another cell opens
        b'0,u,0,1,"hello,1\n1,v,1,2,"good day",2\n2,u,2,3,you,1\n3,v,3,4,you,1\n',
        b'0,u,0,1,"hello,1\n1,v,1,2,you,1\n',  # never closes
        b'0,u,0,1,"hello,1\n1,v,1,2,good day",2\n2,u,2,3,you,1\n3,v,3,4,you,1\n',  # a pair, and the columns are right
        b'0,u,0,"1,hello,1\n1,v,1,2",you,1\n2,v,2,3,you,1\n3,u,3,4,you,1\n',
        b'0,u,0,1,"hello,1\r1,v,1,2,good day",2\r2,u,2,3,you,1\r3,v,3,4,you,1\r',
        b'0,u,0,1,"he"llo,1\n1,v,1,2,you,1\n',
    ],
)
def test_a_stray_quote_never_makes_one_turn_of_several_rows(folder, rows):
    with pytest.raises(Dropped, match=r"not a readable CSV file|a cell has a row in it"):
        transcript(folder, HEADER + rows)


def test_a_stray_quote_swallows_no_row_of_a_survey_or_of_faces(folder):
    for file in (SURVEY_FILE, FEATURES_FILE):
        content = (folder / file).read_bytes()
        lines = [b"note," + line for line in content.splitlines()]
        lines[1], lines[2] = lines[1].replace(b"note", b'"note', 1), lines[2].replace(b"note", b'note"', 1)
        (folder / file).write_bytes(b"\n".join(lines))
        with pytest.raises(Dropped, match="a cell has a row in it"):
            read_conversation(folder)
        (folder / file).write_bytes(content)


def test_quotes_and_lines_that_belong_to_an_utterance_stay(folder):
    said = ['a 5" nail, "so called"', "one\ntwo, three", '"', ", and"]
    rows = [[str(i), "uv"[i % 2], str(i), str(i + 1), text, "9"] for i, text in enumerate(said)]
    content = csv_of([*rows_of(HEADER), *rows])
    assert [turn.utterance for turn in transcript(folder, content).turns] == said
    assert transcript(folder, HEADER + b'0,u,0,1,a 5" nail,3\n1,v,1,2,b,1\n').turns[0].utterance == 'a 5" nail'


@pytest.mark.parametrize(("file", "column"), [(FILES[0], b"start"), (FILES[1], b"timedelta"), (FILES[2], b"user_id")])
def test_a_column_that_is_there_twice_is_not_guessed(folder, file, column):
    header, rows = (folder / file).read_bytes().split(b"\n", 1)
    (folder / file).write_bytes(column + b"," + header + b"\n" + b"".join(b"1," + x for x in rows.splitlines(True)))
    with pytest.raises(Dropped, match=f"more than one column {column.decode()}"):
        read_conversation(folder)


def test_ids_of_turns_that_are_no_numbers_put_no_turn_out_of_its_place(folder):
    rows = b"0,u,0,1,a,1\n%s,v,1,2,b,1\n2,u,2,3,c,1\n%s,v,3,4,d,1\n"
    for second, last in (b"1", b"3"), (b"x", b"3"), (b"", b"nan"), (b"1", b"inf"):
        assert "".join(turn.utterance for turn in transcript(folder, HEADER + rows % (second, last)).turns) == "abcd"
    assert "".join(turn.utterance for turn in transcript(folder, HEADER + rows % (b"7", b"3")).turns) == "acdb"
    with pytest.raises(Dropped, match="out of order"):
        transcript(folder, HEADER + rows % (b"x", b"1"))


def test_nobody_says_a_hundred_thousand_characters_in_a_turn(folder):
    rows = b"0,u,0,1,a,1\n1,v,1,2,b,1\n2,u,2,3,%s,1\n" % (b"x" * 10_000_000)
    conversation = transcript(folder, HEADER + rows)
    assert [turn.utterance for turn in conversation.turns] == ["a", "b"]
    assert conversation.skipped_turns == {"utterance of more than 100,000 characters": 1}


def test_a_long_cell_that_nobody_reads_changes_nothing(folder):
    before = read_conversation(folder)
    for file in FILES:
        lines = (folder / file).read_bytes().splitlines()
        lines = [line + (b",more" if i == 0 else b"," + b"x" * 3_000_000 * (i == 2)) for i, line in enumerate(lines)]
        (folder / file).write_bytes(b"\n".join(lines))
    assert read_conversation(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("name", ["NA", "null", "nan", "None", "1e5", "\u202e"])
def test_a_name_that_looks_like_a_missing_value_is_a_name(folder, name):
    for file in FILES:
        replace(folder, file, b"v,", name.encode() + b",")
    conversation = read_conversation(folder)
    assert conversation.speakers == ("u", name) and conversation.answers[name] == {"overall_affect": 4}


@pytest.mark.parametrize("cell", ["1_0", "\uff17", "0x7", "True", "inf", "nan", "-1", "11", "7,5", "7\x1e", "7\x85"])
def test_what_is_no_answer_is_none(folder, cell):
    lines = (folder / SURVEY_FILE).read_text().splitlines()
    at = lines[0].split(",").index("overall_affect")
    cells = lines[1].split(",")
    cells[at] = f'"{cell}"'
    (folder / SURVEY_FILE).write_text("\n".join([lines[0], ",".join(cells), lines[2]]))
    assert read_conversation(folder).answers == {"u": {"conversationalist": 80}, "v": {"overall_affect": 4}}


def test_probabilities_that_are_none_lose_their_frame_and_disturb_no_other(folder):
    before = read_conversation(folder)
    assert [turn.affect for turn in before.turns] == [NEUTRAL, HAPPY, NEUTRAL, NEUTRAL]
    for cell in (b"1e300", b"-0.5", b"7", b"inf"):
        content = (folder / FEATURES_FILE).read_bytes()
        replace(folder, FEATURES_FILE, b"u,0 days 00:00:00,0.04,", b"u,0 days 00:00:00,%s," % cell)
        assert read_conversation(folder) == before  # in one running sum, 1e300 would drown all frames behind it
        (folder / FEATURES_FILE).write_bytes(content)


def test_equal_means_are_equal_whatever_was_shown_before():
    tie = frames({"happiness": 0.6, "neutral": 0.3}, {"neutral": 0.6, "happiness": 0.3})
    for n in range(40):
        earlier = frames(*[{"happiness": 0.1, "neutral": 0.7}] * n) if n else np.zeros((0, 8))
        seconds = np.arange(n + 2.0)
        assert affect_of_turns([n], [n + 1], [9], seconds, np.concatenate([earlier, tie]))[0].tolist() == [HAPPY]


@pytest.mark.parametrize("time", ["0 days 00:00:61", "0 days 00:61:00", "99999999999 days 00:00:00", "5 min", "1e999"])
def test_what_is_no_time_is_no_frame(folder, time):
    before = read_conversation(folder)
    replace(folder, FEATURES_FILE, b"u,0 days 00:00:00", b"u," + time.encode())
    assert read_conversation(folder) == before


@pytest.mark.parametrize("time", ["00:00:04", "0:00:04", "4", "4.0", "0 days 00:00:04.000", " 0 days 00:00:04 "])
def test_every_way_to_write_a_time_is_the_same_time(folder, time):
    before = read_conversation(folder)
    replace(folder, FEATURES_FILE, b"u,0 days 00:00:04", b"u," + time.encode())
    assert read_conversation(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("name", ["a\nb", "\udcff", "\x1b[2J"])
def test_a_name_that_cannot_be_printed_is_dropped_and_named_in_one_line(tmp_path, name):
    write(tmp_path / "good")
    write(tmp_path / name)
    corpus = read_corpus(tmp_path, "overall_affect")
    assert [c.id for c in corpus.conversations] == ["good"] and list(corpus.dropped) == [name]
    assert f"  {name!a}: the folder's name has characters" in corpus.describe()
    assert corpus.describe().encode().isascii() and len(corpus.describe().splitlines()) == 3


def test_a_conversation_is_read_once_however_many_links_lead_to_it(tmp_path):
    write(tmp_path / "data" / "one")
    write(tmp_path / "elsewhere" / "two")
    for n in range(3):
        (tmp_path / "data" / f"link-{n}").symlink_to("one")
        (tmp_path / "data" / f"two-{n}").symlink_to(tmp_path / "elsewhere" / "two")
    for name, target in {"loop": ".", "circle": "circle", "broken": "nowhere"}.items():
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "data" / "truth.csv").write_text("no folder, and no conversation")
    os.mkfifo(tmp_path / "data" / "fifo")
    corpus = read_corpus(tmp_path / "data", "overall_affect", cache=tmp_path / "cache")
    read, dropped = {c.id for c in corpus.conversations}, corpus.dropped
    assert len(read) == 2 and "one" in read and len(dropped) == 5 + 3
    assert {dropped[f"link-{n}"] for n in range(3)} == {"a link to another conversation's folder, one"}
    assert "no such file" in dropped["loop"] and "no such file" in dropped["broken"]
    assert "symbolic links" in dropped["circle"]
    assert read_corpus(tmp_path / "data", "overall_affect", cache=tmp_path / "cache") == corpus


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.name), lambda path: path.write_text("")])
def test_a_data_folder_that_is_none_is_one_clear_error(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=r"expected (a folder with one folder a conversation|rated chats)"):
        read_corpus(tmp_path / "data", "overall_affect")


# ---------------------------------------------------------------------------------------------------------------------
# By chance


def agree(folder):
    """The reader and the second reader come to the same."""
    outcome, found = fuzz_reader.read(folder)
    try:
        expected = reference(folder)
    except Refused:
        assert outcome == "dropped" and found.isprintable()
    else:
        assert (outcome, found) == ("loaded", expected)
        assert not fuzz_reader.out_of_range(found)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hostile") / "c", faces=[("u", 3, 6, "happiness")])


def with_file(folder, file, content: bytes):
    before = (folder / file).read_bytes()
    (folder / file).write_bytes(content)
    try:
        agree(folder)
    finally:
        (folder / file).write_bytes(before)


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300), keep=st.integers(0, 2))
def test_any_bytes_as_a_file(shared, file, content, keep):
    header = b"".join((shared / file).read_bytes().splitlines(keepends=True)[:keep])
    with_file(shared, file, header + content)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
CELLS = st.one_of(TEXT, st.sampled_from(fuzz_reader.HOSTILE_CELLS), st.floats().map(str))


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), CELLS), max_size=6),
    quotes=st.sampled_from(["needed", "all", "none"]),
)
def test_any_cells_in_a_file(shared, file, cells, quotes):
    rows = rows_of((shared / file).read_bytes())
    for row, column, cell in cells:
        rows[row % len(rows)][column % len(rows[0])] = cell
    with_file(shared, file, csv_of(rows, quotes))


@pytest.mark.slow
def test_mutated_conversations_are_read_right_or_dropped(sample):
    result = fuzz_reader.fuzz([fuzz_reader.bases_of(sample, 20)], range(130), seed=7)
    assert result.failures == []
    assert min(counts.total() for counts in result.outcomes.values()) > 0
    total = sum(result.outcomes.values(), start=Counter())
    assert min(total["unchanged"], total["changed"], total["dropped"]) > 15


def erring(change, only_in="data"):
    """A reader that makes something else of mutated conversations than the right one."""

    def read(folder, transcript="cliffhanger"):
        found = read_conversation(folder, transcript)
        return change(folder, found) if folder.parent.name == only_in else found

    return {"geli.data.candor.read_conversation": read}


def in_both(patches):
    """The same mistake in the second reader."""

    def reference(folder):
        try:
            return candor.read_conversation(folder)
        except Dropped as reason:
            raise Refused(str(reason)) from None

    return {**patches, "fuzz_reader.reference": reference}


def drop(words):
    def change(folder, found):
        raise Dropped(words)

    return change


def later(folder, found):
    return replaced(found, turns=tuple(turn._replace(stop=turn.stop + 1e-9) for turn in found.turns))


def negative(folder, found):
    return replaced(found, turns=tuple(turn._replace(happy_share=-1.0) for turn in found.turns))


def one_turn_less(folder, found):
    return replaced(found, turns=found.turns[:-1])


def marked(folder, found):
    mark = (folder / SURVEY_FILE).read_bytes().startswith(b"\xef\xbb\xbf")
    return replaced(found, questions=frozenset()) if mark else found


def without_nul(path):
    return path.read_bytes().replace(b"\0", b"")


def all_but_one(*arguments, **how):
    corpus = read_corpus(*arguments, **how)
    return replaced(corpus, conversations=corpus.conversations[1:])


MARK, ANSWERS = "neutral: byte order mark", "survey: answers that are none"


@pytest.mark.parametrize(("patches", "mutation", "said"), [
    (erring(later), ANSWERS, "wrong: ['turns'] differ"),
    (erring(lambda *_: 1 / 0), ANSWERS, "ZeroDivisionError"),
    (erring(lambda *_: time.sleep(9)), ANSWERS, "hang: "),
    (erring(drop("no")), ANSWERS, "wrong: dropped, other than by the second reader"),
    (erring(drop("no"), only_in="plain"), ANSWERS, "wrong: not even mutated"),
    ({"geli.data.candor._read_bytes": without_nul}, "bytes: NUL bytes",
     "wrong: loaded, other than by the second reader"),
    (in_both(erring(drop("a\nb"))), ANSWERS, "no reason in one line"),
    (in_both(erring(negative)), ANSWERS, "out of range: "),
    (in_both(erring(one_turn_less)), ANSWERS, "a line that was left alone is no turn"),
    (in_both(erring(marked)), MARK, "changed by what changes nothing"),
    ({"data_utils.read_corpus": all_but_one}, ANSWERS, "became None in the corpus"),
])  # fmt: skip
def test_the_fuzzer_sees_a_reader_that_errs(sample, monkeypatch, patches, mutation, said):
    monkeypatch.setattr(fuzz_reader, "LIMIT", 1)
    i = fuzz_reader.MUTATIONS.index(mutation)
    inputs, bases = range(i, i + 1), [fuzz_reader.bases_of(sample, 5)]
    assert fuzz_reader.fuzz(bases, inputs, seed=7).failures == []
    for name, function in patches.items():
        monkeypatch.setattr(name, function)
    assert said in "\n".join(fuzz_reader.fuzz(bases, inputs, seed=7).failures)
