"""How long a rank's steps take, for /metrics. No MLX."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

REPORT = 1.0  # seconds of computing between reports


class Pace:
    """Counts steps, and the seconds outside `waiting`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.steps = 0  # in all
        self.sum_seconds: float | None = None  # what summing one hidden state over the ranks took, last measured
        self._clock, self._since = clock, clock()  # now less those seconds since the last report
        self._counted = 0
        self._mean: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For something to compute."""
        began = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - began

    def step(self) -> None:
        """A step is done."""
        self.steps += 1
        self._counted += 1

    @property
    def due(self) -> bool:
        """Whether it is time for a report."""
        return self._clock() - self._since >= REPORT

    def report(self) -> dict[str, Any]:
        """The mean of the steps since the last report; without any, the mean of then."""
        now = self._clock()
        if self._counted:
            self._mean = (now - self._since) / self._counted
        self._since, self._counted = now, 0
        return {"step_seconds": self._mean, "sum_seconds": self.sum_seconds}
