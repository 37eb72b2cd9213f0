"""A call's folder: what is read of it, what is refused with which words, and what is written."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from apps.calls.calls import Call, read_call, turns_of_call, write_call
from apps.calls.transcripts import Utterance
from apps.calls.video import Tile
from data_utils import read_corpus
from geli.data.candor import FACES, Dropped, read_conversation
from geli.data.writer import write_conversation_of_frames
from geli.run.errors import UserError

RATINGS = "person,name,overall_affect,comment\nana,Ana Silva,8,fine\nben,,,\n"
WORDS = "one two three four five six"
TRANSCRIPT = f"WEBVTT\n\n00:00.000 --> 00:03.000\nAna Silva: {WORDS}\n\n00:03.000 --> 00:06.500\nBen: {WORDS}\n"
TILES = "person,left,top,width,height\nana,0,0,640,360\nben,640,0,640,360\n"


def call_folder(tmp_path, **files):
    """A call of two videos; `files`: name with _ for . -> content (None: no such file)."""
    contents = {"ratings_csv": RATINGS, "zoom_vtt": TRANSCRIPT, "ana_mp4": "", "ben_mp4": "", **files}
    folder = tmp_path / "call"
    folder.mkdir()
    for name, content in contents.items():
        if content is not None:
            (folder / name.replace("_", ".")).write_text(content)
    return folder


def test_a_call_by_hand(tmp_path):
    call = read_call(call_folder(tmp_path, notes_txt="not read"))
    assert call.answers == {"ana": {"overall_affect": 8.0}, "ben": {}}
    assert call.names == {"Ana Silva": "ana", "ben": "ben"}
    assert {video.name: tiles for video, tiles in call.videos.items()} == {
        "ana.mp4": {"ana": None}, "ben.mp4": {"ben": None},
    }  # fmt: skip
    turns, notes = turns_of_call(call, "small")
    assert turns == [Utterance("ana", 0.0, 3.0, WORDS), Utterance("ben", 3.0, 6.5, WORDS)] and not notes


def test_two_people_in_one_video(tmp_path):
    call = read_call(call_folder(tmp_path, ana_mp4=None, ben_mp4=None, gallery_mkv="", tiles_csv=TILES))
    ((video, tiles),) = call.videos.items()
    assert video.name == "gallery.mkv" and tiles == {"ana": Tile(0, 0, 640, 360), "ben": Tile(640, 0, 640, 360)}


def test_one_person_may_have_no_video_and_videos_can_be_left_alone(tmp_path):
    folder = call_folder(tmp_path, ana_mp4=None)
    assert list(read_call(folder).videos.values()) == [{"ben": None}]
    assert read_call(folder, no_video=True).videos == {}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"ratings_csv": None}, "ratings.csv: no such file"),
        ({"ratings_csv": "who,overall_affect\nana,3\n"}, "ratings.csv: expected a column person"),
        ({"ratings_csv": "person;overall_affect\nana;3\n"}, "ratings.csv: expected a column person"),
        ({"ratings_csv": "person,overall_affect\nana,3\n"}, "expected one row for each of two people, found ana"),
        ({"ratings_csv": "person,overall_affect\nana,3\nana,4\n"}, "two people, found ana, ana"),
        ({"ratings_csv": "person,overall_affect\nana,3\nben\n"}, "a row has more or fewer cells than the header"),
        ({"ratings_csv": 'person,overall_affect\nana,3\n"ben" x,4\n'}, "ratings.csv: not a readable CSV file"),
        ({"ratings_csv": 'person,overall_affect\nana,3\n"a,b",4\n'}, "'a,b' cannot be a person's name"),
        ({"ratings_csv": "person,stars\nana,3\nben,4\n"}, "no question of CANDOR's survey in it"),
        ({"ratings_csv": "person,overall_affect\nana,\nben,\n"}, "nobody answered anything"),
        ({"ratings_csv": "person,overall_affect\nana,80\nben,\n"}, "is '80', expected a number from 0 to 10"),
        ({"ratings_csv": "person,overall_affect\nana,good\nben,\n"}, "overall_affect is 'good', expected a number"),
        ({"teams_vtt": TRANSCRIPT}, "more than one transcript: teams.vtt, zoom.vtt; keep one"),
        ({"ana_mp4": None, "ben_mp4": None}, ".webm, .mov, .m4v, .avi) in it; --no_video does without"),
        ({"anna_mp4": ""}, "anna.mp4: expected one video of each of ana and ben, or tiles.csv"),
        ({"ana_webm": ""}, "ana.webm: expected one video of each of ana and ben"),
        ({"tiles_csv": TILES}, "tiles.csv is for one video with both people, found ana.mp4, ben.mp4"),
        ({"tiles_csv": TILES.replace("640,360", "x,360"), "ana_mp4": None}, "expected whole numbers in the columns"),
        ({"tiles_csv": TILES.replace("0,0,640", "-1,0,640"), "ana_mp4": None}, "begins outside of the picture"),
        ({"tiles_csv": TILES.replace("ana", "eve"), "ana_mp4": None}, "has eve and ben, ratings.csv has ana and ben"),
    ],
)  # fmt: skip
def test_what_is_missing_or_contradictory_is_said(files, reason, tmp_path):
    with pytest.raises(Dropped) as dropped:
        read_call(call_folder(tmp_path, **files))
    assert reason in str(dropped.value) and "\n" not in str(dropped.value)


def test_a_call_in_which_one_person_says_nothing_is_refused(tmp_path):
    call = read_call(call_folder(tmp_path, zoom_vtt=TRANSCRIPT.replace("Ben:", "Ana Silva:")))
    with pytest.raises(Dropped, match="ben says nothing in the transcript"):
        turns_of_call(call, "small")


# ---------------------------------------------------------------------------------------------------------------------
# Speech


class FakeWhisper:
    """What faster-whisper's model does, with two sentences."""

    def __init__(self, name):
        assert name == "tiny"

    def transcribe(self, path, vad_filter):
        said = {
            "ana.mp4": [(0.5, 2.0, " Hello. "), (4.0, 5.0, "How are you?")],
            "ben.mp4": [(2.5, 3.0, "Hi."), (9, 9, " ")],
        }
        name = path.rpartition("/")[2]
        return (SimpleNamespace(start=a, end=b, text=text) for a, b, text in said[name]), None


