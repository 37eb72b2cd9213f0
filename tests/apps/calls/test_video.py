"""One picture a second: the same as from decoding everything, in whatever way a video is made."""

import struct
from types import SimpleNamespace

import av
import numpy as np
import pytest
from face_clips import MAN, WOMAN, write_video

from apps.calls.video import Tile, _first_frames, _index, last_needed, pictures, watch
from apps.faces import FACE_MODELS
from geli.data.candor import FACES, Dropped

FACES_OF = {MAN: ["neutral", "happiness", None, "happiness", "neutral"], WOMAN: ["sadness"] * 3 + ["happiness"] * 2}
SMALL = (320, 180)


def shown(found):
    """The class of each second; None without a face."""
    return [None if np.isnan(row).any() else FACES[row.argmax()] for row in found]


def all_frames(path):
    """Second -> its frames, from decoding everything."""
    frames = {}
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frames.setdefault(int(frame.time), []).append(frame.to_ndarray(format="rgb24"))
    return frames


@pytest.mark.parametrize(
    ("keyframes", "end", "needed"),
    [
        ([0.0], 3.5, [3]),
        ([0.0, 1.0, 2.0], 2.9, [None, None, None]),
        ([0.0, 4.5, 8.0], 9.5, [3, 7, 9]),  # 4 has a keyframe of its own
        ([0.5, 0.9, 3.2], 3.4, [None, 2, None]),
        ([0.0, 4.0], 2.0, [1, None]),  # only two seconds are wanted
    ],
)
def test_how_far_to_decode_by_hand(keyframes, end, needed):
    assert last_needed(keyframes, end) == needed


@pytest.mark.parametrize("gop", [1, 10, 30, 45, 250])
def test_pictures_are_those_of_decoding_everything(gop, face_clips, tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, (MAN, FACES_OF[MAN]), gop=gop, size=SMALL)
    everything, found = all_frames(path), dict(pictures(path, 100))
    assert list(found) == list(everything) == [0, 1, 2, 3, 4]
    for second, picture in found.items():
        assert any((picture == frame).all() for frame in everything[second])
    assert [second for second, _ in pictures(path, 3)] == [0, 1, 2]
    assert shown(watch(path, {"ana": None}, 5, "fer", lambda _: None)["ana"]) == FACES_OF[MAN]


class CountingDecoder:
    """A decoder that counts the frames that it gives."""

    def __init__(self, decoder):
        self.decoder, self.flush_buffers, self.frames = decoder, decoder.flush_buffers, 0

    def decode(self, packet):
        frames = self.decoder.decode(packet)
        self.frames += len(frames)
        return frames


@pytest.mark.parametrize(("gop", "most"), [(1, 5), (30, 5), (45, 60), (250, 125)])
def test_no_more_is_decoded_than_needed(gop, most, face_clips, tmp_path):
    write_video(tmp_path / "v.mp4", (MAN, FACES_OF[MAN]), gop=gop, size=SMALL)
    with av.open(str(tmp_path / "v.mp4")) as container:
        keyframes, end = _index(container, container.streams.video[0])
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        counting = CountingDecoder(stream.codec_context)
        fake = SimpleNamespace(codec_context=counting, time_base=stream.time_base, container=container)
        demuxing = SimpleNamespace(demux=lambda _: container.demux(stream))
        assert [second for second, _ in _first_frames(demuxing, fake, keyframes, end)] == [0, 1, 2, 3, 4]
    assert counting.frames <= most


@pytest.mark.parametrize("name", ["v.webm", "v.mkv", "v.avi"])
def test_other_containers_and_codecs(name, face_clips, tmp_path):
    codec = {"v.webm": "libvpx", "v.mkv": "libx264", "v.avi": "mpeg4"}[name]
    write_video(tmp_path / name, (MAN, FACES_OF[MAN]), codec=codec, size=SMALL)
    assert shown(watch(tmp_path / name, {"ana": None}, 5, "fer", lambda _: None)["ana"]) == FACES_OF[MAN]


def test_two_people_in_one_picture(face_clips, tmp_path):
    write_video(tmp_path / "v.mp4", *FACES_OF.items())
    tiles = {"ben": Tile(0, 0, 640, 360), "ana": Tile(640, 0, 640, 360)}
    seconds = []
    found = watch(tmp_path / "v.mp4", tiles, 5, "fer", seconds.append)
    assert {person: shown(rows) for person, rows in found.items()} == {"ben": FACES_OF[MAN], "ana": FACES_OF[WOMAN]}
    assert seconds == [0, 1, 2, 3, 4]
    with pytest.raises(Dropped, match=r"1280 x 360 pixels, too small for the tile \(641, 0, 640, 360\)"):
        watch(tmp_path / "v.mp4", {"ana": Tile(641, 0, 640, 360)}, 5, "fer", seconds.append)


def test_a_video_that_ends_early_has_lost_seconds_and_one_that_ends_far_too_early_is_refused(face_clips, tmp_path):
    write_video(tmp_path / "v.mp4", (MAN, FACES_OF[MAN]), size=SMALL)
    found = watch(tmp_path / "v.mp4", {"ben": None}, 10, "fer", lambda _: None)["ben"]
    assert shown(found) == FACES_OF[MAN] + [None] * 5
    with pytest.raises(Dropped, match=r"v\.mp4: ends after 5 seconds, but people speak until second 11"):
        watch(tmp_path / "v.mp4", {"ben": None}, 11, "fer", lambda _: None)


def test_pictures_of_a_phone_that_lay_on_its_side_are_upright(face_clips, tmp_path):
    write_video(tmp_path / "v.mp4", (MAN, ["happiness"] * 2))
    upright = dict(pictures(tmp_path / "v.mp4", 1))[0]
    content = (tmp_path / "v.mp4").read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # matrix in the track's header
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 360 << 16, 0, 1 << 30)  # clockwise when shown
    at = content.index(identity, content.index(b"tkhd"))
    (tmp_path / "v.mp4").write_bytes(content[:at] + quarter + content[at + len(identity) :])
    turned = dict(pictures(tmp_path / "v.mp4", 1))[0]
    assert (turned == np.rot90(upright, -1)).all()
    assert FACE_MODELS["fer"].load()(turned) is None  # sideways faces are not found


def test_damaged_packets_are_left_out(face_clips, tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, (MAN, ["happiness"] * 6), gop=30, size=SMALL)
    with av.open(str(path)) as container:
        third = [packet for packet in container.demux(video=0) if packet.is_keyframe][2]
    content = bytearray(path.read_bytes())
    content[third.pos : third.pos + third.size] = b"\xff" * third.size
    path.write_bytes(content)
    found = shown(watch(path, {"ben": None}, 6, "fer", lambda _: None)["ben"])
    assert found[:2] + found[3:] == ["happiness"] * 5 and len(found) == 6


@pytest.mark.parametrize("content", [b"", b"no video at all", "cut"])
def test_what_is_no_video_is_refused_with_its_name(content, face_clips, tmp_path):
    path = tmp_path / "v.mp4"
    content = (face_clips / MAN).read_bytes()[:100_000] if content == "cut" else content
    path.write_bytes(content)
    with pytest.raises(Dropped, match=r"^v\.mp4: cannot be read as a video"):
        list(pictures(path, 10))
    path.unlink()
    with pytest.raises(Dropped, match=r"^v\.mp4: cannot be read as a video"):
        list(pictures(path, 10))


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with pytest.raises(Dropped, match=r"v\.mp4: no picture in it"):
        list(pictures(tmp_path / "v.mp4", 10))
