"""What need not be computed twice: encoded turns and read conversations, kept on disk under `{output_dir}/cache/`.

Files appear there whole or not at all, so runs at the same time and runs that are killed do no harm; a file that is
damaged, or was made of anything else than what is asked for, is not used. Both are data, never code.
"""

import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

import cli
import data_utils
from cli import REWARD_CLASSES
from data_utils import FACES, FEATURES_FILE, SURVEY_FILE, Conversation, Turn
from runs import atomic_path, checksum, first_line, private_folder, sweep_old, versions

# ---------------------------------------------------------------------------------------------------------------------
# Conversations as they were read


DIGEST_BYTES = 32
MOST_EXPANDED = 500  # times the size of its file that text may unpack to


def _digest_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class ConversationCache:
    """Everything that was read of a data folder, in one columnar file (behind its own checksum), a row a conversation.

    A row is used while none of its conversation's three files has changed (by size and times), and the file while the
    code that reads conversations has not. It holds text: only its owner can read it.

    Args:
        folder: of all caches. data_dir, transcript: what is read.
    """

    def __init__(self, folder: str | Path, data_dir: Path, transcript: str):
        self.transcript = transcript
        what = repr((str(Path(data_dir).resolve()), transcript)).encode("utf-8", "surrogateescape")
        self.path = Path(folder) / f"conversations-{hashlib.sha256(what).hexdigest()[:16]}.cache"
        code = (data_utils.__file__, cli.__file__, __file__)
        self._code = hashlib.sha256(b"".join(Path(module).read_bytes() for module in code)).hexdigest()
        sweep_old(self.path.parent)
        self._rows = self._read()

    def signature(self, folder: Path) -> str:
        """Size and times of a conversation's files."""
        paths = (folder / "transcription" / f"transcript_{self.transcript}.csv", folder / FEATURES_FILE)
        found = []
        for path in (*paths, folder / SURVEY_FILE):
            try:
                stat = path.stat()
                found.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            except OSError:
                found.append(None)
        return json.dumps(found)

    def get(self, folder: Path) -> Conversation | None:
        """The conversation; None if it has to be read, as one that was dropped always has."""
        row = self._rows.get(folder.name)
        return row[1] if row and row[0] == self.signature(folder) else None

    def has_more_than(self, folders: Iterable[Path]) -> bool:
        """Whether it holds a conversation that is in none of the folders any more."""
        return bool(self._rows.keys() - {folder.name for folder in folders})

    def write(self, found: dict[Path, tuple[str | None, Conversation]]) -> None:
        """Replaces the file. `found`: folder -> (signature from before it was read; None: as known), what was read."""
        import pyarrow as pa
        from pyarrow import parquet

        rows = []
        for folder, (signature, content) in found.items():
            signature = signature or self._rows[folder.name][0]
            row = {"folder": folder.name.encode("utf-8", "surrogateescape"), "signature": signature}
            speakers = {user: i for i, user in enumerate(content.speakers)}
            about = {
                "speakers": content.speakers,
                "answers": content.answers,
                "questions": sorted(content.questions),
                "skipped": content.skipped_turns,
            }
            turns = zip(*content.turns, strict=True)
            columns = dict(zip(Turn._fields, map(list, turns), strict=True))
            columns["speaker"] = [speakers[user] for user in columns["speaker"]]  # the same two ids, again and again
            rows.append({**row, "about": json.dumps(about), **columns})
        number, text = pa.list_(pa.float64()), pa.list_(pa.string())
        small = pa.list_(pa.int32())
        types = {"turn_id": text, "speaker": small, "start": number, "stop": number, "utterance": text}
        types |= {"n_words": small, "affect": small, "happy_share": number}
        columns = {
            "folder": pa.binary(),
            "signature": pa.string(),
            "about": pa.string(),
            **types,
        }
        table = pa.Table.from_pylist(rows, pa.schema(columns.items(), metadata={"code": self._code}))
        content = pa.BufferOutputStream()
        parquet.write_table(table, content, compression="zstd")
        content = content.getvalue().to_pybytes()
        private_folder(self.path.parent)
        with atomic_path(self.path, everyone=True) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(_digest_of(content) + content)

    def _read(self) -> dict[str, tuple[str, Conversation]]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            content = self.path.read_bytes()
            digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            if digest != _digest_of(content):
                raise ValueError("its content is not what was written")
            file = parquet.ParquetFile(pa.BufferReader(content))
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            held = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
            if max(held, sum(group.total_byte_size for group in groups)) > MOST_EXPANDED * len(content) + (1 << 24):
                raise ValueError("it would unpack to much more than any conversation does")
            if (file.schema_arrow.metadata or {}).get(b"code", b"").decode() != self._code:
                return {}
            columns = file.read().to_pydict()
            return dict(map(_conversation, *columns.values()))
        except FileNotFoundError:
            return {}
        except (
            OSError,
            pa.ArrowException,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            print(f"Cache: {self.path} is not used ({first_line(error)})")
            return {}


def _conversation(folder: bytes, signature: str, about: str, *columns):
    """A row of the file: (folder's name, (signature, the conversation)).

    Raises:
        ValueError: if no conversation is like that, whatever the checksum says.
    """
    name = folder.decode("utf-8", "surrogateescape")
    known = json.loads(about)
    turn_ids, speaker, start, stop, utterance, n_words, affect, share = columns
    speakers = tuple(known["speakers"])
    texts = (*speakers, *turn_ids, *utterance, *known["questions"], *known["skipped"], *known["answers"])
    answers = [value for given in known["answers"].values() for value in given.values()]
    numbers = np.array([*start, *stop, *share, *n_words, *known["skipped"].values(), *answers], dtype=np.float64)
    sound = (
        len(set(speakers)) == 2
        and set(speaker) == {0, 1}
        and {len(column) for column in columns} == {len(turn_ids)}
        and all(isinstance(text, str) for text in texts)
        and np.isfinite(numbers).all()
        and all(0 <= a <= b for a, b in zip(start, stop, strict=True))
        and 0 <= min(affect) <= max(affect) < len(FACES)
        and set(known["answers"]) <= set(speakers)
        and set(known["questions"]) <= set(REWARD_CLASSES)
    )
    if not sound:
        raise ValueError(f"no conversation is like its {name[:40]!r}")
    turns = tuple(map(Turn, turn_ids, [speakers[i] for i in speaker], start, stop, utterance, n_words, affect, share))
    questions, skipped = frozenset(known["questions"]), Counter(known["skipped"])
    return name, (signature, Conversation(name, speakers, turns, known["answers"], questions, skipped))


# ---------------------------------------------------------------------------------------------------------------------
# Features of encoded turns

FLUSH_SECONDS = 60  # what a killed run may lose


def encoder_fingerprint(encoder, numerics: str) -> str:
    """A hash of everything that a turn's features depend on but its tokens: weights, architecture, numerics, versions.

    Args:
        encoder: a `models.TurnEncoder`. numerics: device and type of the forward pass.
    """
    found = hashlib.sha256()
    found.update(repr((numerics, encoder.model.config.to_json_string(), type(encoder.model).__name__)).encode())
    adapters = getattr(encoder.model, "peft_config", {})
    found.update(repr(sorted((name, str(config.to_dict())) for name, config in adapters.items())).encode())
    found.update(repr([versions()[package] for package in ("torch", "transformers", "peft")]).encode())
    for name, tensor in sorted(encoder.encoder.state_dict().items()):
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _digest(pair) -> bytes:
    """16 bytes that name a tokenised pair, whatever text and tokenizer it came from."""
    return hashlib.blake2b(pair.ids.tobytes() + pair.first_segment.to_bytes(4, "little"), digest_size=16).digest()


class FeatureCache:
    """Features of tokenised pairs by one encoder, in `folder`.

    Args:
        folder: of all features. fingerprint: of the encoder (`encoder_fingerprint`). width: of its features; None:
            any.
    """

    def __init__(self, folder: Path, fingerprint: str, width: int | None = None):
        self.folder, self.fingerprint, self.width = Path(folder) / fingerprint, fingerprint, width
        sweep_old(self.folder)

    def encode(self, pairs: Sequence, encode: Callable) -> torch.Tensor:
        """(n, hidden) features of `pairs`, each distinct pair encoded at most once, ever.

        Args:
            pairs: n tokenised pairs. encode: (pairs, on_batch) -> features of those that are missing;
                on_batch(indices, features) is called as they come.
        """
        digests = [_digest(pair) for pair in pairs]
        distinct = dict(zip(digests, pairs, strict=True))
        known = self._read_all(set(distinct))
        missing = {digest: pair for digest, pair in distinct.items() if digest not in known}
        names, fresh, last = list(missing), [], time.monotonic()

        def on_batch(indices, features):
            nonlocal fresh, last
            fresh += [(names[i], feature) for i, feature in zip(indices, features, strict=True)]
            if time.monotonic() - last > FLUSH_SECONDS:
                self._write(fresh)
                fresh, last = [], time.monotonic()

        if missing or not pairs:
            known.update(zip(names, encode(list(missing.values()), on_batch=on_batch), strict=True))
            self._write(fresh)
        return torch.stack([known[digest] for digest in digests]) if digests else torch.empty(0, 0)

    def _read_all(self, wanted: set[bytes]) -> dict[bytes, torch.Tensor]:
        """The wanted features that some file has. Files whose names begin with a dot are still being written."""
        known: dict[bytes, torch.Tensor] = {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")) if self.folder.is_dir() else ():
            known.update(self._read(path, wanted))
        return known

    def _write(self, found: list[tuple[bytes, torch.Tensor]]) -> None:
        """One new file with these features."""
        from safetensors.torch import save_file

        if not found:
            return
        digests = torch.from_numpy(np.frombuffer(b"".join(name for name, _ in found), dtype=np.uint8).copy())
        tensors = {"digests": digests.view(-1, 16), "features": torch.stack([feature for _, feature in found])}
        private_folder(self.folder)
        with atomic_path(self.folder / f"{secrets.token_hex(8)}.safetensors", everyone=True) as temporary:
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint, "checksum": checksum(tensors)})

    def _read(self, path: Path, wanted: set[bytes]) -> dict[bytes, torch.Tensor]:
        """The wanted features in a file, if it is whole and of this encoder; else says so and leaves it."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata, tensors = file.metadata() or {}, {k: file.get_tensor(k) for k in ("digests", "features")}
            if metadata.get("fingerprint") != self.fingerprint or metadata.get("checksum") != checksum(tensors):
                raise ValueError("its content is not what was written")
            digests, features = tensors["digests"], tensors["features"]
            if (
                (digests.dtype, features.dtype) != (torch.uint8, torch.float32)
                or digests.shape != (len(features), 16)
                or features.dim() != 2
                or self.width not in (None, features.shape[1])
                or not torch.isfinite(features).all()
            ):
                raise ValueError("its content is no features of this encoder, whatever its checksum says")
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            print(f"Cache: {path} is not used ({first_line(error)})")
            return {}
        names = tensors["digests"].numpy().tobytes()
        found = ((names[16 * i : 16 * i + 16], i) for i in range(len(tensors["features"])))
        chosen = {name: i for name, i in found if name in wanted}
        rows = tensors["features"][list(chosen.values())]  # a copy: the rest of the file is let go
        return dict(zip(chosen, rows, strict=True))
