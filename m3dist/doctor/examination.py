"""What `m3dist doctor` has seen, and a finding made of it. No MLX."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from m3dist.cluster.hostfile import Host, Hostfile
from m3dist.doctor.report import HostReport
from m3dist.doctor.survey import Measured, machine
from m3dist.doctor.topology import Reports
from m3dist.plan import Plan

GIB = 2**30


class Look(NamedTuple):
    """One look at one host: an error says that a launch would not work, nothing else does."""

    level: str  # "ok", "note", "warning" or "error"
    seen: str  # the evidence
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """A look, and where and for what. `host` is a name of Examination.names, "one -> other", "all", or "launcher"."""

    check: str  # such as "ssh", "versions", "memory"
    host: str
    level: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Examination:
    """All the evidence. `reports` are in the order of the hostfile's hosts; `ours` is survey.launcher's."""

    hostfile: Hostfile
    backend: str
    reports: Reports
    ours: Mapping[str, Any]
    measured: Sequence[Measured] = ()
    model: str | None = None  # as --model was given
    plan: Plan | None = None  # of that model, over all ranks, in the format it has at the hub
    context: int = 0  # tokens to make room for
    cut: Mapping[str, Any] = field(default_factory=dict)  # weights, experts and attention, where they were given

    @property
    def hosts(self) -> Sequence[Host]:
        return self.hostfile.hosts

    @property
    def sums_over_tcp(self) -> bool:
        """Whether the hostfile's addresses carry the ranks' sums; else the ranks only meet there."""
        return self.backend in ("ring", "mpi")

    @cached_property
    def names(self) -> list[str]:
        """What each host is called: its ssh name, with its first rank where another has the same."""
        shared = [host.ssh for host in self.hosts]
        return [
            f"{ssh} (rank {self.ranks(number).start})" if shared.count(ssh) > 1 else ssh
            for number, ssh in enumerate(shared)
        ]

    def reached(self) -> Iterator[tuple[int, HostReport]]:
        """Each host that answered, by its number."""
        for number, report in enumerate(self.reports):
            if isinstance(report, HostReport):
                yield number, report

    def ranks(self, host: int) -> range:
        """The ranks that run on host number `host`."""
        first = sum(other.ranks for other in self.hosts[:host])
        return range(first, first + self.hosts[host].ranks)

    def apart(self, host: int, other: int) -> bool:
        """Whether the two are different machines, as far as the hostfile says."""
        return machine(self.hosts[host]) != machine(self.hosts[other])

    def first(self, host: int) -> int:
        """The first entry of the machine that host number `host` is on."""
        return next(other for other in range(len(self.hosts)) if not self.apart(other, host))

    def on_machine(self, host: int) -> list[int]:
        """The ranks that run on a host's machine, those of other entries of the hostfile included."""
        together = [other for other in range(len(self.hosts)) if not self.apart(host, other)]
        return [rank for other in together for rank in self.ranks(other)]

    @cached_property
    def kept(self) -> Mapping[int, Mapping[str, Any]]:
        """Rank -> what its host's store keeps for it, as kept.py says: of the newest revision and format that any has.

        That is what a launch looks for, too.
        """
        own = [
            entry
            for number, report in self.reached()
            for entry in report.store.get("entries", [])
            if entry["rank"] in self.ranks(number)
        ]
        newest = max(own, key=lambda entry: str(entry["created"]), default=None)
        key = newest and (newest["revision"], newest["plan"])
        return {entry["rank"]: entry for entry in own if (entry["revision"], entry["plan"]) == key}

    def needed(self, host: int) -> int | None:
        """Bytes of weights and cache that all ranks on a host's machine hold; None without a plan."""
        if self.plan is None:
            return None
        plan, kept = self.plan, self.kept
        return sum(
            (kept[rank]["bytes"] if rank in kept else plan.bytes_held(rank))
            + self.context * plan.cache_bytes_per_token(rank)
            for rank in self.on_machine(host)
        )


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
