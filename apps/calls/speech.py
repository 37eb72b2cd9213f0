"""Transcripts of recordings that have none, by faster-whisper, on this machine."""

from collections.abc import Mapping
from pathlib import Path

from apps.calls.transcripts import Utterance
from apps.packages import require
from geli.data.candor import Dropped
from geli.run.errors import first_line

INSTALL_WHISPER = "pip install faster-whisper==1.2.1"


def transcribe(videos: Mapping[str, Path], model: str) -> list[Utterance]:
    """What each person says in the sound of the own video, in the order in which it begins.

    Args:
        videos: person -> video with that person's voice alone.
        model: name or folder of a model of faster-whisper. A name is downloaded when it is used for the first time.

    Raises:
        UserError: if faster-whisper is not installed. Dropped: if a video has no sound that can be read.
    """
    whisper = require("faster_whisper", "a call without a transcript", INSTALL_WHISPER)
    loaded = whisper.WhisperModel(model)
    utterances = []
    for person, video in videos.items():
        try:
            segments, _ = loaded.transcribe(str(video), vad_filter=True)
            heard = [Utterance(person, part.start, part.end, part.text.strip()) for part in segments]
        except Exception as error:  # a library that reads files of others raises anything
            raise Dropped(f"{video.name}: its sound cannot be transcribed ({first_line(error)})") from None
        utterances += [said for said in heard if said.text]
    if not utterances:
        raise Dropped("nothing is said in the videos")
    return sorted(utterances, key=lambda utterance: utterance.start)
