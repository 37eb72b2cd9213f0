"""One picture a second of a video, decoded by PyAV without decoding more of it than needed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apps.faces import FACE_MODELS
from apps.packages import install, require
from geli.data.candor import FACES, Dropped
from geli.run.errors import first_line

SMOOTH = 20.0  # frames a second from which frames that no other frame needs are left out: they are dense enough without


class Tile(NamedTuple):
    """The part of a picture that shows a person, in pixels."""

    left: int
    top: int
    width: int
    height: int


def watch(
    path: Path, tiles: Mapping[str, Tile | None], seconds: int, face_model: str, on_second: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """The faces of the people in a video, once a second.

    Args:
        tiles: person -> where in the picture; None: the whole picture. seconds: how many, from the beginning.
        face_model: a key of `FACE_MODELS`. on_second: is called with the number of each second that was read.

    Returns:
        Person -> (seconds, 8) probabilities in the order of `FACES`; NaN in seconds without a face.

    Raises:
        Dropped: if the video cannot be read, is less than half as long as `seconds`, or a tile is not in its picture.
        UserError: if a package is missing.
    """
    readers = {person: FACE_MODELS[face_model].load() for person in tiles}
    found = {person: np.full((seconds, len(FACES)), np.nan, dtype=np.float32) for person in tiles}
    last = -1
    for second, picture in pictures(path, seconds):
        for person, tile in tiles.items():
            probabilities = readers[person](_part(picture, tile, path))
            if probabilities is not None:
                found[person][second] = probabilities
        on_second(last := second)
    if last + 1 < seconds / 2:
        raise Dropped(f"{path.name}: ends after {last + 1} seconds, but people speak until second {seconds}")
    return found


def _part(picture: np.ndarray, tile: Tile | None, path: Path) -> np.ndarray:
    if tile is None:
        return picture
    height, width = picture.shape[:2]
    if tile.left + tile.width > width or tile.top + tile.height > height:
        raise Dropped(f"{path.name}: the picture is {width} x {height} pixels, too small for the tile {tuple(tile)}")
    return picture[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]


def pictures(path: Path, seconds: int) -> Iterator[tuple[int, np.ndarray]]:
    """(second, (H, W, 3) RGB uint8) for each second that has a frame, at most `seconds`.

    A second's picture is the first of its frames that is decoded. A keyframe can be decoded alone, another frame only
    after those between it and the keyframe before it. So these are decoded only as far as there are seconds without a
    keyframe, and frames that no other refers to are left out. One picture is in memory at a time.

    Raises:
        Dropped: if the file is no video that can be read.
    """
    av = require("av", "reading videos", install("calls"))
    try:
        with av.open(str(path)) as container:
            keyframes, end = _index(container, _video_stream(container, path))
        if not keyframes:
            raise Dropped(f"{path.name}: no keyframe in it")
        with av.open(str(path)) as container:
            frames = _first_frames(container, _video_stream(container, path), keyframes, min(end, seconds))
            for second, frame in takewhile(lambda item: item[0] < seconds, frames):
                upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))  # phones lie on a side
                yield second, np.ascontiguousarray(upright)
    except av.error.FFmpegError as error:
        raise Dropped(f"{path.name}: cannot be read as a video ({error.strerror or first_line(error)})") from None


def last_needed(keyframes: Sequence[float], end: float) -> list[int | None]:
    """For each keyframe, the last second without a keyframe before the next one, up to which is decoded; None without.

    Args:
        keyframes: their times in seconds. end: seconds; nothing is needed from there on.
    """
    with_keyframe, needed = {int(time) for time in keyframes}, []
    for start, following in zip(keyframes, [*keyframes[1:], end], strict=True):
        seconds = range(int(start) + 1, math.ceil(min(following, end)))
        needed.append(max((second for second in seconds if second not in with_keyframe), default=None))
    return needed


def _first_frames(container, stream, keyframes: Sequence[float], end: float) -> Iterator[tuple[int, object]]:
    """(second, frame) of the first decoded frame of each second. A packet with damaged data is left out."""
    damaged = require("av", "reading videos", install("calls")).error.InvalidDataError
    decoder, needed = stream.codec_context, last_needed(keyframes, end)
    last, number, target, decoding = -1, -1, None, False
    for packet in container.demux(stream):
        if packet.is_keyframe and packet.pts is not None:
            number += 1
            target = needed[number]
            decoding = decoding or target is not None or int(keyframes[number]) > last
        if not decoding:
            continue
        alone = packet.is_keyframe and target is None  # nothing behind it is needed until the next keyframe
        try:
            frames = [*decoder.decode(packet), *(decoder.decode(None) if alone else ())]
        except damaged:
            frames = []
        for frame in frames:
            second = last if frame.pts is None else int(_time(frame.pts, stream))
            if second > last:
                last = second
                yield second, frame
        if alone or (target is not None and last >= target):
            decoder.flush_buffers()
            decoding = False


def _video_stream(container, path: Path):
    stream = container.streams.best("video")
    if stream is None:
        raise Dropped(f"{path.name}: no picture in it")
    stream.codec_context.thread_count = 1  # videos are read in several processes
    if (stream.average_rate or 0) >= SMOOTH:
        stream.codec_context.skip_frame = "NONREF"
    return stream


def _index(container, stream) -> tuple[list[float], float]:
    """The times of the keyframes in the order of the file, and a time behind all frames; nothing is decoded."""
    keyframes, end = [], 0.0
    for packet in container.demux(stream):
        if packet.pts is not None:
            time = _time(packet.pts, stream)
            end = max(end, time + 1e-6)
            if packet.is_keyframe:
                keyframes.append(time)
    return keyframes, end


def _time(pts: int, stream) -> float:
    """Seconds from the beginning of the file."""
    return round(float(pts * stream.time_base) - (stream.container.start_time or 0) / 1e6, 6)
