"""What `m3dist doctor` has seen, and a finding made of it. No MLX."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    plan: Plan | None = None  # of that model, over all ranks
    context: int = 0  # tokens to make room for

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

    def needed(self, host: int) -> int | None:
        """Bytes of weights and cache that all ranks on a host's machine hold; None without a plan."""
        if self.plan is None:
            return None
        plan, together = self.plan, [other for other in range(len(self.hosts)) if not self.apart(host, other)]
        ranks = [rank for other in together for rank in self.ranks(other)]
        return sum(plan.bytes_held(rank) + self.context * plan.cache_bytes_per_token(rank) for rank in ranks)


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
