"""What became of a job, decided from what was seen of it: which rank on which host is to blame, and the status. No MLX.

Everything here is a pure function of evidence. Times are the launcher's own time.monotonic(), when it was told: the
hosts' clocks are not compared.
"""

import math
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from m3dist.watchdog import EXIT_NOT_STARTED, EXIT_PEER_LOST, EXIT_STALLED, EXIT_UNREACHABLE

# Statuses of ranks that ended because of another one. 195: Open MPI's, where mpirun is gone (PMIX_ERR_LOST_CONNECTION).
VICTIMS = (EXIT_PEER_LOST, EXIT_STALLED, 195)
CAUSE_GRACE = 2.0  # seconds to wait for the rank that made the victims
STATES = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "Z": "is dead", "D": "waits in the kernel"}


@dataclass(frozen=True)
class Exit:
    """A rank's process ended. `lost_peer`: its output says that it lost a peer, whatever its status; `ordered`: its
    agent was told to end it."""

    rank: int
    code: int  # as subprocess has it: minus the signal's number for a signal
    at: float
    phase: str | None = None  # what it was doing
    peak: int | None = None  # bytes
    lost_peer: bool = False
    ordered: bool = False

    @property
    def status(self) -> int:
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def how(self) -> str:
        what = f"ended with exit code {self.code}" if self.code >= 0 else f"was killed by {signal_name(-self.code)}"
        return what + (f" in {self.phase}" if self.phase else "")

    @property
    def victim(self) -> bool:
        return self.code in VICTIMS or (self.code != 0 and (self.lost_peer or self.ordered))


@dataclass(frozen=True)
class Stall:
    """A rank had not finished in time what it was doing; its process was in `state` then, a letter as ps has it."""

    rank: int
    phase: str
    seconds: float
    state: str
    at: float


@dataclass(frozen=True)
class Loss:
    """A host's agent closed its channel, or was silent for too long; with `host` None, `how` says all."""

    host: int | None
    how: str
    at: float


@dataclass(frozen=True)
class Verdict:
    """`rank` or `host` is the one to blame, where there is one."""

    status: int
    reason: str = ""
    rank: int | None = None
    host: int | None = None
    ordered: bool = False  # a signal to the launcher
    unsure: tuple[str, ...] = ()  # hosts on which ranks may still be ending


@dataclass
class Evidence:
    """What was seen so far, in order."""

    host_of: Sequence[int]  # of each rank
    names: Sequence[str]  # of each host
    exits: list[Exit] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    heard: Mapping[int, float] = field(default_factory=dict)  # host -> when it last said something
    phases: Mapping[int, str] = field(default_factory=dict)  # rank that reports -> the first phase of its latest kind
    end_limit: float = 60.0  # seconds that ranks may go on after another ended with status 0
    unread: float = -math.inf  # when a rank last had to wait because nobody read what it printed

    @property
    def running(self) -> set[int]:
        return set(range(len(self.host_of))) - {exit.rank for exit in self.exits}

    def who(self, *ranks: int) -> str:
        """ "ranks 1, 2", each with its host where there are several."""
        if len(set(self.names)) == 1:
            return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))
        return ", ".join(f"rank {rank} on {self.names[self.host_of[rank]]}" for rank in sorted(ranks))


def judge(seen: Evidence, now: float) -> Verdict | float:
    """The verdict on a job, or the time to look again.

    To blame is the first rank that failed by itself, or the first host that was lost. Victims, and ranks that stalled,
    may have failed because of another: for CAUSE_GRACE seconds they wait for that one to turn up, and longer for a host
    that has not said a word since.
    """
    failed = [exit for exit in seen.exits if exit.code != 0 and not exit.victim]
    if failed:
        exit = failed[0]
        return Verdict(exit.status, f"{seen.who(exit.rank)} {exit.how}", exit.rank)
    if seen.losses:
        loss = seen.losses[0]
        what = loss.how if loss.host is None else f"host {seen.names[loss.host]} was lost: {loss.how}"
        return Verdict(EXIT_UNREACHABLE, what, host=loss.host)
    victims = [exit for exit in seen.exits if exit.victim]
    if victims or seen.stalls:
        first = min([exit.at for exit in victims] + [stall.at for stall in seen.stalls])
        return _wait_for_the_cause(seen, first, now) or _blame(seen, victims)
    ended = [exit for exit in seen.exits if exit.code == 0]
    if not seen.running:
        return Verdict(0)
    if ended:
        limit = max(ended[0].at, seen.unread) + seen.end_limit
        if now < limit:
            return limit
        late = f"after {seen.end_limit:g} s {seen.who(*seen.running)} had not"
        reason = f"{seen.who(ended[0].rank)} ended (exit code 0) but {late}"
        return Verdict(1, reason, ended[0].rank)
    return math.inf


