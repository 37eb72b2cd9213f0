"""The training loop that the three stages share, and where a run's time goes."""

import time
from contextlib import nullcontext
from typing import Protocol

from geli.run.checkpoint import Checkpointer
from geli.run.console import progress_bar
from geli.run.gradients import NotFinite
from geli.run.tracking import Tracker


class Stage(Protocol):
    """What a stage does in each step of `train_steps`.

    Attributes:
        finished: whether training ended with the step that was done last, although more were to come.
    """

    finished: bool = False

    def step(self, step: int) -> dict[str, float]:
        """Computes a loss, updates the parameters, and returns what is logged. Raises `NotFinite` instead of applying
        an update that is not finite."""

    def after_step(self, step: int, logged: dict[str, float]) -> bool:
        """Validates where that is due, adds to `logged`, and returns whether a new best model was saved."""

    def batch_ids(self) -> list[str]:
        """Names of the items in the batch of the last step, for the message of a failed step."""


class Clock:
    """Wall-clock seconds of the parts of a run, one after the other.

    Attributes:
        seconds: part -> seconds so far, of this process; of a resumed run since it was resumed.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """Counts the time since the last call as that of `part`."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def train_steps(
    stage: Stage, steps: int, description: str, checkpointer: Checkpointer | None = None, tracker: Tracker | None = None
) -> None:
    """Runs the steps that a resumed run has not done yet.

    Args:
        stage: does a step. steps: the run's last step; the first is 1. description: of the progress bar; empty: no bar.
        checkpointer: saves and restores, and says which checkpoint was kept if a step fails; None: the run cannot be
            resumed. tracker: gets what is logged; None: nobody.
    """
    first = checkpointer.restore() if checkpointer else 0
    bar = progress_bar(
        range(first + 1, steps + 1), desc=description, unit="step", initial=first, total=steps, disable=not description
    )
    with checkpointer.watch() if checkpointer else nullcontext():
        for step in bar:
            if stage.finished:
                break
            try:
                with checkpointer.step() if checkpointer else nullcontext():
                    logged = stage.step(step)
            except NotFinite as error:
                if checkpointer is None:
                    raise
                checkpointer.not_finite(str(error), step, stage.batch_ids())
            improved = stage.after_step(step, logged)
            if tracker:
                tracker.log(logged, step)
            if checkpointer:
                checkpointer.done(step, save=improved)
