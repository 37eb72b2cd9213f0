"""A language model's shares of the scores, on disk: a row for each agent turn, which apps/llm_shares writes."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from geli.run.errors import UserError
from geli.run.files import atomic_path

COLUMNS = ("conversation_id", "flip", "turn_id", "share", "status", "tokens", "seconds", "data")


class ShareRow(NamedTuple):
    """The share of a turn.

    Attributes:
        conversation_id, flip, turn_id: which turn, of which trajectory.
        share: of the score, in points. Those of a trajectory sum to its score.
        status: how it was found (`apps.llm_shares.answers.STATUSES`).
        tokens, seconds: that the trajectory's requests took, divided by its turns.
        data: fingerprint of the trajectory that the model read, by which a changed one is noticed.
    """

    conversation_id: str
    flip: int
    turn_id: str
    share: float
    status: str
    tokens: float
    seconds: float
    data: str


class TrajectoryShares(NamedTuple):
    """The shares of one trajectory.

    Attributes:
        data: fingerprint of the trajectory that the model read. turns: turn id -> share, in points.
    """

    data: str
    turns: dict[str, float]


def write_shares(path: Path, rows: Iterable[ShareRow]) -> None:
    """Writes the file, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            numbers = {"share": f"{row.share:.6g}", "tokens": f"{row.tokens:.1f}", "seconds": f"{row.seconds:.3f}"}
            writer.writerow({**row._asdict(), **numbers}.values())


def read_shares(path: str | Path) -> dict[str, TrajectoryShares]:
    """`conversation/flip` -> its shares.

    Raises:
        UserError: if the file is missing or is not one that `write_shares` wrote.
    """
    found: dict[str, TrajectoryShares] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise ValueError(f"its columns are {', '.join(rows.fieldnames or ())}"[:200])
            for row in rows:
                share = float(row["share"])
                if not math.isfinite(share):
                    raise ValueError(f"line {rows.line_num}: a share of {share}")
                of = TrajectoryShares(row["data"], {})
                found.setdefault(f"{row['conversation_id']}/{row['flip']}", of).turns[row["turn_id"]] = share
    except FileNotFoundError:
        raise UserError(f"--llm_shares {path}: no such file; apps/llm_shares writes it") from None
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--llm_shares {path}: expected the shares.csv of apps/llm_shares: {error}") from None
    return found
