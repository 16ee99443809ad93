"""Tokens per second of decode against the context, as a picture. Needs matplotlib. No MLX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3dist.bench.report import ranks


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of what the JSON holds; the suffix of `path` says in which format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for runner, label in (("ours", "m3dist"), ("mlx_lm", f"mlx-lm {result['mlx_lm']}")):
        rows = sorted((row["context"], 1 / row[runner]["seconds"]) for row in result["decode"] if runner in row)
        if rows:
            axes.plot(*zip(*rows), marker="o", label=label)
    contexts = [row["context"] for row in result["decode"]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(n) for n in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"{result['model']}; {ranks(result)}, {result['device']}", fontsize=8, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
