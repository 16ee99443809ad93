"""The bench's figures for people: tables of what the JSON line holds. No MLX."""

from collections.abc import Mapping
from typing import Any

from m3dist.bench.statistics import Ratio
from m3dist.plan_report import table

Figures = Mapping[str, Any]


def key(runner: str) -> str:
    """A runner's name in the JSON."""
    return {"m3dist": "ours", "mlx-lm": "mlx_lm"}[runner]


def as_text(result: Figures) -> str:
    """Everything, in the order in which it was measured."""
    built = "built" if result["random"] else "loaded"
    seconds = result["build_seconds"] if result["random"] else result["load_seconds"]
    head = [
        f"{result['model']}: {ranks(result)} on {result['device']}, {result['dtype']}, {built} in {seconds:.1f} s",
        *[f"rank {rank}: weights {mib(count)}" for rank, count in enumerate(result["weights_bytes"])],
    ]
    if not result["complete"]:
        head.insert(0, "Cut off: what had been measured until then.")
    if result["machine"]:
        head.append(machine_line(result["machine"]))
    if agreement := result["agreement"]:
        head.append(
            f"logits of {agreement['tokens']} tokens differ from mlx-lm {result['mlx_lm']}'s by"
            f" {agreement['relative_error']:.1e} of the largest"
        )
    head += [
        f"caches {result['caches']}; medians of {result['repeats']} runs, {result['tokens']} tokens each;"
        f" prompts {result['prefill_chunk']} tokens at a time"
    ]
    parts = [head]
    if result["decode"]:
        parts += [decode_table(result["decode"]), split_table([row for row in result["decode"] if "split" in row])]
    if result["prefill"]:
        parts.append(prefill_table(result["prefill"]))
    return "\n\n".join("\n".join(part) for part in parts)


def ranks(result: Figures) -> str:
    """How many there are, and over what."""
    return f"{result['world']} ranks over {result['backend']}" if result["world"] > 1 else "1 rank"


def decode_table(rows: list[Figures]) -> list[str]:
    """Milliseconds a token against mlx-lm's and the floor."""
    head = ["decode at", "m3dist", "tokens/s", "mlx-lm", "tokens/s", "ratio (quartiles)"]
    head += ["floor", "of it reading", "logits differ"]
    cells = [
        [
            str(row["context"]),
            ms(row["ours"]["seconds"]),
            rate(row["ours"]),
            ms(row["mlx_lm"]["seconds"]) if "mlx_lm" in row else "-",
            rate(row["mlx_lm"]) if "mlx_lm" in row else "-",
            ratio_text(row),
            ms(row["floor"]["seconds"]),
            ms(row["floor"]["read_seconds"]),
            f"{row['relative_error']:.1e}" if "relative_error" in row else "-",
        ]
        for row in rows
    ]
    return table([head, *cells])


def split_table(rows: list[Figures]) -> list[str]:
    """Where our step goes."""
    head = ["decode at", "step", "compute", "communication", "host"]
    head += ["operations", "sums", "gathers", "bare", "communication/bare"]
    cells = []
    for row in rows:
        s = row["split"]
        cells.append(
            [
                str(row["context"]),
                *[ms(s[f"{part}_seconds"]) for part in ("step", "compute", "communication", "host")],
                *[str(s[count]) for count in ("operations", "sums", "gathers")],
                ms(s["bare_seconds"]),
                f"{s['communication_to_bare']:.2f}" if s["communication_to_bare"] is not None else "-",
            ]
        )
    return table([head, *cells])


def prefill_table(rows: list[Figures]) -> list[str]:
    """Seconds to the first token against mlx-lm's, and the memory it takes."""
    head = ["prefill", "at depth", "m3dist", "tokens/s", "mlx-lm", "tokens/s", "ratio (quartiles)"]
    head += ["peak above", "mlx-lm's", "peak in all", "mlx-lm's"]
    cells = []
    for row in rows:
        both = [row["ours"], row.get("mlx_lm")]
        times = [cell for r in both for cell in ((ms(r["seconds"]), rate(r)) if r else ("-", "-"))]
        peaks = [mib(r[name]) if r else "-" for name in ("peak_above_bytes", "peak_bytes") for r in both]
        cells.append([str(row["prompt"]), str(row["depth"]), *times, ratio_text(row), *peaks])
    return table([head, *cells])


def decode_line(row: Figures) -> str:
    """One context, as soon as it is measured."""
    theirs = f", mlx-lm {ms(row['mlx_lm']['seconds'])}: {ratio_text(row)}" if "mlx_lm" in row else ""
    return f"decode at {row['context']}: {ms(row['ours']['seconds'])} a token{theirs}"


def prefill_line(row: Figures) -> str:
    """One prompt, as soon as it is measured."""
    theirs = f", mlx-lm {ms(row['mlx_lm']['seconds'])}: {ratio_text(row)}" if "mlx_lm" in row else ""
    return f"prefill of {row['prompt']} at {row['depth']}: {ms(row['ours']['seconds'])}{theirs}"


def machine_line(m: Figures) -> str:
    """The machine's own figures, of the slowest rank."""
    line = f"measured: memory {m['memory_bandwidth'] / 1e9:.1f} GB/s"
    if m["sum_latency"]:
        line += f", a sum {m['sum_latency'] * 1e6:.1f} us"
    if m["sum_bandwidth"]:
        line += f", sums of 8 MiB {m['sum_bandwidth'] / 1e9:.2f} GB/s"
    return (
        f"{line}, a launch {m['launch_seconds'] * 1e6:.1f} us, products {m['matmul_flops'] / 1e12:.3f} TFLOP/s, of one"
        f" token {m['matvec_bandwidth'] / 1e9:.1f} GB/s, attention {m['attention_flops'] / 1e12:.3f} TFLOP/s"
    )


def ratio_text(row: Figures) -> str:
    return str(Ratio(**row["ratio"])) if "ratio" in row else "-"


def rate(figures: Figures) -> str:
    return f"{figures['tokens_per_second']:.1f}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
