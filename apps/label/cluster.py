"""Scores the parts of a table on the machines of a Ray cluster: each part is one of Ray's tasks."""

import os
import socket
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import ray

from apps.label.dialogues import Dialogue
from apps.label.labelling import score_part
from geli.reward import GELIReward
from geli.run.errors import UserError, first_line

ROOT = Path(__file__).resolve().parents[2]


class Cluster:
    """A Ray cluster, while it is open as a context.

    Args:
        address: of its head, `HOST:PORT`, or `auto`, the one that this machine belongs to; empty: $RAY_ADDRESS, else
            a cluster of this machine alone.

    Raises:
        UserError: if there is no cluster at the address.
    """

    def __init__(self, address: str):
        self.address = address

    def __enter__(self) -> "Cluster":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
        runtime = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        try:
            if ":" in self.address:  # Ray would wait for minutes
                host, _, port = self.address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(self.address or None, runtime_env=runtime, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--ray {self.address}: expected a Ray cluster, found none: {first_line(error)}") from None
        return self

    def __exit__(self, *_) -> None:
        ray.shutdown()

    def score(
        self, parts: Iterable[tuple[int, list[Dialogue]]], load: dict[str, object]
    ) -> Iterator[tuple[int, pa.Table]]:
        """The number and the rows of each part, in the order in which they are ready. A worker has one core, and a GPU
        if the cluster has any. A part whose worker died is scored again, up to three times.

        Args:
            parts: number and conversations of each; twice as many as there are workers are taken at a time.
            load: arguments of `GELIReward.load`, which each worker calls once; files have the same paths everywhere.

        Raises:
            UserError: if a worker cannot load the reward, or a part cannot be scored.
        """
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        task = ray.remote(_score_part).options(num_cpus=1, num_gpus=int(gpus > 0), max_retries=3)
        most, waiting = 2 * max(gpus or int(resources.get("CPU", 1)), 1), {}
        for number, dialogues in parts:
            waiting[task.remote(dialogues, tuple(load.items()))] = number
            if len(waiting) >= most:
                yield _first_ready(waiting)
        while waiting:
            yield _first_ready(waiting)


def _first_ready(waiting: dict) -> tuple[int, pa.Table]:
    """The number and the rows of a part that is ready, which is taken from `waiting` (task -> number)."""
    (ready,), _ = ray.wait(list(waiting))
    try:
        return waiting.pop(ready), ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except ray.exceptions.RayError as error:
        raise UserError(f"--ray: a part could not be scored: {first_line(error)}") from None


def _score_part(dialogues: list[Dialogue], load: tuple[tuple[str, object], ...]) -> pa.Table:
    """Scores a part, in a worker."""
    return score_part(dialogues, _loaded(load))


@lru_cache(maxsize=1)
def _loaded(load: tuple[tuple[str, object], ...]) -> GELIReward:
    """The reward, which a worker keeps for its next parts."""
    return GELIReward.load(**dict(load))
