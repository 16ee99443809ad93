"""`m3dist plan`: what each machine would hold and read, on paper. No MLX, no weights; published shapes: no network."""

import argparse
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3dist.checkpoint import local, open_checkpoint
from m3dist.config import ModelConfig, read_config
from m3dist.errors import PlanError
from m3dist.layout import kv_heads, query_heads
from m3dist.plan import Plan, make_plan
from m3dist.quantization import converted, quantization_of
from m3dist.tensors import MXFP8, Inventory, modules

PUBLISHED = Path(__file__).parent / "published"
GIB = 2**30
# A Mac's memory as sold (512 GB are 512 GiB), less what macOS, activations and MLX's buffer cache need.
RESERVE_GIB = 10.0


@dataclass(frozen=True)
class RankReport:
    """One rank's line. Sizes in bytes, context in tokens; None where no memory was given."""

    rank: int
    query_heads: int
    kv_heads: int
    expert_columns: int  # of every expert, or 0
    experts: int  # whole ones, or those it holds columns of
    vocabulary_rows: int
    bytes_held: int
    bytes_read_per_token: int
    cache_bytes_per_token: int
    memory_bytes: int | None
    longest_context: int | None  # 0: not even the weights fit
    problem: str | None  # what does not fit, and why


def main(args: argparse.Namespace) -> int:
    """Print the plan; 0 where everything fits or no memory was given, 1 where something does not."""
    inventory, source = inventory_of(args.model, args.mode, args.bits, args.group_size)
    most = inventory.config.max_position_embeddings
    if args.context and args.context > most:
        raise PlanError(f"--context: the model takes at most {most} tokens (max_position_embeddings in its config)")
    cut = (args.experts, args.attention)
    machines = args.machines or ([args.memory] * (args.world or 1) if args.memory else None)
    if machines:
        plan = make_plan(inventory, usable(machines, "--machines" if args.machines else "--memory"), *cut)
    else:
        plan = make_plan(inventory, args.world or 1, *cut)
    ranks = [rank_report(plan, r, machines[r] if machines else None, args.context) for r in range(plan.world)]
    problems = [f"rank {r.rank}: {r.problem}" for r in ranks if r.problem]
    context = min((r.longest_context for r in ranks if r.longest_context is not None), default=None)
    if args.json:
        print(json.dumps(as_json(plan, source, ranks, context, problems)))
    else:
        print(as_text(plan, source, ranks, context, problems, args.context))
    return 1 if problems else 0


def inventory_of(model: str, mode: str | None, bits: int | None, group_size: int | None) -> tuple[Inventory, str]:
    """The tensors of a checkpoint directory, or of a published one by its name; and a word on where they are from.

    `mode`, `bits` and `group_size` ask for an MLX conversion instead of the checkpoint's own format.
    """
    wanted = quantization_of(mode, bits, group_size)
    directory = local(model)
    if directory and wanted is None and any(directory.glob("*.safetensors")):
        return open_checkpoint(directory).translate().inventory, f"{directory}, from its files"
    if directory:
        return converted(ModelConfig.from_dict(read_config(directory)), wanted), f"{directory}, from its config.json"
    name = model.partition("@")[0].rpartition("/")[2]
    if match := re.fullmatch(r"(MiniMax-M3)-(?:(\d)bit|(mxfp4|mxfp8|nvfp4))", name):
        name, wanted = match[1], wanted or quantization_of(match[3], int(match[2]) if match[2] else None, None)
    path = PUBLISHED / f"{name}.json"
    if not os.path.isfile(path):
        known = ", ".join(f"MiniMaxAI/{p.stem}" for p in sorted(PUBLISHED.glob("*.json")))
        raise PlanError(
            f"{model} is neither a directory, nor tiny, nor a published checkpoint known here"
            f" ({known}, each also with --bits or --mode)"
        )
    config = ModelConfig.from_dict(json.loads(path.read_text()))
    if wanted is None and config.quantization:
        return published_mxfp8(config), f"{model}, published MXFP8"
    return converted(config, wanted), f"{model}, {wanted or 'BF16'}"


def published_mxfp8(config: ModelConfig) -> Inventory:
    """As MiniMaxAI publishes it: embedding, head and router are not quantised."""
    kept = ("embed_tokens", "lm_head")
    matrices = [m for m in modules(config).values() if m.is_matrix and not m.exact and not m.name.endswith(kept)]
    return Inventory(config, "BF16", {m.name: MXFP8 for m in matrices})