def test_a_call_without_a_transcript_is_transcribed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=FakeWhisper))
    turns, _ = turns_of_call(read_call(call_folder(tmp_path, zoom_vtt=None)), "tiny")
    assert turns == [
        Utterance("ana", 0.5, 2.0, "Hello."),
        Utterance("ben", 2.5, 3.0, "Hi."),
        Utterance("ana", 4.0, 5.0, "How are you?"),
    ]


def test_a_call_without_a_transcript_needs_a_video_of_each_person_and_faster_whisper(tmp_path, monkeypatch):
    folder = call_folder(tmp_path, zoom_vtt=None)
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match=r"a call without a transcript needs .* pip install faster-whisper==1\.2\.1"):
        turns_of_call(read_call(folder), "tiny")
    (folder / "ana.mp4").unlink()
    with pytest.raises(Dropped, match=r"no transcript \(.vtt, .srt, .sbv\), and no video of each person"):
        turns_of_call(read_call(folder), "tiny")


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def shown(*faces):
    """(seconds, 8) probabilities that give each face most; None: no face."""
    rows = np.full((len(faces), 8), 0.04, dtype=np.float32)
    for row, face in zip(rows, faces, strict=True):
        row[:] = np.nan if face is None else row
        row[FACES.index(face or "neutral")] += 0.68
    return rows


TURNS = [Utterance("ana", 0.0, 3.0, WORDS), Utterance("ben", 3.0, 6.5, WORDS)]


@pytest.fixture
def call(tmp_path):
    return read_call(call_folder(tmp_path))


def test_a_written_call_is_read_as_it_was(call, tmp_path):
    happy_while_ana_speaks = shown("happiness", "happiness", None, None, "sadness", "sadness", None)
    write_call(tmp_path / "out" / "call", call, TURNS, {"ben": happy_while_ana_speaks})  # no video of ana
    ana, ben = read_conversation(tmp_path / "out" / "call").turns
    assert (FACES[ana.affect], ana.happy_share, FACES[ben.affect]) == ("happiness", 1.0, "neutral")
    corpus = read_corpus(tmp_path / "out", "overall_affect")
    assert corpus.counts()["trajectories"] == 1 and corpus.counts()["dropped_conversations"] == 0
    assert (tmp_path / "out" / "call" / "audio_video_features.csv").read_text().count(",,,,,,,") == 7 + 3
    for path in (tmp_path / "out" / "call").rglob("*.csv"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_call_without_videos_is_read_and_has_no_faces(call, tmp_path):
    write_call(tmp_path / "out" / "call", call, TURNS, {})
    conversation = read_conversation(tmp_path / "out" / "call")
    assert len(conversation.turns) == 2 and conversation.no_faces == "audio_video_features.csv: no such file"


def test_a_call_without_any_face_is_refused_and_nothing_of_it_is_written(call, tmp_path):
    with pytest.raises(Dropped, match="no face was found in any second of its videos; --no_video does without"):
        write_call(tmp_path / "out" / "call", call, TURNS, {"ana": shown(*[None] * 7), "ben": shown(*[None] * 7)})
    assert not list((tmp_path / "out").iterdir())


def test_what_the_reader_would_drop_is_not_written(call, tmp_path):
    with pytest.raises(Dropped, match="2 speakers are expected, 1 found"):
        write_call(tmp_path / "out" / "call", call, TURNS[:1], {"ben": shown(*["neutral"] * 4)})
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("frame", [[0.1] * 7, [1.1, *[0] * 7], [float("nan"), *[0] * 7], [-0.1, *[0] * 7]])
def test_the_writer_refuses_what_are_no_probabilities(frame, tmp_path):
    with pytest.raises(ValueError, match="expected 8 numbers from 0 to 1"):
        write_conversation_of_frames(tmp_path / "c", TURNS, {"ana": [None, frame]}, {})


def test_names_with_accents_are_the_same_in_either_unicode_form(tmp_path):
    ratings = RATINGS.replace("ana", "Jos\u00e9")  # composed, as people type it
    folder = call_folder(tmp_path, ratings_csv=ratings, ana_mp4=None)
    (folder / "jose\u0301.MP4").touch()  # decomposed, as a file system may keep it
    call = read_call(folder)
    assert isinstance(call, Call) and {"Jos\u00e9": None} in call.videos.values()
