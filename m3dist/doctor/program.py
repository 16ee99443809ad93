"""`m3dist doctor`: asks every host, tries the links, and says what would keep a job from running. No MLX."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from m3dist.cluster.hostfile import Hostfile
from m3dist.doctor.examination import Examination, Finding, gib
from m3dist.doctor.findings import find, works
from m3dist.doctor.report import HostReport, Interface
from m3dist.doctor.survey import Measured, Survey, launcher
from m3dist.doctor.topology import Link, needed_links
from m3dist.errors import M3Error
from m3dist.plan import Plan, plan_world
from m3dist.plan_report import inventory_of

SECONDS = 30.0  # for everything, whatever the hosts do
WIDTH = 120  # columns where there is no terminal
COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def main(args: argparse.Namespace, hostfile: Hostfile) -> int:
    """Print what was found; 0 if a launch would work, 1 if not."""
    began = time.monotonic()
    plan, findings = _plan(args, hostfile)
    if sys.stderr.isatty():
        print(f"asking the hosts, {SECONDS:g} s at most ...", file=sys.stderr, flush=True)
    seen = examine(hostfile, args.model, plan, args.context or 0, _cut(args))
    findings += find(seen)
    seconds = time.monotonic() - began
    if args.json:
        print(json.dumps(as_json(seen, findings, seconds)))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        for part in as_tables(seen, findings, seconds):
            console.print(part)
    return 0 if works(findings) else 1


def examine(
    hostfile: Hostfile,
    model: str | None = None,
    plan: Plan | None = None,
    context: int = 0,
    cut: Mapping[str, Any] | None = None,
) -> Examination:
    """Ask all hosts and measure their links, within SECONDS. `cut`: weights, experts and attention, where given."""
    backend, cut = hostfile.backend or "ring", cut or {}
    with Survey(hostfile, SECONDS) as survey:
        reports = survey.describe(model, {"world": hostfile.world, **cut})
        measured = survey.measure(needed_links(backend, hostfile.hosts, reports))
    ours = launcher(hostfile, backend)
    return Examination(hostfile, backend, reports, ours, measured, model, plan, context, cut)


def _cut(args: argparse.Namespace) -> dict[str, Any]:
    return {"weights": args.weights, "experts": args.experts, "attention": args.attention}


def _plan(args: argparse.Namespace, hostfile: Hostfile) -> tuple[Plan | None, list[Finding]]:
    """The plan of --model over the hostfile's ranks, or what keeps it from being made."""
    if args.model is None:
        return None, []
    try:
        inventory, _ = inventory_of(args.model, None, None, None)
    except M3Error as error:
        what = f"memory and disk were not compared with the model: {error}"
        return None, [Finding("plan", "all", "warning", what, "m3dist plan --model says which models are known")]
    try:
        return plan_world(inventory, hostfile.world, **_cut(args)), []
    except M3Error as error:
        remedy = f"`m3dist plan --model {args.model} --world N` says what each of N ranks would hold"
        return None, [Finding("plan", "all", "error", str(error), remedy)]


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def as_json(seen: Examination, findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    """What the tables say, and what each host answered."""
    return {
        "works": works(findings),
        "backend": seen.backend,
        "world": seen.hostfile.world,
        "seconds": round(seconds, 3),
        "launcher": seen.ours,
        "findings": [vars(finding) for finding in findings],
        "links": [_link_json(seen, measured) for measured in seen.measured],
        "hosts": [
            {"host": name, "answers": True, "skew": report.skew, "report": report.raw}
            if isinstance(report, HostReport)
            else {"host": name, "answers": False, "why": report.why, "said": report.said}
            for name, report in zip(seen.names, seen.reports)
        ],
    }


def _link_json(seen: Examination, measured: Measured) -> dict[str, Any]:
    link, interface = measured.link, _interface(seen, measured.link)
    return {
        "from": seen.names[link.source],
        "to": seen.names[link.target],
        "address": link.address,
        "interface": interface.name if interface else None,  # of `to`
        "round_trip": measured.round_trip,
        "bandwidth": measured.bandwidth,
        "problem": measured.problem or measured.unmeasured,
    }


def _interface(seen: Examination, link: Link) -> Interface | None:
    """The one at which a link arrives."""
    target = seen.reports[link.target]
    return target.interface_of(link.address) if isinstance(target, HostReport) else None


def as_tables(seen: Examination, findings: Sequence[Finding], seconds: float) -> Iterable[Table | Text]:
    """The hosts, the links, what is not in order and what is, and the verdict."""
    yield _hosts(seen)
    if seen.measured:
        yield _links(seen)
    yield from _findings(findings)
    errors = sum(finding.level == "error" for finding in findings)
    verdict = f"A launch would not work; errors: {errors}" if errors else "A launch would work"
    yield Text(f"{verdict}. Asked in {seconds:.1f} s.", style=COLOURS["error" if errors else "ok"])


def _hosts(seen: Examination) -> Table:
    table = _table("host", "ranks", "system", "chip", "memory", "python", "mlx", "m3dist")
    for number, (name, report) in enumerate(zip(seen.names, seen.reports)):
        ranks = seen.ranks(number)
        which = str(ranks.start) if len(ranks) == 1 else f"{ranks.start} to {ranks[-1]}"
        if not isinstance(report, HostReport):
            _row(table, name, which, "does not answer", *[""] * 5)
            continue
        free = gib(report.available) if report.available else "?"
        total = gib(report.memory) if report.memory else "?"
        its = report.raw["about"]
        versions = (report.raw["python"]["version"], its["mlx version"] or "missing", its["m3dist build"])
        _row(table, name, which, report.system, report.chip, f"{free} of {total}", *versions)
    return table


def _links(seen: Examination) -> Table:
    table = _table("from", "to", "address", "on", "round trip", "bandwidth")
    for measured in seen.measured:
        link, interface = measured.link, _interface(seen, measured.link)
        trip = f"{measured.round_trip * 1e3:.3f} ms" if measured.round_trip else measured.problem or "not measured"
        rate = f"{measured.bandwidth / 1e9:.3g} GB/s" if measured.bandwidth else ""
        place = f"{interface.name} ({interface.kind})" if interface else "?"
        _row(table, seen.names[link.source], seen.names[link.target], link.address, place, trip, rate)
    return table


def _findings(findings: Sequence[Finding]) -> Iterable[Table | Text]:
    """Errors first; then one line with what is in order, as each of it is expected."""
    table = _table("", "check", "host", "what was seen, and what to do")
    for level in ("error", "warning", "note"):
        for finding in findings:
            if finding.level == level:
                text = finding.seen + (f"\n=> {finding.remedy}" if finding.remedy else "")
                _row(table, Text(level, style=COLOURS[level]), finding.check, finding.host, text)
    if table.row_count:
        yield table
    good = dict.fromkeys(finding.check for finding in findings if finding.level == "ok")
    bad = {finding.check for finding in findings if finding.level in ("error", "warning")}
    told = [check + (" (elsewhere)" if check in bad else "") for check in good]
    yield Text("In order: " + ", ".join(told)) if told else Text("Nothing is in order.")


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, *cells: str | Text) -> None:
    """Cells are data: brackets in them are no markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
