"""Whom the launcher blames, from what it has seen."""

import math
from dataclasses import replace

import pytest

from m3dist.cluster.agent import free_ports
from m3dist.cluster.judge import CAUSE_GRACE, Evidence, Exit, Loss, Stall, Verdict, judge

LATE = 100.0


def job(
    *exits: tuple, stalls=(), losses=(), heard=None, phases=None, hosts=("here",) * 3, now: float = LATE, **more
) -> Verdict | float:
    """judge() for exits (rank, code, at), stalls (rank, phase, seconds, state, at), losses (host, how, at); a rank a
    host."""
    seen = Evidence(range(len(hosts)), hosts, [Exit(*exit) for exit in exits], [Stall(*stall) for stall in stalls])
    seen.losses, seen.heard, seen.phases = [Loss(*loss) for loss in losses], heard or {}, phases or {}
    return judge(replace(seen, **more), now)


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
        ([(0, 75, 0.0), (1, 0, 0.1)], 75, 1),  # noticed late
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
    assert job((1, 0, 10.0), now=11.0, end_limit=7.0) == 10.0 + 7.0
    verdict = job((1, 0, 10.0), now=10.0 + 7.0, end_limit=7.0)
    assert isinstance(verdict, Verdict)
    assert (verdict.status, verdict.rank) == (1, 1)


def test_a_rank_that_nobody_reads_is_not_late():
    """It cannot end before all it prints is taken."""
    assert job((1, 0, 10.0), now=LATE, end_limit=7.0, unread=LATE) == LATE + 7.0


def test_a_rank_that_mpirun_ended_is_blamed_last():
    """Its daemon on another host was killed: it ends the ranks here, and those there lose it."""
    verdict = job((0, -15, 10.0, "decode step 3", 0, False, True), (1, 195, 10.5), (2, 195, 10.6))
    assert isinstance(verdict, Verdict) and (verdict.status, verdict.rank) == (195, 1)


def test_a_rank_that_did_not_come_to_join_the_others():
    """Both are late, at about the same time: the one that is still starting is to blame."""
    verdict = job(
        stalls=[(1, "start", 61.0, "S", 70.0), (0, "rendezvous", 60.0, "S", 70.5)], phases={0: "rendezvous", 1: "start"}
    )
    assert isinstance(verdict, Verdict) and (verdict.status, verdict.rank) == (78, 1)
    assert "rank 1 did not join the others, which waited 60 s in rendezvous" in verdict.reason


def test_a_rank_that_never_came_to_join():
    verdict = job(stalls=[(1, "start", 61.0, "S", 70.0)])
    assert (
        isinstance(verdict, Verdict)
        and verdict.status == 78
        and "rank 1 finished nothing for 61 s in start" in (verdict.reason)
    )


def test_a_rank_that_a_launcher_above_us_ended_is_no_cause():
    """mpirun ends every rank when one fails; their agents say that they were told to."""
    ordered = (0, -15, 9.0, "decode step 3", 0, False, True)
    verdict = job(ordered, (1, 5, 10.0), now=10.0)
    assert isinstance(verdict, Verdict) and (verdict.status, verdict.rank) == (5, 1)


def test_a_rank_that_says_it_lost_a_peer_is_no_cause():
    """Programs that are not ours end with status 1 then."""
    verdict = job((0, 1, 9.0, None, 0, True), (1, -9, 10.0), now=10.0)
    assert isinstance(verdict, Verdict) and (verdict.status, verdict.rank) == (137, 1)


def test_a_stopped_rank_is_blamed_at_once():
    stalls = [(1, "decode step 7", 4.0, "T", 10.0)]
    verdict = job((0, 76, 9.0), stalls=stalls, hosts=("a", "b", "c"), now=10.0)
    assert verdict == Verdict(
        76, "rank 1 on b finished nothing for 4 s in decode step 7; its process is stopped (SIGSTOP)", 1
    )


def test_of_ranks_that_stall_the_longest_is_blamed():
    stalls = [(0, "decode step 7", 4.0, "S", 10.0), (2, "decode step 6", 5.0, "R", 10.2)]
    assert job(stalls=stalls, now=10.5) == 10.0 + CAUSE_GRACE
    verdict = job(stalls=stalls)
    assert verdict == Verdict(76, "rank 2 finished nothing for 5 s in decode step 6", 2)


def test_all_waited_for_each_other():
    exits = [(rank, 76, 10.0 + rank, "decode step 9") for rank in range(3)]
    verdict = job(*exits, hosts=("a", "b", "b"), now=12.0)
    assert isinstance(verdict, Verdict) and verdict.status == 76
    assert "waited for each other in decode step 9: a link between a and b is down" in verdict.reason


def test_ranks_that_never_joined():
    """The others waited for them, or ring could not connect."""
    phases = {0: "rendezvous", 1: "start", 2: "rendezvous"}
    stall, refused = (0, "rendezvous", 61.0, "S", 10.0), (2, 75, 10.0, "rendezvous")
    said = "rank 1 on b did not join the others, which waited 61 s in rendezvous"
    assert job(stalls=[stall], phases=phases, hosts="abc") == Verdict(78, said, 1)
    said = "ranks 1, 2 did not join the others, which waited 61 s in rendezvous"
    assert job(stalls=[stall], phases=phases | {2: "start"}) == Verdict(78, said, 1)
    verdict = job(refused, phases=phases)
    assert verdict == Verdict(78, "rank 1 did not join the others, which waited in rendezvous", 1)
    verdict = job((2, 75, 10.0, "load of layers.0.w1"), phases=phases)
    assert isinstance(verdict, Verdict) and verdict.rank == 2


def test_a_lost_mpirun():
    """Its ranks end with Open MPI's own status then."""
    verdict = job((0, 195, 9.0), losses=[(None, "mpirun was killed by SIGKILL", 11.0)])
    assert verdict == Verdict(77, "mpirun was killed by SIGKILL")


def test_a_lost_host():
    verdict = job((0, 76, 9.0), losses=[(2, "no word from it for 10 s", 11.0)], hosts=("a", "b", "c"))
    assert verdict == Verdict(77, "host c was lost: no word from it for 10 s", host=2)


def test_a_victim_waits_for_a_host_that_is_silent_since():
    """It has lost its peers, or is the one that was lost: a ping will tell."""
    heard = {0: 9.0, 1: 12.0, 2: 9.5}
    assert job((0, 75, 10.0), heard=heard, hosts=("a", "b", "c"), now=15.0) == 15.0 + CAUSE_GRACE
    assert isinstance(job((0, 75, 10.0), heard=heard | {2: 14.0}, hosts=("a", "b", "c"), now=15.0), Verdict)


def test_free_ports_are_different():
    assert len(set(free_ports(["127.0.0.1"] * 16))) == 16
