"""Reading and aligning the files of one conversation, each first on a case worked by hand."""

import random

import numpy as np
import pandas as pd
import pytest
from conversations import ANGRY, FACELESS, HAPPY, NEUTRAL, edit, frames, lose_faces, write
from hypothesis import given, settings
from hypothesis import strategies as st

from geli.data import candor
from geli.data.candor import FACES, FEATURES_FILE, affect_of_turns, read_conversation


def test_a_turns_affect_is_the_most_frequent_argmax_of_its_listeners_frames():
    seconds = np.array([0.0, 1, 2, 3, 4])
    faces = frames(
        {"happiness": 0.9}, {"happiness": 0.6, "sadness": 0.4}, {"sadness": 0.9}, {"neutral": 1}, {"anger": 0.5}
    )
    # [0, 2]: happy, happy, sad -> happiness, 2/3; [2, 4]: sad, neutral, angry: one each, so the largest mean, neutral's
    affect, share = affect_of_turns([0, 2], [2, 4], [9, 9], seconds, faces)
    assert affect.tolist() == [HAPPY, NEUTRAL]
    assert share == pytest.approx([2 / 3, 0])


def test_ties_go_to_the_class_of_larger_mean_probability():
    faces = frames({"happiness": 0.6, "anger": 0.4}, {"anger": 0.7, "happiness": 0.1})
    # one frame each; mean of happiness 0.35, of anger 0.55
    assert affect_of_turns([0], [1], [6], np.array([0.0, 1.0]), faces)[0].tolist() == [ANGRY]


def test_both_ends_of_a_turn_belong_to_it():
    faces = frames({"happiness": 1}, {"neutral": 1}, {"neutral": 1})
    assert affect_of_turns([0.0], [0.9], [6], np.array([0.0, 1, 2]), faces)[0].tolist() == [HAPPY]
    assert affect_of_turns([0.1], [2.0], [6], np.array([0.0, 1, 2]), faces)[0].tolist() == [NEUTRAL]
    assert affect_of_turns([-1.0], [0.0], [6], np.array([0.0, 1, 2]), faces)[0].tolist() == [HAPPY]


def test_five_words_or_no_frame_make_a_turn_neutral():
    faces = frames({"happiness": 1}, {"happiness": 1})
    affect, share = affect_of_turns([0, 0, 5], [1, 1, 9], [5, 6, 20], np.array([0.0, 1.0]), faces)
    assert affect.tolist() == [NEUTRAL, HAPPY, NEUTRAL]
    assert share.tolist() == [0, 1, 0]


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20)), max_size=8), st.integers(0, 40), st.integers(0, 2**32 - 1)
)
def test_alignment_equals_looking_at_every_frame(spans, n_frames, seed):
    rng = np.random.default_rng(seed)
    seconds = np.sort(rng.integers(0, 60, size=n_frames)).astype(float)
    probabilities = rng.dirichlet(np.ones(8), size=n_frames)
    start = np.array([s for s, _ in spans])
    stop = np.array([s + d for s, d in spans])
    affect, share = affect_of_turns(start, stop, np.full(len(spans), 9), seconds, probabilities.reshape(-1, 8))
    for i in range(len(spans)):
        inside = probabilities[(seconds >= start[i]) & (seconds <= stop[i])]
        if not len(inside):
            assert (affect[i], share[i]) == (NEUTRAL, 0)
            continue
        classes = inside.argmax(axis=1)
        counts = np.bincount(classes, minlength=8)
        best = max(range(8), key=lambda c: (counts[c], inside[:, c].mean()))
        assert affect[i] == best
        assert share[i] == pytest.approx((classes == HAPPY).mean())


def test_the_listener_is_the_other_person_whoever_speaks_first(tmp_path):
    # u smiles while v speaks (turn 1) and also while u speaks (turn 2): only the first is a reaction
    conversation = read_conversation(write(tmp_path / "c", faces=[("u", 3.5, 8.5, "happiness")]))
    assert [turn.affect for turn in conversation.turns] == [NEUTRAL, HAPPY, NEUTRAL, NEUTRAL]


