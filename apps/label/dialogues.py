"""Conversations to be scored, read one at a time: from CANDOR's layout, or from chat messages in JSONL files."""

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from geli.data.candor import MOST_BYTES, Dropped, read_turns
from geli.nets.forms import ROLES, Turns, read_messages
from geli.run.errors import UserError, one_line

MAGIC = {  # first bytes of files that are no JSONL -> what they are
    codecs.BOM_UTF16_LE: "UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "gzip: unpack it",
    b"PAR1": "Parquet: write its rows as JSON, as with pandas",
    b"version https://git-lfs.": "a pointer to it: run git lfs pull in its folder",
}


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


class ChatFiles:
    """The conversations of JSONL files, one a line: a list of chat messages, or {"messages": [...]} with an optional
    "id". The assistant's messages are scored; a turn's name is its place in the list. Of several conversations with one
    id, all but the first are dropped.

    Args:
        paths: of the files.

    Raises:
        UserError: if a file begins in another form than JSONL.
    """

    total = None

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths
        for path in paths:
            if form := other_form(path):
                raise UserError(f"{path}: expected JSONL in UTF-8, one conversation a line, found {form}")

    def state(self) -> list[tuple]:
        """See `Source`."""
        return _states(self.paths)

    def __iter__(self) -> Iterator[Dialogue | tuple[str, str]]:
        ids = set()
        for path in self.paths:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        place = f"{path.name}:{number}"
                        read = self._read(line.removeprefix(codecs.BOM_UTF8), place)
                        if isinstance(read, Dialogue) and read.id in ids:
                            read = place, "an id that a conversation before it has"
                        ids.add(read[0])
                        yield read

    def _read(self, line: bytes, name: str) -> Dialogue | tuple[str, str]:
        try:
            content = json.loads(line.decode("utf-8"))
            messages = content.get("messages") if isinstance(content, dict) else content
            if messages is None and isinstance(content, dict):
                return name, f"no messages, but {one_line(', '.join(content))[:80]}"
            texts = [text for _, text in read_messages(messages)]
            kept = [place for place, message in enumerate(messages) if message["role"] in ROLES]
            "".join(texts).encode()
        except UnicodeError:
            return name, "text that is not valid Unicode"
        except (ValueError, RecursionError):
            return name, "not JSON"
        except UserError as error:
            return name, str(error)
        if isinstance(content, dict) and isinstance(content.get("id"), (str, int)):
            name = str(content["id"])
        return Dialogue(name, list(map(str, kept)), [messages[i]["role"] for i in kept], texts, ("assistant",))


def other_form(path: Path) -> str:
    """The form of a file that is not JSONL as `ChatFiles` reads it, by its beginning; empty for one that may be."""
    with open(path, "rb") as file:
        first = next((line for line in iter(partial(file.readline, MOST_BYTES), b"") if line.strip()), b"")
    for start, form in MAGIC.items():
        if first.startswith(start):
            return form
    try:
        content = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        alone = first.removeprefix(codecs.BOM_UTF8).strip() in (b"[", b"{") and path.stat().st_size > len(first)
        return "JSON over several lines: write each conversation in a line of its own, as with jq -c" if alone else ""
    if isinstance(content, dict) and "conversations" in content:
        return "ShareGPT's form (conversations of from and value): rename them to messages of role and content"
    nested = isinstance(content, list) and content and not (isinstance(content[0], dict) and "role" in content[0])
    return "an array of conversations: write each in a line of its own, as with jq -c .[]" if nested else ""


def open_source(path: Path, transcript: str) -> Source:
    """The conversations of a JSONL file, of a folder with JSONL files, or of a folder in CANDOR's layout.

    Raises:
        UserError: if there is no such file or folder, or nothing in it.
    """
    if path.is_file():
        return ChatFiles([path])
    if not path.is_dir():
        raise UserError(f"{path}: expected a JSONL file, or a folder of conversations, found nothing")
    source = ChatFiles(sorted(path.glob("*.jsonl")))
    if not source.paths:
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
