"""A language model's shares of the scores, on disk: a row for each agent turn, which apps/llm_shares writes."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

from geli.run.errors import UserError

# share: of the score, in points; those of a trajectory sum to its score. data: `data_utils.fingerprint` of the
# trajectory that the model read. status, tokens, seconds: how it was found, and what that took; they are not read.
COLUMNS = ("conversation_id", "flip", "turn_id", "share", "status", "tokens", "seconds", "data")


class TrajectoryShares(NamedTuple):
    """The shares of one trajectory.

    Attributes:
        data: fingerprint of the trajectory that the model read. turns: turn id -> share, in points.
    """

    data: str
    turns: dict[str, float]


def read_shares(path: str | Path) -> dict[str, TrajectoryShares]:
    """`conversation/flip` -> its shares, of a file with these `COLUMNS` and a number in each `share`."""
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
