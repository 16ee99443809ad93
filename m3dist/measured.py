"""What `m3dist bench --json` measured, as a machine and a link to predict with; and predictions beside it. No MLX."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from m3dist.bench.subject import FORMATS
from m3dist.config import ModelConfig
from m3dist.errors import PlanError
from m3dist.machines import Link, Machine
from m3dist.options import MAX_RANKS
from m3dist.plan import Plan, make_plan
from m3dist.plan_report import inventory_of
from m3dist.predict import Predictor
from m3dist.quantization import converted
from m3dist.tensors import Inventory


@dataclass(frozen=True)
class Comparison:
    """Seconds of one figure of the bench, predicted from the same run's machine figures and measured."""

    what: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Below 1: the prediction is too fast."""
        return self.predicted / self.measured


def read_bench(path: str) -> dict[str, Any]:
    """The JSON object that `m3dist bench --json` ends with, in a file of it alone or of all its output.

    Raises PlanError, naming the file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").strip().splitlines()
        result = json.loads(lines[-1])
        missing = {"memory_bandwidth", "launch_seconds", "matmul_flops"} - result["machine"].keys()
        missing |= {"prefill_chunk"} - result.keys()
    except OSError as error:
        raise PlanError(f"--from-bench: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise PlanError(f"--from-bench: {path} does not end with the line that m3dist bench --json prints") from None
    if missing:
        raise PlanError(f"--from-bench: {path} has no {sorted(missing)[0]}: it is of another version of m3dist bench")
    return result


def machine_of(result: dict[str, Any], path: str) -> Machine:
    """The slowest rank's machine. What a bench did not measure of its own is taken from what is most like it."""
    figures = result["machine"]
    wanted = {
        "bandwidth": ("matvec_bandwidth", "memory_bandwidth"),
        "flops": ("matmul_flops",),
        "expert_flops": ("expert_flops", "matmul_flops"),
        "attention_bandwidth": ("attention_bandwidth", "memory_bandwidth"),
        "attention_flops": ("attention_flops", "matmul_flops"),
        "index_flops": ("index_flops", "attention_flops", "matmul_flops"),
        "selected_bandwidth": ("selected_bandwidth", "attention_bandwidth", "memory_bandwidth"),
        "launch": ("launch_seconds",),
    }
    used = {field: next(name for name in names if figures.get(name)) for field, names in wanted.items()}
    sources = {field: f"{name} measured, {path}" for field, name in used.items()}
    values = {field: figures[name] for field, name in used.items()}
    if figures.get("unpack_bandwidth"):
        values["unpack_bandwidth"] = figures["unpack_bandwidth"]
        sources["unpack_bandwidth"] = f"unpack_bandwidth measured, {path}"
    if hosts := host_of(result):
        sources |= dict.fromkeys(hosts, f"host_seconds measured, {path}")
    return Machine(result["device"], **values, **hosts, sources=sources)


def host_of(result: dict[str, Any]) -> dict[str, float]:
    """Machine's host and, where decode was measured on both sides of the block budget, host_selection: seconds a layer.

    Empty where Python was not measured.
    """
    c = ModelConfig.from_dict(result["config"])
    within: list[float] = []
    beyond: list[float] = []
    for row in result["decode"]:
        if "split" in row:
            selects = row["context"] > c.sparse_topk_blocks * c.sparse_block_size and any(c.sparse_attention_freq)
            (beyond if selects else within).append(row["split"]["host_seconds"])
    if not within or not beyond:
        return {"host": median(within + beyond) / c.num_hidden_layers} if within + beyond else {}
    more = max(0.0, median(beyond) - median(within)) / sum(c.sparse_attention_freq)
    return {"host": median(within) / c.num_hidden_layers, "host_selection": more}


def link_of(result: dict[str, Any], path: str) -> Link | None:
    """What connected the ranks; None for one rank.

    In other worlds a ring's sum takes as much longer as it has more hops; another backend's is taken to last as long.
    """
    world, latency = result["world"], result["machine"]["sum_latency"]
    if world == 1:
        return None
    sent = 2 * (world - 1) / world * result["machine"]["sum_bandwidth"]
    source = f"measured over {world} ranks, {path}"
    sources = dict.fromkeys(("hop", "exchange", "bandwidth"), source)
    if result["backend"] == "ring":
        return Link("ring", latency / (2 * (world - 1)), sent, sources=sources)
    return Link(result["backend"], latency, sent, exchange=latency, mesh=MAX_RANKS, sources=sources)


def plan_of(result: dict[str, Any]) -> Plan:
    """The plan of the bench's own model. Raises PlanError for a checkpoint that is not on this machine."""
    cut = result["cut"]
    return make_plan(_inventory(result), cut["weights"], cut["experts"], cut["attention"])


def compare(result: dict[str, Any], path: str) -> list[Comparison]:
    """Every decode and prefill that the bench measured, beside its prediction."""
    predictor = Predictor(plan_of(result), machine_of(result, path))
    link = link_of(result, path) or Link("none", 0.0, 1.0)
    found = []
    for row in result["decode"]:
        step = predictor.decode(row["context"], link)
        found.append(Comparison(f"decode at {row['context']}", step.seconds, row["ours"]["seconds"]))
    for row in result["prefill"]:
        step = predictor.prefill(row["prompt"], result["prefill_chunk"], link, row["depth"])
        found.append(Comparison(f"prefill of {row['prompt']} at {row['depth']}", step.seconds, row["ours"]["seconds"]))
    return found


def _inventory(result: dict[str, Any]) -> Inventory:
    config, wanted = ModelConfig.from_dict(result["config"]), result["random"]
    if wanted is None:
        inventory, _ = inventory_of(result["model"], None, None, None)
    else:
        quantization = FORMATS[wanted]
        inventory = converted(config, None if isinstance(quantization, str) else quantization)
    return replace(inventory, dtype=result["dtype"])