def test_what_people_say_stays_text(tmp_path):
    turns = [("u", 0, 1, "null"), ("v", 1, 2, "NA"), ("u", 2, 3, "1e5"), ("v", 3, 4, 'a "quote", and\na line')]
    conversation = read_conversation(write(tmp_path / "c", turns))
    assert [turn.utterance for turn in conversation.turns] == ["null", "NA", "1e5", 'a "quote", and\na line']


def test_rows_that_are_no_turns_are_skipped_and_counted(tmp_path):
    folder = write(tmp_path / "c")
    path = folder / "transcription" / "transcript_cliffhanger.csv"
    table = pd.read_csv(path, dtype=str)
    extra = table.iloc[[0, 0, 0]].assign(
        turn_id=["4", "5", "6"], utterance=["  ", "words", "more words"], start=["1", "soon", "9"], stop=["2", "3", "8"]
    )
    pd.concat([table, extra]).to_csv(path, index=False)
    conversation = read_conversation(folder)
    assert len(conversation.turns) == 4
    assert conversation.skipped_turns == {
        "empty utterance": 1,
        "start or stop is not a number": 1,
        "starts before 0 or stops before it starts": 1,
    }


def test_seconds_are_read_in_both_notations_and_lost_faces_dropped(tmp_path):
    faces = [("u", 3, 6, "happiness")]
    folder = write(tmp_path / "c", faces=faces)
    path = folder / "audio_video_features.csv"
    table = pd.read_csv(path)
    table["timedelta"] = pd.to_timedelta(table["timedelta"]).dt.total_seconds()
    table.loc[(table["user_id"] == "u") & (table["timedelta"] < 5), "prob_face_anger"] = np.nan  # half of them lost
    table.to_csv(path, index=False)
    assert read_conversation(folder).turns[1].happy_share == pytest.approx(1.0)  # seconds 5 and 6 are left
    table.loc[table["user_id"] == "u", "prob_face_anger"] = np.nan
    table.to_csv(path, index=False)
    assert read_conversation(folder).turns[1].affect == NEUTRAL


@pytest.mark.parametrize("kind", FACELESS)
def test_a_conversation_without_faces_is_read(tmp_path, kind):
    whole = read_conversation(write(tmp_path / "c", faces=[("u", 3, 6, "happiness")]))
    found = read_conversation(lose_faces(tmp_path / "c", kind))
    assert whole.no_faces == "" and FACELESS[kind][1] in found.no_faces
    assert [(turn.affect, turn.happy_share) for turn in found.turns] == [(NEUTRAL, 0)] * 4
    assert [turn[:6] for turn in found.turns] == [turn[:6] for turn in whole.turns]


def test_answers_outside_a_questions_limits_are_left_out_and_kept_apart(tmp_path):
    folder = write(tmp_path / "c")
    answers = {"overall_memory_rating": ["60", "7"], "overall_affect": ["-1", "10.5"], "good_for_advice": ["", "often"]}
    edit(folder, lambda table: table.assign(**answers), "survey.csv")
    conversation = read_conversation(folder)
    assert conversation.answers == {"u": {"conversationalist": 80}, "v": {"overall_memory_rating": 7}}
    assert conversation.off_scale == {"overall_memory_rating": [60], "overall_affect": [-1, 10.5]}


CELLS = st.sampled_from(["0.5", "0.25", "1e-3", "", "nan", "inf", "x", " 0.1", "-1"])


TIMES = st.sampled_from(["0 days 00:00:01", "0 days 00:01:07.5", "3", "2.5", "", "x", "1 days 00:00:00", "-1"])


USERS = st.sampled_from(["u", "v", " u", "", "NA", '"u"', '"a,b"'])


ROWS = st.lists(st.tuples(USERS, TIMES, st.lists(CELLS, min_size=8, max_size=8)), max_size=12)


