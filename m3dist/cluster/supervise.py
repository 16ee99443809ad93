"""Runs a job on the hosts of a hostfile: starts an agent on each, the ranks through them, and ends all. No MLX.

Everything that happens (a message from an agent, a channel that closed, a signal) is an event on one queue, and the
main thread sleeps on it. What became of the job, judge.py decides.
"""

import math
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Protocol

from m3dist.cluster import backends
from m3dist.cluster.agent import END_GRACE, about
from m3dist.cluster.causes import recognise
from m3dist.cluster.channel import ChannelClosed, Message
from m3dist.cluster.environment import LaunchError
from m3dist.cluster.hostfile import Host, Hostfile
from m3dist.cluster.judge import Evidence, Exit, Loss, Stall, Verdict, judge, not_started, signal_name
from m3dist.cluster.mpi import MpiAgent, Mpirun
from m3dist.cluster.output import Output
from m3dist.cluster.ssh import Remote, Unreachable
from m3dist.watchdog import EXIT_NOT_STARTED, EXIT_UNREACHABLE

AGENT = "m3dist.cluster.agent"
PING = 2.0  # seconds between pings
DRAIN = 2.0  # seconds to wait for somebody to read what a failed job printed last
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MUST_BE_EQUAL = ("m3dist version", "m3dist build", "mlx version")


@dataclass(frozen=True)
class Job:
    """What to run. A None in `command` is each host's own Python; `env` reaches every rank, over its agent's channel.

    `marked`: every line of output carries its rank; else rank 0's standard output is ours as it is.
    `ours`: which of our standard streams rank 0 gets as they are, where it runs on this machine.
    `reports`: every rank must call lifeline.watch within `start_limit` seconds; else those that do are watched.
    """

    hostfile: Hostfile
    command: Sequence[str | None]
    env: Mapping[str, str] = field(default_factory=dict)
    secret: Collection[str] = ()  # names of those in `env` that must not go over a network in clear
    marked: bool = False
    ours: Collection[str] = ()
    reports: bool = True
    start_limit: float = 60.0  # seconds
    silence_limit: float = 10.0  # seconds without a word from a host after which it counts as lost
    end_limit: float = 60.0  # seconds that ranks may go on after another has ended well
    leave_limit: float = 2 * END_GRACE  # seconds to wait until all ranks are gone, once they are told to end

    @property
    def backend(self) -> str:
        return self.hostfile.backend or "ring"

    @property
    def hosts(self) -> list[Host]:
        """What has an agent each: the hosts, but under MPI, where each rank has one, a host for each of its ranks."""
        if self.backend != "mpi":
            return list(self.hostfile.hosts)
        return [replace(host, ranks=1) for host in self.hostfile.hosts for _ in range(host.ranks)]

    @property
    def host_of(self) -> list[int]:
        """Of each rank, its index in `hosts`."""
        return [number for number, host in enumerate(self.hosts) for _ in range(host.ranks)]


class Agent(Protocol):
    """An agent as the supervisor sees it: ssh.Remote's, or one that mpirun started."""

    errors: deque[str]

    def greet(self, timeout: float, **words: float) -> Message: ...
    def send(self, message: Message) -> None: ...
    def receive(self, timeout: float | None = None) -> Message | None: ...
    def how_it_ended(self) -> str: ...
    def said(self) -> str: ...
    def close(self, grace: float = 0.0) -> None: ...


def run_job(job: Job, output: Output | None = None) -> int:
    """Run `job` to its end; returns 0, or the status of what went wrong (README: "When something goes wrong").

    A rank killed by signal S counts as 128 + S; so does a signal to this process. Whatever happens, no process of the
    job is left on any host that can be reached, and those that cannot be end themselves.
    """
    return judged(job, output).status


def judged(job: Job, output: Output | None = None, events: "Events | None" = None) -> Verdict:
    """As run_job: what became of it. On another thread than the main one no signal is handled: there `events` is the
    job's own queue, on which the caller puts an Interrupted to end it."""
    with ExitStack() as stack:
        output = output or Output(job.marked)
        supervisor = _Supervisor(job, output, SimpleQueue() if events is None else events)
        stack.enter_context(signals_to(supervisor.events.put))
        stack.callback(supervisor.close)
        verdict = supervisor.run()
        supervisor.end()
        verdict = supervisor.show_the_rest(verdict)
        supervisor.say(verdict)
    return replace(verdict, unsure=supervisor.unsure())


