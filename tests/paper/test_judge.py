"""Which rank the local launcher blames, from the exits alone."""

import math

import pytest

from m3dist.cluster.local import CAUSE_GRACE, STRAGGLE, Exit, Verdict, free_ports, judge

LATE = 100.0


def job(*exits: tuple[int, int, float], world: int = 3, now: float = LATE) -> Verdict | float:
    """judge() for (rank, code, at)."""
    noted = [Exit(*exit) for exit in exits]
    return judge(noted, set(range(world)) - {exit.rank for exit in noted}, now)


@pytest.mark.parametrize(
    ("exits", "status", "rank"),
    [
        ([(1, 3, 0.0)], 3, 1),
        ([(1, -9, 0.0)], 137, 1),
        ([(0, 75, 0.0), (1, 3, 0.5)], 3, 1),  # noticed late
        ([(0, 75, 0.0), (2, 76, 0.1), (1, -11, 0.5)], 139, 1),
        ([(0, 0, 0.0), (2, 5, 1.0)], 5, 2),
        ([(0, 4, 0.0), (1, 5, 0.0)], 4, 0),  # the first
        ([(0, 75, 0.0), (1, 75, 0.0), (2, 75, 0.0)], 75, 0),  # nobody knows better
        ([(1, 0, 0.0), (0, 75, 0.1)], 75, 1),  # lost because it had ended
        ([(0, 75, 0.0), (1, 0, 0.1)], 75, 0),
    ],
)
def test_blame(exits, status, rank):
    verdict = job(*exits)
    assert isinstance(verdict, Verdict)
    assert (verdict.status, verdict.rank) == (status, rank)


def test_all_well():
    assert job((0, 0, 0.0), (1, 0, 1.0), (2, 0, 2.0)) == Verdict(0)


def test_running():
    assert job() == math.inf


def test_victims_wait_for_the_cause():
    assert job((0, 75, 10.0), now=10.5) == 10.0 + CAUSE_GRACE
    verdict = job((0, 75, 10.0), now=10.0 + CAUSE_GRACE)
    assert isinstance(verdict, Verdict) and "still running then: ranks 1, 2" in verdict.reason


def test_victims_alone_do_not_wait():
    assert isinstance(job((0, 75, 10.0), (1, 76, 10.0), (2, 75, 10.0), now=10.0), Verdict)


def test_an_early_end_is_given_time():
    assert job((1, 0, 10.0), now=11.0) == 10.0 + STRAGGLE
    verdict = job((1, 0, 10.0), now=10.0 + STRAGGLE)
    assert isinstance(verdict, Verdict)
    assert (verdict.status, verdict.rank) == (1, 1)


def test_free_ports_are_different():
    assert len(set(free_ports(16))) == 16