def _wait_for_the_cause(seen: Evidence, first: float, now: float) -> float | None:
    """Until when the real cause may still turn up; None if it has, or can no longer."""
    if any(stall.state == "T" for stall in seen.stalls):
        return None
    silent = {seen.host_of[rank] for rank in seen.running if seen.heard.get(seen.host_of[rank], math.inf) < first}
    if silent:
        return now + CAUSE_GRACE  # it will answer a ping soon, or be lost
    return first + CAUSE_GRACE if seen.running and now < first + CAUSE_GRACE else None


def _blame(seen: Evidence, victims: Sequence[Exit]) -> Verdict:
    """Among ranks of which none failed by itself: a stopped one, one that never joined, one that stalled, one that
    ended early, a victim."""
    stopped = [stall for stall in seen.stalls if stall.state == "T"]
    ended = [exit for exit in seen.exits if exit.code == 0 and not exit.ordered]
    absent = {rank for rank in seen.running if seen.phases.get(rank) == "start"}
    phases = {stall.phase for stall in seen.stalls} | {exit.phase for exit in victims}
    if absent and "rendezvous" in phases and phases <= {"rendezvous", "start"}:
        waits = [f" {stall.seconds:.0f} s" for stall in seen.stalls if stall.phase == "rendezvous"]
        reason = f"{seen.who(*absent)} did not join the others, which waited{''.join(waits[:1])} in rendezvous"
        return Verdict(EXIT_NOT_STARTED, reason, min(absent))
    if stopped or (seen.stalls and not victims):
        stall = (stopped or sorted(seen.stalls, key=lambda stall: -stall.seconds))[0]
        state = f"; its process {STATES[stall.state]}" if stall.state in STATES else ""
        reason = f"{seen.who(stall.rank)} finished nothing for {stall.seconds:.0f} s in {stall.phase}{state}"
        return Verdict(EXIT_NOT_STARTED if stall.phase == "start" else EXIT_STALLED, reason, stall.rank)
    victim = min(victims, key=lambda exit: exit.ordered)  # the first that nobody ended on purpose, as mpirun does
    if ended:  # perhaps noticed later than the victim's end, which takes less time
        reason = f"{seen.who(ended[0].rank)} ended early (exit code 0) and {seen.who(victim.rank)} still needed it"
        return Verdict(victim.status, reason, ended[0].rank)
    if len(victims) == len(seen.host_of) > 1 and all(exit.code == EXIT_STALLED for exit in victims):
        where = f" between {' and '.join(hosts)}" if len(hosts := list(dict.fromkeys(seen.names))) > 1 else ""
        phase = f" in {victim.phase}" if victim.phase else ""
        reason = f"the ranks waited for each other{phase}: a link{where} is down or too slow, or one hangs"
        return Verdict(EXIT_STALLED, reason, victim.rank)
    still = f"; still running then: {seen.who(*seen.running)}" if seen.running else ""
    return Verdict(victim.status, f"{seen.who(victim.rank)} {victim.how}{still}", victim.rank)


def not_started(seen: Evidence, silent: Collection[int], limit: float) -> Verdict:
    """Ranks `silent` have not come up within `limit` seconds."""
    return Verdict(EXIT_NOT_STARTED, f"{seen.who(*silent)} did not start within {limit:g} s", min(silent))


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