def usable(machines: list[float], flag: str) -> list[float]:
    """GiB that weights and caches may take on each machine. Raises PlanError for one with nothing left."""
    for rank, memory in enumerate(machines):
        if memory <= RESERVE_GIB:
            raise PlanError(f"{flag}: rank {rank} has {memory:g} GB, of which {RESERVE_GIB:g} are reserved")
    return [memory - RESERVE_GIB for memory in machines]


def room(memory: float) -> int:
    """Bytes that weights and caches may take of `memory` GiB; negative where it is less than what is reserved."""
    return int((memory - RESERVE_GIB) * GIB)


def rank_report(plan: Plan, rank: int, memory: float | None, context: int | None) -> RankReport:
    """One rank's numbers, and whether they fit into `memory` GB with `context` tokens of cache."""
    share, c = plan.shares[rank], plan.inventory.config
    held, cache = plan.bytes_held(rank), plan.cache_bytes_per_token(rank)

    def width(unit: str) -> int:
        start, stop = share.spans.get(unit, (0, 0))
        return stop - start

    start, stop = query_heads(share, c)
    first_kv, last_kv = kv_heads(share, c)
    columns = width("expert") * (c.intermediate_size // share.counts["expert"]) if "expert" in share.counts else 0
    longest, problem = None, None
    if memory is not None:
        left = room(memory) - held
        longest = max(0, min(left // cache, c.max_position_embeddings))
        if left < 0:
            problem = (
                f"its weights are {_gib(held)}, {_gib(-left)} more than {memory:g} GB less {RESERVE_GIB:g} reserved"
            )
        elif context and longest < context:
            problem = f"{context} tokens need {_gib(context * cache)} of cache, {_gib(context * cache - left)} too much"
    return RankReport(
        rank=rank,
        query_heads=stop - start,
        kv_heads=last_kv - first_kv,
        expert_columns=columns,
        experts=width("whole_expert") or c.num_local_experts,
        vocabulary_rows=width("vocabulary"),
        bytes_held=held,
        bytes_read_per_token=plan.bytes_read(rank),
        cache_bytes_per_token=cache,
        memory_bytes=None if memory is None else int(memory * GIB),
        longest_context=longest,
        problem=problem,
    )


def as_json(
    plan: Plan, source: str, ranks: list[RankReport], context: int | None, problems: list[str]
) -> dict[str, Any]:
    return {
        "model": source,
        "world": plan.world,
        "cut": plan.experts,
        "attention": plan.attention,
        "plan": plan.digest,
        "bytes": sum(spec.nbytes for spec in plan.specs.values()),
        "longest_context": context,
        "fits": None if context is None else not problems,
        "problems": problems,
        "ranks": [vars(r) for r in ranks],
    }


def as_text(
    plan: Plan, source: str, ranks: list[RankReport], context: int | None, problems: list[str], wanted: int | None
) -> str:
    whole = sum(spec.nbytes for spec in plan.specs.values())
    c = plan.inventory.config
    experts = "experts" if plan.experts == "whole" else "expert columns"
    head = [
        "rank",
        "heads",
        "KV heads",
        experts,
        "vocabulary rows",
        "held",
        "read/token",
        "cache/token",
        "longest context",
    ]
    rows = [
        [
            str(r.rank),
            str(r.query_heads),
            str(r.kv_heads),
            str(r.experts if plan.experts == "whole" else r.expert_columns),
            str(r.vocabulary_rows),
            _gib(r.bytes_held),
            f"{r.bytes_read_per_token / 1e9:.2f} GB",
            f"{r.cache_bytes_per_token / 1024:.2f} KiB",
            "-" if r.longest_context is None else str(r.longest_context),
        ]
        for r in ranks
    ]
    lines = (
        [f"{source}: {whole / 1e9:.1f} GB ({_gib(whole)}) over {plan.world} ranks", ""] + table([head, *rows]) + [""]
    )
    if context is None:
        tokens = wanted or c.max_position_embeddings
        most = max(r.bytes_held + tokens * r.cache_bytes_per_token for r in ranks)
        lines.append(
            f"{'A' if wanted else 'The full'} context of {tokens} tokens needs {_gib(most)} on the fullest rank. "
            "Give --memory or --machines to see what fits."
        )
    elif problems:
        lines += [f"Does not fit: {problem}" for problem in problems]
    else:
        lines.append(f"Fits, with up to {context} tokens of context{f' ({wanted} asked for)' if wanted else ''}.")
    lines.append(
        f"Read/token is weights at batch 1. Memory as sold, less {RESERVE_GIB:g} GiB a machine for macOS and "
        "activations; a Mac's GPU may use that much only after sudo sysctl iogpu.wired_limit_mb=..."
    )
    return "\n".join(lines)


def table(rows: list[list[str]]) -> list[str]:
    """Rows of cells -> aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
