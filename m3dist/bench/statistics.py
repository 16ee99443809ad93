"""Figures of repeated runs. No MLX."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is: the medians' ratio, and the quartiles of neighbouring runs' ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Seconds of alternating runs, ours[i] next to theirs[i] -> theirs in units of ours; above 1 ours is faster."""
    pairs = [b / a for a, b in zip(ours, theirs)]
    return Ratio(median(theirs) / median(ours), quantile(pairs, 0.25), quantile(pairs, 0.75))


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of the sorted values lie, with straight lines between neighbours."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