def test_times_are_read_to_the_last_bit_as_pandas_reads_them():
    rng = random.Random(0)
    days = ["", "0 days ", "1 day ", "3 days, ", "104 days ", "99999 days "]
    times = [
        f"{rng.choice(days)}{rng.randrange(100):0{rng.choice('12')}d}:{rng.randrange(60):02d}:{rng.randrange(60):02d}"
        + rng.choice(["", "." + "".join(rng.choices("0123456789", k=rng.randrange(1, 10)))])
        for _ in range(5000)
    ]
    assert [candor._seconds(time) for time in times] == pd.to_timedelta(times).total_seconds().tolist()


@settings(max_examples=150, deadline=None)
@given(ROWS, st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\ufeff"]))
def test_the_fast_reader_agrees_with_the_careful_one(tmp_path_factory, rows, newline, start):
    header = ",".join(["frame", "user_id", "timedelta", *(f"prob_face_{face}" for face in FACES)])
    lines = [header, *(",".join(["0", user, time, *cells]) for user, time, cells in rows)]
    path = tmp_path_factory.mktemp("faces") / "audio_video_features.csv"
    path.write_bytes((start + newline.join(lines) + newline).encode())
    fast, careful = candor._fast_faces(path), candor._careful_faces(path)
    if fast is None:
        return
    for function in (str.strip, candor._seconds):
        for i in range(2):
            np.testing.assert_array_equal(*(candor._map_distinct(columns[i], function) for columns in (fast, careful)))
    lost = np.isinf(fast[2])  # the careful reader makes NaN of it; both lose the frame
    np.testing.assert_array_equal(np.where(lost, np.nan, fast[2]), careful[2])


def test_the_fast_reader_is_the_one_that_reads_sound_files(sample):
    path = next(sample.glob("*/audio_video_features.csv"))
    assert candor._fast_faces(path) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Two clocks


def retimed(folder, faces: float = 1.0, transcript: float = 1.0, later: float = 0.0):
    """A conversation of 100 s, its times multiplied, and those of its faces moved."""
    words = "one two three four five six seven eight nine ten"
    turns = [("uv"[i % 2], 5 * i, 5 * i + 4, words) for i in range(20)]
    write(folder, turns, [("u", 0, 100, "happiness"), ("v", 0, 100, "neutral")])
    seconds = lambda cell: f"{pd.Timedelta(cell).total_seconds() * faces + later:f}"  # noqa: E731
    edit(folder, lambda t: t.assign(timedelta=t["timedelta"].map(seconds)), FEATURES_FILE)
    times = lambda cells: (cells.astype(float) * transcript).astype(str)  # noqa: E731
    edit(folder, lambda t: t.assign(start=times(t["start"]), stop=times(t["stop"])))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(faces=1000), "its times end about 1,000 times as late as the transcript's"),
        (dict(faces=1e9), "its times end about 1,000,000,000 times as late"),
        (dict(faces=30), "its times end about 10 times as late"),  # numbers of frames
        (dict(transcript=1000), "the transcript's times end about 1,000 times as late as its"),
        (dict(transcript=25), "the transcript's times end about 10 times as late"),
        (dict(later=300), "no frame with a face during a turn"),
        (dict(later=1.6e9), "times as late"),  # since 1970
        (dict(faces=1000, transcript=1000), ""),
        (dict(faces=0.02), ""),  # a camera that was turned off
        (dict(), ""),
    ],
)
def test_cases_two_clocks_are_no_faces(change, said, tmp_path):
    conversation = read_conversation(retimed(tmp_path / "c", **change))
    assert said in conversation.no_faces and bool(said) == bool(conversation.no_faces)
    if said:
        assert {turn.affect for turn in conversation.turns} == {NEUTRAL} and len(conversation.unseen) == 20


def test_turns_without_a_frame_are_known(tmp_path):
    turns = [("u", 0, 3, "a"), ("v", 3, 6, "b"), ("u", 6, 9, "c"), ("v", 9, 12, "d")]
    folder = write(tmp_path / "c", turns)
    edit(folder, lambda t: t[~t["timedelta"].str.endswith(("00:06", "00:07", "00:08", "00:09"))], FEATURES_FILE)
    assert read_conversation(folder).unseen == (2,)
