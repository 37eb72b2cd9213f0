"""Turn rewards of whole folders of conversations, as one table. A run that was stopped is continued."""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from apps.label.dialogues import Dialogue, Source
from geli.reward import GELIReward
from geli.run.console import progress_bar
from geli.run.errors import UserError
from geli.run.files import atomic_path, private_folder, read_json_or_empty, write_json

TURNS_A_PART = 1024  # turns that are scored and written at once; what a run that dies can lose
COLUMNS = pa.schema({
    "conversation_id": pa.string(), "turn": pa.string(), "speaker": pa.string(), "text": pa.string(),
    "reward": pa.float32(),
})  # fmt: skip


@dataclass
class Counts:
    """What was scored.

    Attributes:
        conversations, turns, scored: numbers; `scored` turns have rewards. reward: their sum.
        dropped: reason -> number of conversations. examples: names and reasons of the first of them.
        seconds: that this run scored for. scored_now: turns that it scored.
    """

    conversations: int = 0
    turns: int = 0
    scored: int = 0
    reward: float = 0.0
    dropped: Counter = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    scored_now: int = 0


Part = tuple[int, list[Dialogue]]  # its number, from 0, and its conversations


def score_conversations(
    source: Source, reward: GELIReward, out: Path, settings: dict,
    score_parts: Callable[[Iterable[Part]], Iterable[tuple[int, pa.Table]]] | None = None,
) -> Counts:  # fmt: skip
    """Writes a table with a row for each turn: conversation, turn, speaker, text and reward (empty for turns of users).

    Conversations are scored in parts, which are kept in `{out}.parts/` until the table is whole. After a run that died,
    the same call scores the parts that are missing, and the table is then the same, byte for byte.

    Args:
        reward: without a cache, so that a part's last digits do not depend on the parts before it.
        out: of a name that ends with .parquet or .csv. settings: all else that rewards depend on.
        score_parts: gives the number and the rows of parts, in any order; None: `reward` scores them one by one.

    Raises:
        UserError: if `out` exists, its parts are of other data or settings, or there is no usable conversation.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; name another file, or remove it")
    folder, counts, paths = out.with_name(f"{out.name}.parts"), Counts(), []
    _claim(folder, {**settings, "data": _hash(repr(source.state()).encode()), "head": _hash(reward.path.read_bytes())})

    def missing_parts() -> Iterator[Part]:
        for number, dialogues in enumerate(_parts(source, counts)):
            paths.append(folder / f"part-{number:06}.parquet")
            if not paths[number].is_file():
                yield number, dialogues

    started = time.monotonic()
    with progress_bar(total=source.total, desc="scoring", unit="conversation") as bar:
        for number, table in (score_parts or partial(_score_here, reward=reward))(missing_parts()):
            _write(table, paths[number])
            counts.scored_now += len(table) - table["reward"].null_count
            counts.seconds = time.monotonic() - started
            bar.set_postfix_str(f"{counts.scored_now / counts.seconds:,.0f} turns/s", refresh=False)
            bar.update(counts.conversations + counts.dropped.total() - bar.n)
    if not paths:
        shutil.rmtree(folder)
        reasons = "; ".join(f"{reason} ({n})" for reason, n in counts.dropped.most_common(3)) or "nothing in it"
        raise UserError(f"no usable conversation: {reasons}")
    _join(paths, out, counts)
    shutil.rmtree(folder)
    return counts


def _claim(folder: Path, made_of: dict) -> None:
    """Records what the parts in `folder` are made of; refuses parts that are made of something else."""
    made_of = {name: str(value) for name, value in made_of.items()}
    recorded = read_json_or_empty(folder / "made_of.json")
    if not recorded:
        private_folder(folder)
        write_json(folder / "made_of.json", made_of)
    elif recorded != made_of:
        changed = ", ".join(name for name in made_of if recorded.get(name) != made_of[name])
        raise UserError(f"{folder}: parts of an earlier run with another {changed}; remove it, or name another table")
    else:
        print(f"Continuing with {len(list(folder.glob('part-*.parquet')))} parts in {folder}")


def _parts(source: Source, counts: Counts) -> Iterator[list[Dialogue]]:
    """The conversations in groups of at least `TURNS_A_PART` turns; counts them."""
    part, turns = [], 0
    for dialogue in source:
        if not isinstance(dialogue, Dialogue):
            counts.dropped[dialogue[1]] += 1
            counts.examples += [dialogue] * (len(counts.examples) < 20)
            continue
        part.append(dialogue)
        turns += len(dialogue.texts)
        counts.conversations += 1
        if turns >= TURNS_A_PART:
            yield part
            part, turns = [], 0
    if part:
        yield part


def _score_here(parts: Iterable[Part], reward: GELIReward) -> Iterator[tuple[int, pa.Table]]:
    return ((number, score_part(dialogues, reward)) for number, dialogues in parts)


def score_part(dialogues: list[Dialogue], reward: GELIReward) -> pa.Table:
    """The rows of some conversations."""
    scored = iter(reward.score_turns([d.seen_from(agent) for d in dialogues for agent in d.agents]))
    rows = []
    for d in dialogues:
        rewards = {agent: iter(next(scored)) for agent in d.agents}
        rows += [
            (d.id, name, speaker, text, next(rewards[speaker]) if speaker in rewards else None)
            for name, speaker, text in zip(d.names, d.speakers, d.texts, strict=True)
        ]
    return pa.table(list(zip(*rows, strict=True)) or [[]] * len(COLUMNS), schema=COLUMNS)


def _write(table: pa.Table, path: Path) -> None:
    with atomic_path(path, private=True) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


def _join(paths: list[Path], out: Path, counts: Counts) -> None:
    """Writes the table from its parts, one at a time, and counts its rows."""
    with atomic_path(out, private=True) as temporary:
        make = arrow_csv.CSVWriter if out.suffix == ".csv" else parquet.ParquetWriter
        compression = {} if out.suffix == ".csv" else {"compression": "zstd"}
        with make(temporary, COLUMNS, **compression) as writer:
            for path in paths:
                table = parquet.read_table(path)
                writer.write_table(table)
                counts.turns += len(table)
                counts.scored += len(table) - table["reward"].null_count
                counts.reward += sum(filter(None, table["reward"].to_pylist()))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
