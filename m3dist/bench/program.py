"""The bench as every rank runs it: build or load, compare with mlx-lm, measure; rank 0 prints."""

import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

import m3dist
from m3dist.bench import report
from m3dist.bench.cutoff import shown_if_cut_off
from m3dist.bench.machine import measure_machine, sum_latency
from m3dist.bench.runners import Ours, count_operations, decode, difference, muted, prefill, random_cache, timed_steps
from m3dist.bench.statistics import ratio
from m3dist.bench.subject import cache_read_bytes, lengths, longest, published, random_inventory
from m3dist.bench.weights import random_weights
from m3dist.cluster.environment import Launch
from m3dist.comm import Comm, all_ranks, check_same
from m3dist.config import ModelConfig, read_config
from m3dist.errors import M3Error
from m3dist.find import directory_of, find_or_fetch
from m3dist.model import Model
from m3dist.model.text import DTYPES
from m3dist.options import BenchOptions
from m3dist.plan import Plan, plan_world
from m3dist.rank import (
    STEP_LIMIT,
    dtype_of_device,
    join,
    keep_resident,
    load_model,
    prefill_chunk_of_device,
    run_rank,
)
from m3dist.watchdog import Watchdog

COMPARED = 16  # tokens of the prompt on which ours and mlx-lm's must agree
TOLERANCE = 1e-3  # of the largest logit, in float32; other dtypes round too much for a limit


def main(options: BenchOptions, launch: Launch) -> int:
    """Be one rank of the bench, or all of it."""
    return run_rank(partial(_run, options, launch), launch, options.dtype)


def _run(options: BenchOptions, launch: Launch, watchdog: Watchdog) -> int:
    comm = join(launch, f"{options.model} {options.random}", watchdog)

    # mlx-lm prefills 2048 tokens at a time, with scores of all of them against the whole cache.
    limit = STEP_LIMIT * (5 if options.vs else 1)

    def progress(phase: str) -> None:
        watchdog.progress(phase, limit)

    began = time.perf_counter()
    model, plan, source = subject(options, comm, watchdog, progress)
    seconds = time.perf_counter() - began
    options = lengths(options, model.args)
    bench = Bench(options, comm, plan, model, progress)
    result = facts(options, launch, comm, plan, model, source)
    result |= {"complete": False, "machine": None, "agreement": None, "decode": [], "prefill": []}
    result["build_seconds" if options.random else "load_seconds"] = seconds
    result |= {
        "prefill_chunk": bench.ours.prefill_chunk,
        "weights_bytes": comm.gather_objects(bench.ours.weights_bytes),
    }
    with shown_if_cut_off(partial(show, options, result), watchdog) if comm.rank == 0 else nullcontext():
        bench.measure(result)
        progress("the end")
        comm.barrier()
    watchdog.stop()
    if comm.rank == 0:
        show(options, result | {"complete": True})
    return 0


def facts(options: BenchOptions, launch: Launch, comm: Comm, plan: Plan, model: Model, source: str) -> dict[str, Any]:
    """What is known before anything is measured."""
    return {
        "m3dist": m3dist.__version__,
        "mlx": mx.__version__,
        "mlx_lm": version("mlx-lm") if options.vs else None,
        "device": device_name(),
        "backend": launch.backend,
        "world": comm.world,
        "model": source,
        "dtype": plan.inventory.dtype,
        "random": options.random,
        "cut": {"experts": plan.experts, "attention": options.attention, "weights": list(plan.weights)},
        "config": published(model.args),
        "tokens": options.tokens,
        "repeats": options.repeats,
        "chunk": options.chunk,
        "caches": "filled with random keys and values" + (", the same for both" if options.vs else ""),
    }


def subject(
    options: BenchOptions, comm: Comm, watchdog: Watchdog, progress: Callable[[str], None]
) -> tuple[Model, Plan, str]:
    """The model that is measured, its plan, and a word on where it is from."""
    dtype = options.dtype or dtype_of_device()
    cut = {"weights": options.weights, "experts": options.experts, "attention": options.attention}
    if not options.random:
        name = options.model or "tiny"
        found = find_or_fetch(name, options, comm, watchdog)
        directory = directory_of(found)
        context = longest(lengths(options, ModelConfig.from_dict(read_config(directory))))
        return *load_model(name, found, comm, watchdog, dtype, context, **cut), str(directory)
    with all_ranks(comm):
        inventory, source = random_inventory(options, dtype)
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        if on_cpu and not inventory.quantization and inventory.dtype != "F32":
            raise M3Error(f"--random {options.random}: MLX's CPU backend multiplies such experts in float32 only")
        plan = plan_world(inventory, comm.world, **cut)
    check_same(comm, {"plan": plan.digest})
    with all_ranks(comm):
        keep_resident(plan, comm.rank, longest(lengths(options, inventory.config)))
        model = Model(inventory.config)
        model.hold(plan, comm, random_weights(plan, comm.rank, progress))
        mx.clear_cache()  # what making random numbers took
    return model, plan, source


