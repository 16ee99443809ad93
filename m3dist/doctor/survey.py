"""Asks every host of a hostfile about itself and measures the links between them: the launcher's side of probe.py.

All hosts at once, each answer within a time: a host that is switched off or silent is one of the results. No MLX.
"""

import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from m3dist.cluster.agent import about
from m3dist.cluster.channel import ChannelClosed, Message
from m3dist.cluster.environment import LaunchError
from m3dist.cluster.hostfile import Host, Hostfile
from m3dist.cluster.mpi import own_addresses
from m3dist.cluster.ssh import Remote
from m3dist.doctor.report import HostReport, NoAnswer
from m3dist.doctor.topology import Link, rounds

GREETING = 13.0  # seconds; ssh gives up connecting after 10
DESCRIBING = 12.0  # seconds; a command on a host has 8
LINK = 4.0  # seconds for one link
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Measured:
    """A link as it was found: its round trip in seconds and its bytes/s, or why there are none.

    `problem` is errno's name, such as EHOSTUNREACH, or words; `listening` says that the target could not even listen.
    `unmeasured` says why the link was not tried, or not to the end.
    """

    link: Link
    round_trip: float | None = None
    bandwidth: float | None = None
    problem: str | None = None
    listening: bool = False
    unmeasured: str | None = None

    @property
    def works(self) -> bool:
        return self.round_trip is not None


class Survey:
    """Probes on all hosts of a hostfile. A context manager: at its end no probe is left.

    with Survey(hostfile, 30.0) as survey:
        reports = survey.describe("MiniMaxAI/MiniMax-M3")
        measured = survey.measure(needed_links("ring", hostfile.hosts, reports))
    """

    def __init__(self, hostfile: Hostfile, seconds: float):
        self.hostfile = hostfile
        self.end = time.monotonic() + seconds
        self._asked: dict[object, _Asked | NoAnswer] = {}

    def __enter__(self) -> "Survey":
        """Start all probes."""
        hosts = {machine(host): host for host in self.hostfile.hosts}
        self._asked = dict(zip(hosts, _all_at_once(self._greet, list(hosts.values()))))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _all_at_once(lambda asked: asked.remote.close(1.0), [a for a in self._asked.values() if isinstance(a, _Asked)])

    def describe(self, model: str | None = None, cut: Mapping[str, Any] | None = None) -> list[HostReport | NoAnswer]:
        """What each host says about itself, in the hostfile's order. `cut`: as probe.describe has it."""
        groups: dict[object, list[int]] = {}
        for number, host in enumerate(self.hostfile.hosts):
            groups.setdefault(machine(host), []).append(number)
        ask = partial(self._describe, model, cut or {})
        reports = _all_at_once(lambda group: [ask(number) for number in group], list(groups.values()))
        found = dict(zip(sum(groups.values(), []), sum(reports, [])))
        return [found[number] for number in range(len(found))]

    def measure(self, links: Sequence[Link]) -> list[Measured]:
        """Every link, in its order; those for which no time is left say so."""
        found: dict[Link, Measured] = {}
        for group in rounds(links, [machine(host) for host in self.hostfile.hosts]):
            if self.end - time.monotonic() < LINK:
                found |= {link: Measured(link, unmeasured="no time was left") for link in group}
            else:
                found |= dict(zip(group, _all_at_once(self._measure, group)))
        return [found[link] for link in links]

    def _greet(self, host: Host) -> "_Asked | NoAnswer":
        remote = None
        try:
            remote = Remote(host, "m3dist.doctor.probe")
            remote.greet(min(GREETING, self.end - time.monotonic()))
            return _Asked(remote, self.end)
        except LaunchError as error:
            said = "\n".join(remote.errors) if remote else ""
            if remote:
                remote.close()
            return NoAnswer(str(error).removeprefix(f"host {host.ssh}: "), said)

    def _describe(self, model: str | None, cut: Mapping[str, Any], number: int) -> HostReport | NoAnswer:
        host = self.hostfile.hosts[number]
        asked = self._asked[machine(host)]
        if isinstance(asked, NoAnswer):
            return asked
        env = {**self.hostfile.env, **host.env}
        question = {"model": model, "cut": cut, "cwd": host.cwd, "env": env, "ips": host.ips}
        question["launched_in"] = os.getcwd()
        try:
            skew = asked.skew()
            report = asked.answer(asked.ask(describe=question), DESCRIBING)["report"]
        except _Silent as silence:
            return NoAnswer(str(silence), "\n".join(asked.remote.errors), greeted=True)
        return HostReport(report, skew)

    def _measure(self, link: Link) -> Measured:
        source, target = (self._asked[machine(self.hostfile.hosts[end])] for end in (link.source, link.target))
        if isinstance(source, NoAnswer) or isinstance(target, NoAnswer):
            return Measured(link, unmeasured="a host cannot be reached")
        common = {"address": link.address, "secret": secrets.token_hex(32), "seconds": LINK - 1.0}
        try:
            far = target.ask(listen=common)
            opened = target.answer(far, LINK)
            if "listening" not in opened:
                return Measured(link, problem=opened["measured"]["failed"], listening=True)
            near = source.ask(connect={**common, "port": opened["listening"]})
            seen = source.answer(near, LINK)["measured"]
            if "failed" in seen:
                return Measured(link, problem=seen["failed"])
            heard = target.answer(far, LINK)["measured"]
        except _Silent as silence:
            return Measured(link, unmeasured=str(silence))
        return Measured(link, seen["round_trip"], heard.get("bandwidth"))


