"""`m3dist plan --predict`: tokens per second on machines we may not have, and what that rests on. No MLX."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from m3dist.errors import PlanError
from m3dist.machines import (
    LAUNCH,
    LINKS,
    MACS,
    PUBLISHED_SPEEDS,
    SELECTED_PASSES,
    USABLE_BANDWIDTH,
    USABLE_FLOPS,
    Link,
    Machine,
)
from m3dist.measured import Comparison, compare, link_of, machine_of, read_bench
from m3dist.options import GPU_PREFILL_CHUNK, MAX_RANKS
from m3dist.plan_report import GIB, RESERVE_GIB, inventory_of, table
from m3dist.predict import (
    KERNELS_DENSE_LAYER,
    KERNELS_MOE_LAYER,
    KERNELS_SELECTION,
    KERNELS_TOKEN,
    Prediction,
    Step,
    possible_plans,
    predict,
)

# The values of a Machine that --bandwidth (GB/s) and --flops (TFLOP/s) replace, and the units they are in.
READS = {"bandwidth": 1e9, "attention_bandwidth": 1e9, "selected_bandwidth": 1e9 / SELECTED_PASSES}
COMPUTES = dict.fromkeys(("flops", "expert_flops", "attention_flops", "index_flops"), 1e12)
# Where the flags say nothing.
WORLDS = (1, 2, 4, 8)
MAC = "m3-ultra"
CONTEXTS = (512, 16384, 131072)
PROMPT = 8192


def main(args: argparse.Namespace) -> int:
    """Print the prediction; 0."""
    inventory, source = inventory_of(args.model, args.mode, args.bits, args.group_size)
    most = inventory.config.max_position_embeddings
    contexts = [args.context] if args.context else [n for n in CONTEXTS if n <= most] or [most]
    prompt = args.prompt_tokens or min(PROMPT, most)
    for flag, tokens in (("--context", contexts[-1]), ("--prompt-tokens", prompt)):
        if tokens > most:
            raise PlanError(f"{flag}: the model takes at most {most} tokens (max_position_embeddings in its config)")
    bench = read_bench(args.from_bench) if args.from_bench else None
    chunk = args.prefill_chunk or (bench["prefill_chunk"] if bench else GPU_PREFILL_CHUNK)
    machine, links = machine_and_links(args, bench)
    rows: list[list[Prediction]] = []
    for world in [args.world] if args.world else WORLDS:
        plans = possible_plans(inventory, world, args.experts)
        rows += predict(plans, machine, links if world > 1 else links[:1], contexts, prompt, chunk)
    memory = args.memory or (None if bench else MACS[args.mac or MAC].memory)
    rows = [sorted(row, key=lambda p: (too_large(p, memory), p.score)) for row in rows]  # the better cut first
    checks = compare(bench, args.from_bench) if bench else []
    show = as_json if args.json else as_text
    print(show(source, machine, links, rows, memory, checks))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What is assumed


def machine_and_links(args: argparse.Namespace, bench: dict[str, Any] | None) -> tuple[Machine, list[Link]]:
    """The table's machine and links, or a bench's, with the values replaced that flags give.

    Raises PlanError for a link that the Mac cannot have.
    """
    links = [LINKS[args.link]] if args.link else list(LINKS.values())
    if bench:
        machine, measured = machine_of(bench, args.from_bench), link_of(bench, args.from_bench)
        links = [measured] if measured and not args.link else links
    else:
        mac = args.mac or MAC
        machine, ports = machine_of_mac(mac), MACS[mac].rdma_ports
        links = [replace(link, mesh=min(link.mesh, ports + 1)) for link in links if ports or not link.exchange]
        if not links:
            raise PlanError(f"--link {args.link}: {mac} has no Thunderbolt 5, which RDMA needs")
    for flag, value, fields in (
        ("--bandwidth", args.bandwidth, READS),
        ("--flops", args.flops, COMPUTES),
        ("--launch", args.launch, {"launch": 1e-6}),
    ):
        machine = replaced(machine, flag, value, fields)
    for flag, value, fields in (
        ("--latency", args.latency, {"hop": 0.5e-6, "exchange": 1e-6, "handover": 0.0}),  # two hops between two ranks
        ("--link-bandwidth", args.link_bandwidth, {"bandwidth": 1e9}),
    ):
        links = [replaced(link, flag, value, fields) for link in links]
    return machine, links


def machine_of_mac(name: str) -> Machine:
    """What a Mac of the table can be assumed to reach."""
    mac = MACS[name]
    bandwidth, flops = USABLE_BANDWIDTH * mac.bandwidth * 1e9, USABLE_FLOPS * mac.tflops * 1e12
    reads = f"assumed {USABLE_BANDWIDTH:g} of {mac.bandwidth:g} GB/s published ({mac.source})"
    computes = f"assumed {USABLE_FLOPS:g} of {mac.tflops:g} TFLOP/s on paper, as measured on an M3 Ultra"
    sources = dict.fromkeys(READS, reads) | dict.fromkeys(COMPUTES, computes)
    sources["launch"] = "a chain of small kernels on an M3 Ultra (ml-explore/mlx issue 4521)"
    values = dict.fromkeys(COMPUTES, flops) | {"bandwidth": bandwidth, "attention_bandwidth": bandwidth}
    values["selected_bandwidth"] = bandwidth / SELECTED_PASSES
    return Machine(name, **values, launch=LAUNCH, sources=sources)


def replaced(figures: Any, flag: str, value: float | None, units: Mapping[str, float]) -> Any:
    """A Machine or Link with `value` in each field of `units`, times its unit; as it is for None."""
    if value is None:
        return figures
    new = {field: value * unit for field, unit in units.items()}
    return replace(figures, **new, sources={**figures.sources, **dict.fromkeys(units, flag)})


def assumptions(machine: Machine, links: Sequence[Link]) -> list[str]:
    """Every value, and where it is from."""
    lines = [
        *speed_lines(machine),
        f"{machine.name}: {machine.launch * 1e6:.2f} us a kernel: {machine.sources['launch']}",
        f"{machine.name}: {python_line(machine)}",
        f"kernels: {KERNELS_DENSE_LAYER} a dense layer, {KERNELS_MOE_LAYER} a layer with experts, {KERNELS_SELECTION}"
        f" more where it selects blocks, {KERNELS_TOKEN} beside the layers",
    ]
    for link in links:
        if link.mesh > 1:
            lines.append(f"{link.name}: a sum {us(link.exchange)} up to {link.mesh} ranks: {link.sources['exchange']}")
        if link.mesh < MAX_RANKS:
            lines.append(f"{link.name}: {us(link.hop)} a hop, 2 (N - 1) hops in a ring: {link.sources['hop']}")
        if link.handover:
            lines.append(f"{link.name}: {us(link.handover)} more a sum: {link.sources['handover']}")
        lines.append(f"{link.name}: a rank sends {link.bandwidth / 1e9:.2f} GB/s: {link.sources['bandwidth']}")
    return [
        *lines,
        "a product takes the longer of its reads and its arithmetic, or both where weights are unpacked first, which"
        " happens from 8 or 24 rows on, by format; K and V are read once a KV head, selected blocks once a query",
        "a prompt's last token is a step of decode; the others end with the last layer's keys and values",
        "nothing overlaps: neither sums nor launches with reading or computing",
    ]


def speed_lines(machine: Machine) -> list[str]:
    """What is read and computed how fast, and where that is from."""
    lines, m = [], machine
    for field, text in {
        "bandwidth": f"weights are read for one token at {gigabytes(m.bandwidth)}",
        "unpack_bandwidth": f"weights are unpacked for many tokens at {gigabytes(m.unpack_bandwidth)}",
        "flops": f"products compute {teraflops(m.flops)}",
        "expert_flops": f"products with the experts that tokens chose compute {teraflops(m.expert_flops)}",
        "attention_bandwidth": f"attention of one token reads {gigabytes(m.attention_bandwidth)}",
        "attention_flops": f"attention computes {teraflops(m.attention_flops)}",
        "index_flops": f"blocks are chosen at {teraflops(m.index_flops)}",
        "selected_bandwidth": "the K and V that each of many tokens selected take their bytes at"
        f" {gigabytes(m.selected_bandwidth)}",
    }.items():
        if getattr(m, field) is None:
            lines.append(f"{m.name}: weights are taken to be unpacked as they are multiplied")
        else:
            lines.append(f"{m.name}: {text}: {m.sources[field]}")
    return lines


def python_line(machine: Machine) -> str:
    if not machine.host:
        return "Python is taken to be faster than the GPU, one step ahead of it"
    more = f", {us(machine.host_selection)} more where it selects blocks" if machine.host_selection else ""
    return f"Python takes {us(machine.host)} a layer{more}, one step ahead: {machine.sources['host']}"


def gigabytes(bandwidth: float | None) -> str:
    return f"{(bandwidth or 0.0) / 1e9:.4g} GB/s"


def teraflops(flops: float) -> str:
    return f"{flops / 1e12:.4g} TFLOP/s"


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def as_text(
    source: str,
    machine: Machine,
    links: Sequence[Link],
    rows: Sequence[Sequence[Prediction]],
    memory: float | None,
    checks: Sequence[Comparison],
) -> str:
    best = [row[0] for row in rows]
    parts = [
        [f"{source}, predicted for {machine.name}: tokens per second"],
        speeds(rows, memory),
        [f"Milliseconds of a token at {min(best[0].decode)}, and of each token of a prompt of {best[0].prompt}:"],
        split(best),
        ["Assumed:", *(f"  {line}" for line in assumptions(machine, links))],
    ]
    if checks:
        parts += [["The bench's own model, predicted from the bench's own figures of the machine:"], checked(checks)]
    parts.append(["Published by others, for orientation (decode, M3 Ultra, tokens per second by Macs):"])
    parts.append(published())
    if memory and any(too_large(p, memory) for p in best):
        parts[1].append(f"* more than {memory:g} GB less {RESERVE_GIB:g} reserved")
    return "\n\n".join("\n".join(part) for part in parts)


def speeds(rows: Sequence[Sequence[Prediction]], memory: float | None) -> list[str]:
    """Of each world and link the better cut, and how much better it decodes."""
    first = rows[0][0]
    head = ["ranks", "link", "attention", "against the other", "held"]
    head += [*(f"decode at {n}" for n in first.decode), f"prefill of {first.prompt}"]
    cells = []
    for best, *others in rows:
        cells.append(
            [
                *name(best),
                f"{others[0].score / best.score:.2f}x as fast" if others else "-",
                f"{best.bytes_held / GIB:.1f} GiB{'*' if too_large(best, memory) else ''}",
                *(f"{1 / step.seconds:.1f}" for step in best.decode.values()),
                f"{best.prompt / best.prefill.seconds:.0f}",
            ]
        )
    return table([head, *cells])


def split(best: Sequence[Prediction]) -> list[str]:
    """Where the time goes."""
    parts = list(vars(Step()))
    head = ["ranks", "link", "attention", *parts, *(f"prefill's {part}" for part in parts[:-1])]  # no Python in it
    cells = [
        [
            *name(p),
            *(f"{1e3 * seconds:.2f}" for seconds in vars(p.decode[min(p.decode)]).values()),
            *(f"{1e3 * getattr(p.prefill, part) / p.prompt:.3f}" for part in parts[:-1]),
        ]
        for p in best
    ]
    return table([head, *cells])


def checked(checks: Sequence[Comparison]) -> list[str]:
    cells = [[c.what, f"{1e3 * c.predicted:.3f} ms", f"{1e3 * c.measured:.3f} ms", f"{c.ratio:.2f}"] for c in checks]
    return table([["", "predicted", "measured", "ratio"], *cells])


def published() -> list[str]:
    head = ["model", "engine", "1", "2", "4", "source"]
    cells = [
        [p.model, p.engine, *(f"{p.speeds[n]:g}" if n in p.speeds else "-" for n in (1, 2, 4)), p.source]
        for p in PUBLISHED_SPEEDS
    ]
    return table([head, *cells])


def as_json(
    source: str,
    machine: Machine,
    links: Sequence[Link],
    rows: Sequence[Sequence[Prediction]],
    memory: float | None,
    checks: Sequence[Comparison],
) -> str:
    """One line: the same, and the cut that was not chosen. Seconds, bytes, bytes/s, FLOP/s, tokens per second."""
    found = {
        "model": source,
        "machine": asdict(machine),
        "links": [asdict(link) for link in links],
        "assumptions": assumptions(machine, links),
        "predictions": [prediction_json(p, row[0], memory) for row in rows for p in row],
        "bench": [asdict(c) | {"ratio": c.ratio} for c in checks],
        "published": [asdict(p) for p in PUBLISHED_SPEEDS],
    }
    return json.dumps(found)


def prediction_json(p: Prediction, best: Prediction, memory: float | None) -> dict[str, Any]:
    return {
        "world": p.plan.world,
        "link": p.link.name if p.plan.world > 1 else None,
        "attention": p.plan.attention,
        "chosen": p is best,
        "bytes_held": p.bytes_held,
        "fits": None if memory is None else not too_large(p, memory),
        "decode": [{"context": n} | step_json(step, 1) for n, step in p.decode.items()],
        "prefill": {"prompt": p.prompt} | step_json(p.prefill, p.prompt),
    }


def step_json(step: Step, tokens: int) -> dict[str, float]:
    split = {f"{part}_seconds": seconds for part, seconds in vars(step).items()}
    return split | {"seconds": step.seconds, "tokens_per_second": tokens / step.seconds}


def name(p: Prediction) -> list[str]:
    alone = p.plan.world == 1
    return [str(p.plan.world), "-" if alone else p.link.name, "-" if alone else p.plan.attention]


def too_large(p: Prediction, memory: float | None) -> bool:
    """Whether the weights alone, without any cache, are more than `memory` GB can hold."""
    return memory is not None and p.bytes_held > (memory - RESERVE_GIB) * GIB


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