def run_again(job: Job, restarts: int) -> int:
    """As run_job, and again after a failure, `restarts` times at most, each time after a longer pause."""
    for attempt in range(restarts + 1):
        verdict = judged(job)
        final = verdict.status in (0, 2) or verdict.ordered
        if final or attempt == restarts:
            return verdict.status
        pause = min(60.0, 2.0**attempt)
        print(f"m3dist: starting again in {pause:g} s ({attempt + 1} of {restarts})", file=sys.stderr, flush=True)
        try:
            time.sleep(pause)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    raise AssertionError


@dataclass(frozen=True)
class Told:
    """A message of a host's agent."""

    host: int
    message: Message


@dataclass(frozen=True)
class Gone:
    """A host's agent could not be started, or its channel closed, for which `status` stands; host None: mpirun."""

    host: int | None
    why: str
    status: int = EXIT_UNREACHABLE


@dataclass(frozen=True)
class Interrupted:
    """A signal to us; or somebody who supervises us wants the end, and says why."""

    signal: int
    why: str = ""


@dataclass(frozen=True)
class Shown:
    """Everything that the ranks printed is."""


Event = Told | Gone | Interrupted | Shown
Events = SimpleQueue[Event]


class _Over(Exception):
    """The job is over."""

    def __init__(self, verdict: Verdict):
        self.verdict = verdict


