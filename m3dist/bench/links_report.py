"""`m3dist bench links`' figures: what is made of the runs, and tables of what the JSON line holds. No MLX."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.filesize import decimal

from m3dist.bench.statistics import quantile
from m3dist.plan_report import table

Figures = Mapping[str, Any]


def figures(collective: str, size: int, world: int, seconds: Sequence[float]) -> dict[str, Any]:
    """What `seconds` of runs say of a collective to which each rank gives `size` bytes.

    Bandwidths (bytes/s) are of the median, as nccl-tests defines them (its doc/PERFORMANCE.md): algorithmic is the
    result's bytes over time; bus is that times what each rank must at least send of a byte of the result, and so comes
    out alike for any number of ranks.
    """
    result = size * (1 if collective == "all_sum" else world)
    algorithmic = result / median(seconds)
    sent = (2 if collective == "all_sum" else 1) * (world - 1) / world
    return {
        "op": collective,
        "bytes": size,
        "result_bytes": result,
        "runs": len(seconds),
        "seconds": {
            "minimum": min(seconds),
            "lower_quartile": quantile(seconds, 0.25),
            "median": median(seconds),
            "upper_quartile": quantile(seconds, 0.75),
        },
        "algorithmic_bandwidth": algorithmic,
        "bus_bandwidth": sent * algorithmic,
    }


def as_text(result: Figures) -> str:
    """Everything, in the order in which it was measured."""
    hosts = ", ".join(dict.fromkeys(result["hosts"]))
    head = [f"{result['world']} ranks over {result['backend']} on {hosts}, {result['dtype']}, every result checked"]
    if not result["complete"]:
        head.insert(0, "Cut off: what had been measured until then.")
    parts = [head]
    for collective in dict.fromkeys(row["op"] for row in result["links"]):
        parts.append(links_table(collective, [row for row in result["links"] if row["op"] == collective]))
    if result["chain"]:
        parts.append([chain_line(result["chain"])])
    return "\n\n".join("\n".join(part) for part in parts)


def links_table(collective: str, rows: Sequence[Figures]) -> list[str]:
    """A line for each size that a rank gives."""
    head = [collective, "median", "lower quartile", "upper quartile", "minimum", "runs", "algorithmic", "bus"]
    cells = [
        [
            binary(row["bytes"]),
            *[duration(row["seconds"][part]) for part in ("median", "lower_quartile", "upper_quartile", "minimum")],
            str(row["runs"]),
            *[rate(row[f"{part}_bandwidth"]) for part in ("algorithmic", "bus")],
        ]
        for row in rows
    ]
    return table([head, *cells])


def link_line(row: Figures) -> str:
    """One size, as soon as it is measured."""
    return f"{row['op']} of {binary(row['bytes'])}: {duration(row['seconds']['median'])}"


def chain_line(chain: Figures) -> str:
    """What a decode step waits for."""
    return (
        f"{chain['sums']} sums of {binary(chain['bytes'])} in one graph, each of the one before:"
        f" {duration(chain['seconds'])} a sum"
    )


def binary(count: int) -> str:
    """Bytes as people write them: 12 KiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def rate(bandwidth: float) -> str:
    return f"{decimal(round(bandwidth))}/s"
