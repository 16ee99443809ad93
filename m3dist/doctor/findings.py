"""What `m3dist doctor` makes of its evidence: what is in order, what is not, and what to do. Pure. No MLX.

findings_host.py looks at each host by itself, findings_network.py at addresses and links, findings_thunderbolt.py at
cables and RDMA. The known troubles are those that users of mlx, exo and omlx have reported; what stands there of macOS
was **not tried on a Mac**.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from m3dist.cluster.causes import recognise
from m3dist.doctor.examination import Examination, Finding, Look
from m3dist.doctor.findings_host import HOST_CHECKS, launcher_findings
from m3dist.doctor.findings_network import address_findings, firewall, link_findings
from m3dist.doctor.findings_thunderbolt import thunderbolt_findings
from m3dist.doctor.report import HostReport, NoAnswer

OLDEST_MLX = (0, 32, 4)  # before it, some errors of the ring never reach Python, and all ranks hang
MUST_BE_EQUAL = ("m3dist version", "m3dist build", "mlx version")  # the launcher compares them with its own
SHOULD_BE_EQUAL = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "numpy", "safetensors", "tokenizers", "jinja2")
SSH_FAILED = 255  # ssh's exit status


def find(seen: Examination) -> list[Finding]:
    """All findings, in the order in which a person would look."""
    return list(_find(seen))


def works(findings: Iterable[Finding]) -> bool:
    """Whether a launch would work, as far as was seen."""
    return all(finding.level != "error" for finding in findings)


def _find(seen: Examination) -> Iterator[Finding]:
    for number, (name, report) in enumerate(zip(seen.names, seen.reports)):
        check = "answer" if isinstance(report, NoAnswer) and report.greeted else "ssh"
        yield Finding(check, name, *reachability(seen, number))
    yield from versions(seen)
    for check, look_at in {**HOST_CHECKS, "firewall": firewall}.items():
        for number, report in seen.reached():
            for look in look_at(seen, number, report):
                yield Finding(check, seen.names[number], *look)
    yield from launcher_findings(seen)
    yield from address_findings(seen)
    yield from link_findings(seen)
    yield from thunderbolt_findings(seen)
    yield from alike(seen)


def reachability(seen: Examination, number: int) -> Look:
    """Whether a host answers, and how it can be made to."""
    host, report = seen.hosts[number], seen.reports[number]
    if isinstance(report, NoAnswer) and report.greeted:
        return Look("error", f"it began to answer, then: {report.why}", "ask again; or run `m3dist doctor -n 1` there")
    if isinstance(report, NoAnswer):
        cause = recognise(f"{report.said}\n{report.why}", SSH_FAILED)
        remedy = cause.remedy.replace("HOST", host.ssh) if cause else f"make `ssh {host.ssh} true` work by hand"
        return Look("error", report.why, remedy)
    how = "this machine" if host.local else "answers"
    return Look("ok", f"{how}: {report.raw['user']} on {report.raw['hostname']}, {report.system}")


# ---------------------------------------------------------------------------------------------------------------------
# Hosts among each other


def versions(seen: Examination) -> Iterator[Finding]:
    """What the launcher compares with its own, and the other packages with those that most hosts have."""
    usual = [_most(versions) for versions in zip(*(_others(report) for _, report in seen.reached()))]
    for number, report in seen.reached():
        found = [*_refused(seen, report), *_unusual(report, usual)]
        if not found:
            told = ", ".join(f"{what} {report.raw['about'][what]}" for what in MUST_BE_EQUAL)
            found = [Look("ok", f"{told}, Python {report.raw['python']['version']}")]
        yield from (Finding("versions", seen.names[number], *look) for look in found)


def _refused(seen: Examination, report: HostReport) -> Iterator[Look]:
    """For what the launcher refuses a host, and an MLX with which it should."""
    mlx, pip = report.raw["about"]["mlx version"], f"there: {report.raw['python']['path']} -m pip install"
    for what in MUST_BE_EQUAL:
        there, here = report.raw["about"][what], seen.ours[what]
        if there != here:
            remedy = f"{pip} mlx=={here}" if what.startswith("mlx") else "install the same m3dist there"
            yield Look("error", f"{what} is {there or 'none'} there, {here or 'none'} here", remedy)
    if mlx and version_numbers(mlx) < OLDEST_MLX:
        what = f"mlx {mlx} hangs where a peer is lost instead of saying so"
        yield Look("error", what, f"{pip} 'mlx>={'.'.join(map(str, OLDEST_MLX))}'")


def _others(report: HostReport) -> list[str]:
    """Versions that should be equal: of Python, then of SHOULD_BE_EQUAL."""
    python = ".".join(report.raw["python"]["version"].split(".")[:2])
    return [python, *(report.raw["packages"].get(name) or "none" for name in SHOULD_BE_EQUAL)]


def _unusual(report: HostReport, usual: Sequence[str]) -> Iterator[Look]:
    named = zip(("Python", *SHOULD_BE_EQUAL), _others(report), usual)
    differ = [f"{name} {version} (elsewhere {other})" for name, version, other in named if version != other]
    if differ:
        yield Look("warning", ", ".join(differ), "install the versions there that the others have")


def alike(seen: Examination) -> Iterator[Finding]:
    """Kinds of hosts: the ranks wait for the slowest of them at every sum."""
    reports = [report for _, report in seen.reached()]
    for what, values, level, remedy in (
        ("platforms", [report.raw["platform"] for report in reports], "warning", "use hosts of one kind"),
        ("chips", [report.chip for report in reports], "note", "--weights gives each a share that suits it"),
        ("macOS versions", [report.system for report in reports if report.mac], "note", "bring all to the newest"),
    ):
        if len(set(values)) > 1:
            counted = ", ".join(f"{count} x {value or 'unknown'}" for value, count in Counter(values).items())
            yield Finding("alike", "all", level, f"{what} differ: {counted}", remedy)


def _most(values: Iterable[str]) -> str:
    """The commonest; of several equally common, the first."""
    return Counter(values).most_common(1)[0][0]


def version_numbers(version: str) -> tuple[int, ...]:
    """ "0.32.4" -> (0, 32, 4)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
