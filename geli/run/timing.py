"""Where a run's time goes."""

import time


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
