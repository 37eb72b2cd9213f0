"""The cache of conversations that were read."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from geli.data.candor import FEATURES_FILE, READER_VERSION, SURVEY_FILE, Conversation, Turn
from geli.run.errors import first_line
from geli.run.files import atomic_path, private_folder, remove_stale_temporaries

CHECKSUM_BYTES = 32  # of SHA-256, in front of the table
# list items are named as Parquet names them, so that the schema that is read equals the one that was written
_TEXTS, _NUMBERS, _INTEGERS = (pa.list_(pa.field("element", kind)) for kind in (pa.string(), pa.float64(), pa.int32()))
TURN_COLUMNS = {  # type of each field of `Turn`; a speaker is a number
    "turn_id": _TEXTS, "speaker": _INTEGERS, "start": _NUMBERS, "stop": _NUMBERS, "utterance": _TEXTS,
    "n_words": _INTEGERS, "affect": _INTEGERS, "happy_share": _NUMBERS, "reaction": _INTEGERS, "rating": _NUMBERS,
}  # fmt: skip
COLUMNS = pa.schema({
    "source": pa.binary(), "signature": pa.string(), "about": pa.string(),  # about: JSON of all but the turns
    **{name: TURN_COLUMNS[name] for name in Turn._fields},
})  # fmt: skip


class ConversationCache:
    """The conversations of a data folder or of chats in one Parquet file behind its checksum, a row a conversation.

    A row has a source (a folder's name, or a chat's file and line) and is used if the signature of that is the same;
    the file, if it is undamaged and was written with the same `READER_VERSION`. The file, in the `folder` of all
    caches, holds text, so only its owner can read it.

    Args:
        transcript: which one is read of each folder; "" for chats.
    """

    def __init__(self, folder: str | Path, data_dir: str | Path, transcript: str):
        self.transcript = transcript
        source = repr((str(Path(data_dir).resolve()), transcript)).encode("utf-8", "surrogateescape")
        self.path = Path(folder) / f"conversations-{hashlib.sha256(source).hexdigest()[:16]}.cache"
        self._schema = COLUMNS.with_metadata({"reader_version": str(READER_VERSION)})
        remove_stale_temporaries(self.path.parent)
        self._rows = self._read()

    def signature(self, folder: Path) -> str:
        """Size and times of a conversation's files."""
        transcript = folder / "transcription" / f"transcript_{self.transcript}.csv"
        files = []
        for path in (transcript, folder / FEATURES_FILE, folder / SURVEY_FILE):
            try:
                status = path.stat()
                files.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
            except OSError:
                files.append(None)
        return json.dumps(files)

    def get(self, source: str, signature: str) -> Conversation | None:
        """The source's conversation; None if it must be read (dropped conversations always are)."""
        row = self._rows.get(source)
        return row[1] if row and row[0] == signature else None

    def update(self, conversations: dict[str, tuple[str, Conversation]]) -> None:
        """Replaces the file if it has other rows. `conversations`: source -> (signature from before reading, the
        conversation)."""
        if {source: row[0] for source, row in self._rows.items()} == {s: row[0] for s, row in conversations.items()}:
            return
        rows = []
        for source, (signature, conversation) in conversations.items():
            number = {user: i for i, user in enumerate(conversation.speakers)}
            columns = dict(zip(Turn._fields, map(list, zip(*conversation.turns, strict=True)), strict=True))
            columns["speaker"] = [number[user] for user in columns["speaker"]]
            about = [conversation.id, conversation.speakers, conversation.answers, sorted(conversation.questions)]
            more = [conversation.skipped_turns, conversation.off_scale, conversation.no_faces, conversation.unseen]
            columns["about"] = json.dumps([*about, *more])
            columns["source"] = source.encode("utf-8", "surrogateescape")
            columns["signature"] = signature
            rows.append(columns)
        buffer = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows, self._schema), buffer, compression="zstd")
        content = buffer.getvalue().to_pybytes()
        private_folder(self.path.parent)
        with atomic_path(self.path, every_process=True, private=True) as temporary:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)

    def _read(self) -> dict[str, tuple[str, Conversation]]:
        """Source -> (signature, conversation); {} without a file that can be used."""
        try:
            content = self.path.read_bytes()
            checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
            if checksum != hashlib.sha256(content).digest():
                raise ValueError("its checksum is wrong")
            file = parquet.ParquetFile(pa.BufferReader(content))
            if not file.schema_arrow.equals(self._schema, check_metadata=True):
                raise ValueError("another version of the reader wrote it")
            return dict(map(_conversation, *file.read().to_pydict().values()))
        except FileNotFoundError:
            return {}
        except Exception as error:  # whatever is wrong with a cache, the conversations can be read
            print(f"Cache: {self.path} is not used ({first_line(error)})")
            return {}


def _conversation(source: bytes, signature: str, about: str, turn_ids, speaker, *columns):
    """A row of the file: (source, (signature, conversation))."""
    name, speakers, answers, questions, skipped, off_scale, no_faces, unseen = json.loads(about)
    turns = tuple(map(Turn, turn_ids, [speakers[i] for i in speaker], *columns))
    questions, skipped = frozenset(questions), Counter(skipped)
    more = (skipped, off_scale, no_faces, tuple(unseen))
    conversation = Conversation(name, tuple(speakers), turns, answers, questions, *more)
    return source.decode("utf-8", "surrogateescape"), (signature, conversation)
