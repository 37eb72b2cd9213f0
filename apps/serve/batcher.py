"""A thread that runs the model on what several requests ask for, together."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple


class QueueFull(Exception):
    """More is waiting than may wait."""


class _Job(NamedTuple):
    run: Callable[[list], list]
    items: list
    size: int
    answer: Future


class Batcher:
    """Jobs that wait while the model is busy are run together next, so many small requests cost as much as a large one.

    Args:
        most_waiting: size of all jobs that may wait. most_together: size of the jobs that are run together; a larger
            one is run alone.
        on_batch: called with the number of items that are run together.

    Attributes:
        waiting: size of the jobs that wait.
    """

    def __init__(self, most_waiting: int, most_together: int, on_batch: Callable[[int], None] = lambda _: None):
        self.most_waiting, self.most_together, self.on_batch = most_waiting, most_together, on_batch
        self.waiting = 0
        self._jobs: deque[_Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="rewards", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive()

    def submit(self, run: Callable[[list], list], items: list, size: int) -> Future:
        """The results of `run(items)`, a list with one for each item. Jobs of the same `run` are joined.

        Args:
            size: what the job counts as, in texts.

        Raises:
            QueueFull: if too much would wait, or after `close`.
        """
        job = _Job(run, items, size, Future())
        with self._changed:
            if self._closed or self.waiting + size > self.most_waiting:
                raise QueueFull
            self.waiting += size
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Runs what waits, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (jobs := self._take()) is not None:
            self._answer([job for job in jobs if job.answer.set_running_or_notify_cancel()])

    def _take(self) -> list[_Job] | None:
        """The jobs to run next; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            taken = [self._jobs.popleft()]
            size = taken[0].size
            while self._jobs and self._jobs[0].run == taken[0].run and size + self._jobs[0].size <= self.most_together:
                taken.append(self._jobs.popleft())
                size += taken[-1].size
            self.waiting -= size
            return taken

    def _answer(self, jobs: list[_Job]) -> None:
        """Runs jobs together; if that fails, each alone, so that one of them does not spoil the others."""
        items = [item for job in jobs for item in job.items]
        if not jobs:
            return
        self.on_batch(len(items))
        try:
            results = iter(jobs[0].run(items))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:
                for job in jobs:
                    self._answer([job])
            return
        for job in jobs:
            job.answer.set_result([next(results) for _ in job.items])
