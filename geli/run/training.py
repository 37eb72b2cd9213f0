"""The training loop that the three stages share."""

from contextlib import nullcontext
from typing import Protocol

from geli.run.checkpoint import Checkpointer
from geli.run.console import progress_bar
from geli.run.gradients import NotFinite
from geli.run.tracking import Tracker


class Stage(Protocol):
    """What a stage does in each step of `train_steps`.

    Attributes:
        finished: whether training ends with the step that was done last, although more were to come.
    """

    finished: bool = False

    def step(self, step: int) -> dict[str, float]:
        """Computes a loss, updates the parameters, and returns what is logged. Raises `NotFinite` instead of applying
        an update that is not finite."""

    def after_step(self, step: int, logged: dict[str, float]) -> bool:
        """Validates where that is due, adds to `logged`, and returns whether a new best model was saved."""

    def batch_ids(self) -> list[str]:
        """Names of the items in the batch of the last step, for the message of a failed step."""


def train_steps(
    stage: Stage, steps: int, description: str, checkpointer: Checkpointer | None = None, tracker: Tracker | None = None
) -> None:
    """Runs the steps that a resumed run has not done yet.

    Args:
        stage: does a step. steps: the run's last step; the first is 1. description: of the progress bar; empty: no bar.
        checkpointer: saves and restores; None: the run cannot be resumed. tracker: gets what is logged; None: nobody.

    Raises:
        UserError: if a step fails; the message says which checkpoint was kept.
    """
    first = checkpointer.restore() if checkpointer else 0
    bar = progress_bar(
        range(first + 1, steps + 1), desc=description, unit="step", initial=first, total=steps, disable=not description
    )
    with checkpointer.watch() if checkpointer else nullcontext():
        for step in bar:
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
            if stage.finished:
                break