class _Supervisor:
    def __init__(self, job: Job, output: Output, events: Events):
        self.job, self.output, self.events = job, output, events
        self.hosts = job.hosts
        self.mpirun: Mpirun | None = None
        self.seen = Evidence(job.host_of, [host.ssh for host in self.hosts])
        self.heard: dict[int, float] = {}  # host -> when it last said something; only those that have
        self.seen.heard = self.heard
        self.agents: dict[int, Agent] = {}
        self.ended: set[int | None] = set()  # hosts of which nothing more is awaited
        self.left: set[int] = set()  # those that told that none of their ranks is left
        self.phases: dict[int, str] = {}
        self.seen.phases = self.phases
        self.seen.end_limit = job.end_limit
        self.begun = False  # ranks have been asked for
        self.memory: dict[int, int] = {}
        self.last_words: dict[int, str] = {}  # of each rank that has ended
        self._next_ping = time.monotonic()
        self._input: SimpleQueue[None] = SimpleQueue()

    def run(self) -> Verdict:
        try:
            self._greet()
            orders = self._orders()
            self._start(orders)
            return self._watch()
        except _Over as over:
            return over.verdict
        except LaunchError as error:
            return Verdict(EXIT_NOT_STARTED, str(error))

    # -----------------------------------------------------------------------------------------------------------------
    # The start

    def _greet(self) -> None:
        """Start every agent, all at once; see that all are of our build."""
        if self.job.backend == "mpi":
            self.mpirun = Mpirun(self.hosts, AGENT, self._mpirun_killed)
        for number in range(len(self.hosts)):
            self._thread(self._follow, number)
        ours = about()
        for number, answer in self._ask("hello").items():
            self.memory[number] = answer["memory"]
            host = self.hosts[number]
            for name in () if host.local and not host.python else MUST_BE_EQUAL:
                if answer[name] != ours[name]:
                    remedy = "install the same on both" if answer[name] else "install it there"
                    where = f"on host {host.ssh}, but {ours[name]} here"
                    reason = f"{name} is {answer[name]} {where}: {remedy}"
                    raise _Over(Verdict(EXIT_NOT_STARTED, reason, host=number))

    def _orders(self) -> dict[int, list[Message]]:
        """Each host's ranks: what to run, with the ports that the hosts find free."""
        wanted = backends.addresses(self.job.backend, self.hosts)
        for number, ips in wanted.items():
            self._send(number, {"ports": ips})
        ports = {number: answer["ports"] for number, answer in self._ask("ports", wanted).items()}
        shared = backends.shared_variables(len(self.job.host_of), secrets.token_hex(8))
        own = backends.variables(self.job.backend, self.hosts, ports)
        orders: dict[int, list[Message]] = {number: [] for number in range(len(self.hosts))}
        for rank, number in enumerate(self.job.host_of):
            host, (env, files) = self.hosts[number], own[rank]
            ours = [name for name in self.job.ours if rank == 0 and host.local and not self.mpirun]
            order = {
                "rank": rank,
                "command": list(self.job.command),
                "env": {**shared, **self._forwarded(), **self.job.hostfile.env, **host.env, **env},
                "files": files,
                "cwd": host.cwd,
                "launched_in": os.getcwd(),
                "ours": ours,
                "input": rank == 0 and "stdin" not in ours,
            }
            orders[number].append(order)
        return orders

    def _forwarded(self) -> dict[str, str]:
        """The job's own variables; but over MPI between hosts an agent's channel is not encrypted."""
        open_channel = self.mpirun and not all(host.local for host in self.hosts)
        return {name: value for name, value in self.job.env.items() if not (open_channel and name in self.job.secret)}

    def _start(self, orders: Mapping[int, list[Message]]) -> None:
        self.begun = True
        for number, order in orders.items():
            self._send(number, {"start": order})
        if any(order["input"] for order in orders[0]):
            self._thread(self._pass_input)

    def _ask(self, word: str, hosts: Collection[int] | None = None) -> dict[int, Message]:
        """Every host's answer called `word`; the job is over where one does not come in time."""
        limit = time.monotonic() + self.job.start_limit
        answers: dict[int, Message] = {}
        missing = set(range(len(self.hosts)) if hosts is None else hosts)
        while missing:
            event = self._next(limit)
            if isinstance(event, Told) and word in event.message:
                answers[event.host] = event.message
                missing.discard(event.host)
            elif time.monotonic() >= limit:
                late = ", ".join(self.hosts[number].ssh for number in sorted(missing))
                reason = f"host {late} did not answer within {self.job.start_limit:g} s"
                raise _Over(Verdict(EXIT_UNREACHABLE, reason, host=min(missing)))
        return answers

    # -----------------------------------------------------------------------------------------------------------------
    # While it runs

    def _watch(self) -> Verdict:
        start_limit = time.monotonic() + self.job.start_limit
        while True:
            now = time.monotonic()
            self.seen.unread = now if self.output.unread else self.seen.unread
            found = judge(self.seen, now)
            if isinstance(found, Verdict):
                return found
            silent = self.seen.running - self.phases.keys() if self.job.reports or self.phases else set()
            if silent and now >= start_limit:
                return not_started(self.seen, silent, self.job.start_limit)
            self._next(min(found, start_limit) if silent else found)

    def _next(self, until: float) -> Event | None:
        """The next event, noted; None if there is none until then. Raises _Over where it ends the job."""
        event = self._wait(until)
        if isinstance(event, Interrupted):
            raise _Over(_interrupted(event))
        if isinstance(event, Gone):
            self.ended.add(event.host)
            if not self.begun:
                raise _Over(Verdict(event.status, event.why, host=event.host))
            self.seen.losses.append(Loss(event.host, event.why, time.monotonic()))
        if isinstance(event, Told):
            self._note(event.host, event.message)
        return event

    def _wait(self, until: float) -> Event | None:
        """The next event of all, while hosts are pinged and those that do not answer are given up."""
        while True:
            now = time.monotonic()
            if now >= self._next_ping:
                self._next_ping = now + PING
                for number in self.heard.keys() - self.ended:
                    self._send(number, {"ping": 0})
                    if now - self.heard[number] > self.job.silence_limit:
                        return Gone(number, f"no word from it for {self.job.silence_limit:g} s")
            limit = min(until, self._next_ping)
            with suppress(Empty):
                return self.events.get(timeout=max(0.0, limit - time.monotonic()))
            if limit == until:
                return None

    def _note(self, number: int, message: Message) -> None:
        now = self.heard[number] = time.monotonic()
        if "output" in message:
            self.output.add(message, lambda answer: self._send(number, answer))
        elif "taken" in message:
            self._input.put(None)
        elif "up" in message:
            self.phases[message["up"]] = message["phase"]
        elif "stalled" in message:
            words = (message["phase"] or "a program that reports no steps", message["seconds"], message["state"])
            self.seen.stalls.append(Stall(message["stalled"], *words, at=now))
        elif "exit" in message:
            rank, code = message["exit"], message["code"]
            lost_peer = b"connection to a peer was lost" in self.output.tail(rank)
            self.last_words[rank] = message["words"]
            seen = (message["phase"], message["peak"], lost_peer, message["ordered"])
            self.seen.exits.append(Exit(rank, code, now, *seen))
        elif "failed" in message:
            rank = message["rank"]
            what = f"host {self.hosts[number].ssh}" if rank is None else f"cannot start {self.seen.who(rank)}"
            raise _Over(Verdict(EXIT_NOT_STARTED, f"{what}: {message['failed']}", host=number))
        elif "alone" in message:
            how = f"it had no word from here for {message['alone']:g} s and ended its ranks"
            self.seen.losses.append(Loss(number, how, now))
        elif "ended" in message:
            self.ended.add(number)
            self.left.add(number)

    # -----------------------------------------------------------------------------------------------------------------
    # The end

    def end(self) -> None:
        """Have every agent end its ranks: gently, but at once at a second signal to us; and wait for them."""
        self._tell_all({"end": "gently"})
        limit = time.monotonic() + self.job.leave_limit
        while self.heard.keys() - self.ended and time.monotonic() < limit:
            event = self._wait(limit)
            if isinstance(event, Interrupted):
                self._tell_all({"end": "now"})
            elif isinstance(event, Gone):
                self.ended.add(event.host)
            elif isinstance(event, Told):
                with suppress(_Over):
                    self._note(event.host, event.message)

    def unsure(self) -> tuple[str, ...]:
        """Hosts on which ranks may still be ending: they have not told that none is left."""
        return tuple(self.hosts[number].ssh for number in sorted(self.heard.keys() - self.left)) if self.begun else ()

    def show_the_rest(self, verdict: Verdict) -> Verdict:
        """Wait until what the ranks printed is read: all of it, if the job went well, however slowly."""
        self.output.finish(lambda read: self.events.put(Shown()))
        limit = math.inf if verdict.status == 0 else time.monotonic() + DRAIN
        while (event := self._wait(limit)) and not isinstance(event, Shown):
            if isinstance(event, Interrupted):
                return verdict if verdict.status else _interrupted(event)
        return verdict

    def close(self) -> None:
        """End what is left of the agents: without their channels they end by themselves."""
        for number, agent in list(self.agents.items()):  # one may still be starting
            agent.close(1.0 if number in self.ended else 0.0)
        if self.mpirun:
            self.mpirun.close()

    def say(self, verdict: Verdict) -> None:
        """Tell the person at the terminal why the job ended, if not well."""
        if verdict.status == 0:
            return
        others = "; all ranks were ended" if len(self.job.host_of) > 1 and self.begun else ""
        lines = [verdict.reason + others]
        errors = list(self.agents[verdict.host].errors) if verdict.host in self.agents else []
        tail, peak, memory = b"", None, None
        if verdict.rank is not None:
            tail = self.output.tail(verdict.rank)
            peak = next((exit.peak for exit in self.seen.exits if exit.rank == verdict.rank), None)
            host = self.job.host_of[verdict.rank]
            memory = self.memory[host] // self.hosts[host].ranks if host in self.memory else None
            if tail:
                lines.append(f"the last lines of {self.seen.who(verdict.rank)}:")
        elif len(errors) > 1:  # a single one is in the reason
            lines.append("its last lines:")
            tail = "".join(f"{line}\n" for line in errors).encode()
        self.output.say("".join(f"m3dist: {line}\n" for line in lines))
        self.output.show_again(tail)
        words = "" if verdict.rank is None else self.last_words.get(verdict.rank, "")
        text = "\n".join([verdict.reason, words, *errors, tail.decode(errors="replace")])
        cause = recognise(text, verdict.status, peak_bytes=peak, memory_bytes=memory)
        if cause:
            self.output.say(f"m3dist: {cause.what}\nm3dist: what to do: {cause.remedy}\n")

    def _tell_all(self, message: Message) -> None:
        for number in self.heard.keys() - self.ended:
            self._send(number, message)

    def _send(self, number: int, message: Message) -> None:
        with suppress(ChannelClosed, KeyError):  # _follow sees it too
            self.agents[number].send(message)

    # -----------------------------------------------------------------------------------------------------------------
    # Threads

    def _thread(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _follow(self, number: int) -> None:
        """Start a host's agent, and pass on what it tells until its channel closes."""
        try:
            agent = MpiAgent(self.mpirun, number) if self.mpirun else Remote(self.hosts[number], AGENT)
            self.agents[number] = agent
            self.events.put(Told(number, agent.greet(self.job.start_limit, silence=self.job.silence_limit)))
        except LaunchError as error:
            status = EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_NOT_STARTED
            self.events.put(Gone(number, str(error), status))
            return
        try:
            while (message := agent.receive()) is not None:
                self.events.put(Told(number, message))
        except ChannelClosed:
            self.events.put(Gone(number, agent.how_it_ended() + agent.said()))

    def _mpirun_killed(self, by: signal.Signals) -> None:
        self.events.put(Gone(None, f"mpirun was killed by {by.name}"))

    def _pass_input(self) -> None:
        """Our standard input to rank 0, to its end; the next piece only when the last was taken."""
        while True:
            try:
                data = os.read(0, 65536)
            except OSError:
                data = b""
            self._send(0, {"input": data.decode("latin-1") or None})
            if not data:
                return
            self._input.get()


def _interrupted(event: Interrupted) -> Verdict:
    return Verdict(128 + event.signal, event.why or f"{signal_name(event.signal)} received", ordered=True)


@contextmanager
def signals_to(put: Callable[[Interrupted], None]) -> Iterator[None]:
    """Inside, SIGNALS become events. Those our parent had us ignore (nohup) stay ignored."""

    def handle(number: int, frame: FrameType | None) -> None:
        put(Interrupted(number))

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    # In the background of a terminal, reading it must fail, not stop us: the agents would take us for dead.
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number] or signal.SIG_DFL)
