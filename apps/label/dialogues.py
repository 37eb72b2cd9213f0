"""Conversations to be scored, read one at a time: from CANDOR's layout, or from chat messages in JSONL files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from geli.data.candor import Dropped, read_turns
from geli.data.chats import ChatFiles, chat_files
from geli.data.messages import ROLES, Turns
from geli.run.errors import UserError


class Dialogue(NamedTuple):
    """A conversation.

    Attributes:
        id: its name. names, speakers, texts: of each of its turns.
        agents: the speakers whose turns get rewards. For each of them, all others are the user.
    """

    id: str
    names: Sequence[str]
    speakers: Sequence[str]
    texts: Sequence[str]
    agents: Sequence[str]

    def seen_from(self, agent: str) -> Turns:
        """(is_agent, utterance) of each turn."""
        return [(speaker == agent, text) for speaker, text in zip(self.speakers, self.texts, strict=True)]


class Source(Protocol):
    """Conversations in an order that does not depend on the file system.

    Attributes:
        total: how many, with those that are dropped; None where it is not known before they are read.
    """

    total: int | None

    def state(self) -> list[tuple]:
        """(name, size, time of change) of all files, to see whether they are as they were."""

    def __iter__(self) -> Iterator[Dialogue | tuple[str, str]]:
        """Each conversation, or the name and the reason of one that is dropped."""


class CandorFolder:
    """The conversations of a folder in CANDOR's layout. Only transcripts are read, and both people's turns are scored.

    Args:
        folder: with a folder for each conversation. transcript: one of `candor.TRANSCRIPTS`.
    """

    def __init__(self, folder: Path, transcript: str):
        self.transcript = transcript
        self.folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.total = len(self.folders)

    def state(self) -> list[tuple]:
        """See `Source`."""
        return _states(path / "transcription" / f"transcript_{self.transcript}.csv" for path in self.folders)

    def __iter__(self) -> Iterator[Dialogue | tuple[str, str]]:
        for folder in self.folders:
            try:
                turns, speakers, _ = read_turns(folder, self.transcript)
                names, people, texts = zip(*((t.turn_id, t.speaker, t.utterance) for t in turns), strict=True)
                yield Dialogue(folder.name, names, people, texts, speakers)
            except Dropped as reason:
                yield folder.name, str(reason)


class Chats:
    """The chats of JSONL files (`geli.data.chats`), rated or not. The assistant's messages are scored, and both
    people's where roles are names; a turn's name is its place in the list.

    Args:
        paths: of the files.

    Raises:
        UserError: if a file begins in another form than JSONL.
    """

    total = None

    def __init__(self, paths: Sequence[Path]):
        self.files = ChatFiles(paths, rated=False)

    def state(self) -> list[tuple]:
        """See `Source`."""
        return _states(self.files.paths)

    def __iter__(self) -> Iterator[Dialogue | tuple[str, str]]:
        for place, chat in self.files.chats():
            if isinstance(chat, str):
                yield place, chat
            else:
                names, people, texts = zip(*((t.turn_id, t.speaker, t.utterance) for t in chat.turns), strict=True)
                agents = ("assistant",) if set(people) <= ROLES.keys() else chat.speakers
                yield Dialogue(chat.id, names, people, texts, agents)


def open_source(path: Path, transcript: str) -> Source:
    """The conversations of a JSONL file, of a folder with JSONL files, or of a folder in CANDOR's layout.

    Raises:
        UserError: if there is no such file or folder, or nothing in it.
    """
    if not path.exists():
        raise UserError(f"{path}: expected a JSONL file, or a folder of conversations, found nothing")
    if files := chat_files(path):
        return Chats(files)
    source = CandorFolder(path, transcript)
    if not source.total:
        raise UserError(f"{path}: expected JSONL files, or a folder for each conversation, found neither")
    return source


def _states(paths) -> list[tuple]:
    states = []
    for path in paths:
        try:
            status = os.stat(path)
            states.append((str(path), status.st_size, status.st_mtime_ns))
        except OSError:
            states.append((str(path), 0, 0))
    return states
