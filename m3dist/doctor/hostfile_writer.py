"""`m3dist hostfile`: writes a hostfile from what the hosts say, and checks whether one still holds. No MLX.

proposal.py decides; of what it proposes, the first whose links connect is written. Nothing is changed on any host.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from m3dist.cluster.agent import about
from m3dist.cluster.hostfile import Host, Hostfile, read_hostfile
from m3dist.doctor.examination import Examination, Finding
from m3dist.doctor.findings import reachability, works
from m3dist.doctor.findings_network import address_findings
from m3dist.doctor.findings_thunderbolt import thunderbolt_findings
from m3dist.doctor.program import SECONDS
from m3dist.doctor.proposal import Candidate, propose
from m3dist.doctor.report import HostReport
from m3dist.doctor.survey import Survey
from m3dist.doctor.topology import needed_links


def main(args: argparse.Namespace) -> int:
    """Write a hostfile or check one: 0 where that went well, 1 where none can be written, or it does not hold.

    Raises HostfileError for a file to check that is none.
    """
    return check(args.check) if args.check else write(args.hosts, args.backend, args.output)


def write(hosts: Sequence[Host], backend: str | None, output: str | None) -> int:
    """Into `output`, or on standard output; what else there is to say, on standard error."""
    hostfile = Hostfile("--hosts", None, {}, tuple(hosts))
    with Survey(hostfile, SECONDS) as survey:
        seen = Examination(hostfile, backend or "ring", survey.describe(), about())
        reports = [report for _, report in seen.reached()]
        if len(reports) < len(hosts):
            for number, name in enumerate(seen.names):
                line = _as_line(Finding("ssh", name, *reachability(seen, number)))
                _say(line.replace("the hostfile's `python`", "--python"))  # there is no hostfile yet
            return 1
        proposal = propose(hosts, reports, backend)
        for note in proposal.notes:
            _say(note)
        found = next((each for each in proposal.candidates if _connects(survey, each, reports)), None)
    if found is None:
        _say("no hostfile was written: nothing connects all hosts" + (f" for {backend}" if backend else ""))
        return 1
    if output:
        with open(output, "w", encoding="utf-8") as file:
            file.write(as_text(found.hostfile))
    else:
        sys.stdout.write(as_text(found.hostfile))
    _say(f"{found.hostfile.backend} over {found.over}{f', written to {output}' if output else ''}")
    return 0


def _connects(survey: Survey, candidate: Candidate, reports: Sequence[HostReport]) -> bool:
    """Whether all its links do; says which does not. It may have the survey's hosts in another order."""
    hosts, backend = candidate.hostfile.hosts, candidate.hostfile.backend or "ring"
    asked = [(host.ssh, host.user) for host in survey.hostfile.hosts]
    place = [asked.index((host.ssh, host.user)) for host in hosts]
    links = needed_links(backend, hosts, [reports[number] for number in place])
    for measured in survey.measure([replace(x, source=place[x.source], target=place[x.target]) for x in links]):
        if not measured.works:
            source, target = (survey.hostfile.hosts[end].ssh for end in (measured.link.source, measured.link.target))
            why = f"{source} does not reach {target} at {measured.link.address}"
            _say(f"not {backend} over {candidate.over}: {why} ({measured.problem or measured.unmeasured})")
            return False
    return True


def as_text(hostfile: Hostfile) -> str:
    """The JSON of mlx.launch, a line a host; where a host has a `python`, which mlx.launch ignores, that too."""
    entries = []
    for host in hostfile.hosts:
        entry: dict[str, Any] = {"ssh": f"{host.user}@{host.ssh}" if host.user else host.ssh, "ips": list(host.ips)}
        entry |= {"rdma": list(host.rdma)} if host.rdma else {}
        entries.append(entry | ({"python": host.python} if host.python else {}))
    rows = ",\n".join(f"        {json.dumps(entry)}" for entry in entries)
    return f'{{\n    "backend": {json.dumps(hostfile.backend)},\n    "hosts": [\n{rows}\n    ]\n}}\n'


def check(path: str) -> int:
    """Print what of a hostfile holds and what no longer does: hosts, addresses, cables, devices."""
    hostfile = read_hostfile(path)
    hostfile = hostfile.with_backend(hostfile.backend or "ring")
    with Survey(hostfile, SECONDS) as survey:
        seen = Examination(hostfile, hostfile.backend or "ring", survey.describe(), about())
    findings = [Finding("ssh", name, *reachability(seen, number)) for number, name in enumerate(seen.names)]
    findings += [*address_findings(seen), *thunderbolt_findings(seen)]
    for finding in findings:
        print(_as_line(finding))
    print(f"note: no link was measured: m3dist doctor --hostfile {path} does")
    print(f"{path} holds" if works(findings) else f"{path} does not hold any more")
    return 0 if works(findings) else 1


def _as_line(finding: Finding) -> str:
    remedy = f"\n    => {finding.remedy}" if finding.remedy else ""
    return f"{finding.level}: {finding.host}: {finding.seen}{remedy}"


def _say(text: str) -> None:
    print(f"m3dist: {text}", file=sys.stderr, flush=True)