class _Silent(Exception):
    """A probe no longer answers."""


class _Asked:
    """A probe and the answers that came while another was waited for. One thread at a time."""

    def __init__(self, remote: Remote, end: float):
        self.remote, self.end = remote, end
        self._number = 0
        self._early: dict[int, deque[Message]] = {}

    def ask(self, **question: Any) -> int:
        """Its number, to get the answers with. Raises _Silent."""
        self._number += 1
        self._early[self._number] = deque()
        try:
            self.remote.send({**question, "id": self._number})
        except ChannelClosed:
            raise _Silent(self.remote.how_it_ended()) from None
        return self._number

    def answer(self, number: int, seconds: float) -> Message:
        """The next one to that question. Raises _Silent where there is none within `seconds`, or a problem instead."""
        end = min(time.monotonic() + seconds, self.end)
        while not self._early[number]:
            try:
                message = self.remote.receive(max(0.0, end - time.monotonic()))
            except ChannelClosed:
                raise _Silent(self.remote.how_it_ended()) from None
            if message is None:
                raise _Silent("no answer in time")
            self._early[message["id"]].append(message)
        answer = self._early[number].popleft()
        if "problem" in answer:
            raise _Silent(answer["problem"])
        return answer

    def skew(self) -> float:
        """Seconds the host's clock is ahead of ours, to half of the quickest of three round trips. Raises _Silent."""
        found = []
        for _ in range(3):
            began = time.time()
            theirs = self.answer(self.ask(clock=None), 5.0)["clock"]
            ended = time.time()
            found.append((ended - began, theirs - (began + ended) / 2))
        return float(min(found)[1])


def launcher(hostfile: Hostfile, backend: str) -> dict[str, Any]:
    """What the launcher says of itself: agent.about(); for MPI also the path of its own mpirun, which starts the ranks,
    and ssh names -> why the launcher finds no way to that host."""
    if backend != "mpi":
        return about()
    hosts = list({host.ssh: host for host in hostfile.hosts}.values())
    found = {host.ssh: why for host, why in zip(hosts, _all_at_once(_no_way, hosts)) if why}
    return about() | {"mpirun": shutil.which("mpirun"), "no way": found}


def _no_way(host: Host) -> str | None:
    try:
        own_addresses([host])
    except LaunchError as error:
        return str(error).removeprefix(f"host {host.ssh}: ")
    return None


def machine(host: Host) -> object:
    """What is the same for two hosts that one probe can speak for."""
    return ("here", host.python) if host.local else (host.user, host.ssh, host.port, host.python)


Asked = TypeVar("Asked")


def _all_at_once(function: Callable[[Asked], Answer], arguments: Sequence[Asked]) -> list[Answer]:
    """`function` of each argument, each in a thread."""
    if not arguments:
        return []
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))