class Bench:
    """The measurements, in the order in which they are printed. Every rank makes each; rank 0 says so as it goes."""

    def __init__(self, options: BenchOptions, comm: Comm, plan: Plan, model: Model, progress: Callable[[str], None]):
        self.options, self.comm, self.plan, self.model, self.progress = options, comm, plan, model, progress
        self.runners: list[Any] = [Ours(model, plan, options.prefill_chunk or prefill_chunk_of_device(), progress)]
        self.began = time.monotonic()

    @property
    def ours(self) -> Ours:
        return self.runners[0]

    def measure(self, found: dict[str, Any]) -> None:
        """Everything that was asked for goes into `found`, as it stands in the JSON: each figure once it is whole."""
        found["machine"] = self.machine()
        if self.options.vs:
            from m3dist.bench.peer import build_peer

            with all_ranks(self.comm):
                self.runners.append(build_peer(self.model, self.plan, self.comm, self.progress))
            found["agreement"] = self.agreement()
        for context in self.options.decode:
            found["decode"].append(self.decode(context, found["machine"]))
        prompts = [(n, 0) for n in self.options.prefill] + [(self.options.chunk, n) for n in self.options.chunk_at]
        for prompt, depth in prompts:
            found["prefill"].append(self.prefill(prompt, depth))

    def machine(self) -> dict[str, Any]:
        """The slowest rank's figures."""
        ranks = self.comm.gather_objects(measure_machine(self.plan, self.comm, self.progress))
        slowest = {"sum_latency": max, "launch_seconds": max}
        worst = {name: slowest.get(name, min)(r[name] for r in ranks) if ranks[0][name] else None for name in ranks[0]}
        self.say(report.machine_line(worst))
        return worst

    def agreement(self) -> dict[str, Any]:
        """The largest difference of the two models' logits, in units of the largest: they are the same model."""
        self.progress("comparison with mlx-lm")
        error = difference(self.runners, [r.make_cache() for r in self.runners], self.prompt(COMPARED))
        self.say(f"logits of {COMPARED} tokens differ from mlx-lm's by {error:.1e} of the largest")
        if not error < TOLERANCE and self.plan.inventory.dtype == "F32":
            raise M3Error(f"--vs mlx-lm: logits differ by {error:.1e}, more than {TOLERANCE:g}: not the same model")
        return {"tokens": COMPARED, "relative_error": error, "dtype": self.plan.inventory.dtype}

    def decode(self, context: int, machine: dict[str, Any]) -> dict[str, Any]:
        """Seconds a token at a context, and the floor. At the first context and at the longest also where ours go; at
        the longest, first of all, whether mlx-lm computes the same there."""
        caches = [self.filled(runner, context) for runner in self.runners]
        found: dict[str, Any] = {"context": context}
        longest = context == max(self.options.decode)
        if longest and len(self.runners) == 2:
            found["relative_error"] = difference(self.runners, caches, [1])
        runs = self.alternate(f"decode at {context}", lambda r, cache: decode(r, cache, self.options.tokens), caches)
        found |= self.compared(runs, 1)
        if longest or context == self.options.decode[0]:
            found["split"] = self.split(caches[0])
            self.collectives = found["split"]["collectives"]  # the same at every context
        rank_bytes = [self.plan.bytes_read(r) + cache_read_bytes(self.plan, r, context) for r in range(self.comm.world)]
        reading = max(rank_bytes) / machine["memory_bandwidth"]
        summing = self.collectives * (machine["sum_latency"] or 0.0)
        found["floor"] = {"bytes_read": max(rank_bytes), "read_seconds": reading, "seconds": reading + summing}
        self.say(report.decode_line(found))
        return found

    def split(self, cache: Any) -> dict[str, Any]:
        """Our step of decode by what it is spent on: seconds a token.

        Host is what Python takes to build and submit a step; communication is what a step takes less without it, in
        runs that alternate; compute is the rest, which is what the host does not hide of it: one step is always ahead.
        """
        counts = count_operations(self.ours, cache)
        number = counts["sums"] + counts["gathers"]
        heard, deaf = [], []
        for _ in range(self.options.repeats):
            self.progress("split of the step")
            self.comm.barrier()
            heard.append(timed_steps(self.ours, cache, self.options.tokens))
            if number:
                with muted(self.model):
                    deaf.append(timed_steps(self.ours, cache, self.options.tokens))
        self.comm.barrier()
        step, host = (median(part) for part in zip(*heard))
        communication = median(a - b for (a, _), (b, _) in zip(heard, deaf)) if deaf else 0.0
        # Measured here again: communication is to be compared with what it costs now.
        latency = sum_latency(self.model.args.hidden_size, DTYPES[self.plan.inventory.dtype], self.comm) or 0.0
        return {
            "step_seconds": step,
            "compute_seconds": step - host - communication,
            "communication_seconds": communication,
            "host_seconds": host,
            **counts,
            "collectives": number,
            "sum_latency": latency,
            "bare_seconds": number * latency,
            "communication_to_bare": communication / (number * latency) if number else None,
        }

    def prefill(self, prompt: int, depth: int) -> dict[str, Any]:
        """Seconds until the first token of a prompt, after `depth` tokens of cache."""
        caches = [self.filled(runner, depth) if depth else None for runner in self.runners]
        tokens, above = self.prompt(prompt), {r.name: 0 for r in self.runners}

        def once(runner: Any, cache: Any) -> float:
            made = prefill(runner, cache or runner.make_cache(), tokens)
            above[runner.name] = made.peak_above_bytes  # the last run's: the first ones also grow filled caches
            return made.seconds

        runs = self.alternate(f"prefill of {prompt} at {depth}", once, caches)
        found = {"prompt": prompt, "depth": depth} | self.compared(runs, prompt)
        for runner, cache in zip(self.runners, caches):
            # Both models are in memory: a model's own peak is what it holds and what was above that.
            held = runner.weights_bytes + sum(layer.nbytes for layer in cache or [])
            everyone = self.comm.gather_objects([above[runner.name], held + above[runner.name]])
            worst = (max(ranks) for ranks in zip(*everyone))
            found[report.key(runner.name)] |= dict(zip(("peak_above_bytes", "peak_bytes"), worst))
        self.say(report.prefill_line(found))
        return found

    def alternate(self, what: str, run: Callable[[Any, Any], float], caches: list[Any]) -> list[list[float]]:
        """Seconds of `repeats` runs of each runner, in turn, after one of each that does not count."""
        seconds: list[list[float]] = [[] for _ in self.runners]
        for repeat in range(self.options.repeats + 1):
            for runner, cache, own in zip(self.runners, caches, seconds):
                self.progress(f"{what} by {runner.name}, run {repeat}")
                self.comm.barrier()
                took = run(runner, cache)
                if repeat:
                    own.append(took)
        return seconds

    def compared(self, runs: list[list[float]], tokens: int) -> dict[str, Any]:
        """Medians and runs of `tokens` tokens, and the ratio where there are two runners."""
        found: dict[str, Any] = {
            report.key(runner.name): {"seconds": median(own), "tokens_per_second": tokens / median(own), "runs": own}
            for runner, own in zip(self.runners, runs)
        }
        if len(runs) == 2:
            found["ratio"] = asdict(ratio(*runs))
        return found

    def filled(self, runner: Any, context: int) -> Any:
        self.progress(f"filling of {runner.name}'s cache with {context} tokens")
        cache = runner.make_cache()
        runner.fill(cache, random_cache(self.plan, runner.kv_heads, context))
        return cache

    def prompt(self, tokens: int) -> list[int]:
        """Random token ids, the same on every rank and in every run."""
        return random.Random(tokens).choices(range(self.plan.inventory.config.vocab_size), k=tokens)

    def say(self, line: str) -> None:
        if self.comm.rank == 0:
            print(f"{time.monotonic() - self.began:.1f} s: {line}", file=sys.stderr, flush=True)


def device_name() -> str:
    facts = mx.device_info()
    return str(facts.get("device_name") or facts.get("architecture"))


def show(options: BenchOptions, result: dict[str, Any]) -> None:
    """Rank 0's output: the tables, the plot of a whole bench, and for programs one JSON line, the last."""
    print(report.as_text(result), flush=True)
    if options.plot and result["complete"]:
        from m3dist.bench.plot import plot

        plot(result, Path(options.plot))
    if options.json:
        print(json.dumps(result), flush=True)
