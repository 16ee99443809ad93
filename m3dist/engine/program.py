"""The ranks of `m3dist serve`: how they come up, until rank 0 leads (leader.py) and the others follow (worker.py)."""

import os
import socket
from functools import partial
from pathlib import Path

import mlx.core as mx

from m3dist.cluster.environment import Launch
from m3dist.comm import Comm, all_ranks
from m3dist.engine.budget import Budget, Room, make_budget
from m3dist.engine.control import Workers, meet
from m3dist.engine.grammar import Grammars
from m3dist.engine.leader import Leader
from m3dist.engine.link import Gateway, text_files
from m3dist.engine.pages import Pages
from m3dist.engine.reception import Reception
from m3dist.engine.runner import Runner
from m3dist.engine.scheduler import Opening, Piece, Scheduler, Step
from m3dist.engine.worker import Worker
from m3dist.find import Found, directory_of, find_or_fetch
from m3dist.metal import ACTIVATIONS
from m3dist.options import ServeOptions
from m3dist.paged import PagePool
from m3dist.plan import Plan
from m3dist.progress import Progress
from m3dist.rank import START_LIMIT, STEP_LIMIT, join, load_model, prefill_chunk_of_device, run_rank
from m3dist.sampling import Sampling
from m3dist.text import Text
from m3dist.watchdog import EXIT_PEER_LOST, Watchdog, end_process

BUSY_PARTS = 4  # beside running streams a step takes in a chunk's fourth part: they wait so much less between tokens
KEPT = ACTIVATIONS // 2  # bytes of freed memory that MLX keeps: prompts of all lengths leave buffers of all sizes
PART = 0.8  # of a machine's memory, on others than Macs
WARM_UP_TOKENS = 4  # that a row of the warm-up takes in
TOLD = 0.01  # of the bytes to load: how often the gateway hears of it


def main(options: ServeOptions, launch: Launch) -> int:
    """Be one rank of the server, or all of it, until the gateway says that it is over. An error ends this process at
    once: else it would hold up the others."""
    return run_rank(partial(_run, options, launch), launch, options.dtype)


def _run(options: ServeOptions, launch: Launch, watchdog: Watchdog) -> int:
    comm = join(launch, options.model, watchdog)
    mx.set_cache_limit(KEPT)
    watchdog.progress("connecting", START_LIMIT)
    with all_ranks(comm):
        gateway = Gateway.connect(os.environ) if comm.rank == 0 else None
    with all_ranks(comm):
        peers = meet(comm, launch, os.environ, partial(_end, comm.rank, watchdog))
    found = find_or_fetch(options.model, options, comm, watchdog)
    _say_hello(gateway, options.model, directory_of(found), comm)
    runner, budget = _load(options, found, comm, gateway, watchdog)
    for step in warm_up_steps(budget, options.rows):
        watchdog.progress("warming up", STEP_LIMIT)
        runner.run(step).read()
    weights = comm.gather_objects(sum(x.nbytes for _, x in runner.model.held_arrays()))
    if isinstance(peers, Workers):
        _lead(options, directory_of(found), runner, budget, gateway, peers, weights, watchdog)
    else:
        Worker(runner, peers, watchdog).run()
    return 0


def _end(rank: int, watchdog: Watchdog, why: str) -> None:
    """Another rank is gone. The threads that call this must not hold on to the Comm: MPI ends in good order only once
    nobody does."""
    end_process(EXIT_PEER_LOST, f"rank {rank}: {why}", watchdog.abort)


def _say_hello(gateway: Gateway | None, model: str, directory: Path, comm: Comm) -> None:
    hosts = comm.gather_objects(socket.gethostname())
    if gateway:
        gateway.tell({"hello": {"world": comm.world, "hosts": hosts, "model": model, "files": text_files(directory)}})


def _load(
    options: ServeOptions, found: Found, comm: Comm, gateway: Gateway | None, watchdog: Watchdog
) -> tuple[Runner, Budget]:
    """The model and its cache; the gateway hears how far it is."""
    rooms, budgets, told = _rooms(comm), list[Budget](), 0.0

    def cache_tokens(plan: Plan) -> int:
        budgets.append(make_budget(plan, rooms, options.cache_tokens, options.context))
        return budgets[0].tokens

    def tell(progress: Progress) -> None:
        nonlocal told
        fraction = progress.done / progress.total
        if gateway and (fraction >= told + TOLD or fraction == 1):
            told = fraction
            gateway.tell({"loading": round(fraction, 4)})

    cut = {"weights": options.weights, "experts": options.experts, "attention": options.attention}
    model, _ = load_model(options.model, found, comm, watchdog, options.dtype, cache_tokens, tell, **cut)
    [budget] = budgets
    pool = PagePool(model, budget.page_size, budget.pages)
    return Runner(model, pool, options.rows, _chunk(options)), budget


def _chunk(options: ServeOptions) -> int:
    return options.prefill_chunk or prefill_chunk_of_device()


def _rooms(comm: Comm) -> list[Room]:
    """What each rank has for weights and caches: on a Mac what the GPU may keep resident, less activations; elsewhere
    PART of the memory. Ranks that share a machine's memory have equal parts of it."""
    device, shared = mx.device_info(), True
    if mx.metal.is_available():
        nbytes = device["max_recommended_working_set_size"] - ACTIVATIONS
    elif "total_memory" in device:  # CUDA: every rank has a GPU of its own
        nbytes, shared = int(device["total_memory"] * PART), False
    else:
        nbytes = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * PART)
    hosts = comm.gather_objects([socket.gethostname(), nbytes])
    names = [host for host, _ in hosts]
    return [Room(host, nbytes // (names.count(host) if shared else 1)) for host, nbytes in hosts]


def warm_up_steps(budget: Budget, rows: int) -> list[Step]:
    """Steps like those to come, so that what has to be compiled or made for the first is there: two rows, or as many
    as there can be, then one. No row is left."""
    pages = -(-WARM_UP_TOKENS // budget.page_size)
    rows = min(2, rows, (budget.pages - 1) // pages)
    if not rows:
        return []
    numbers = tuple(range(rows))
    opened = tuple(Opening(row, Sampling(temperature=row)) for row in numbers)
    tables = {row: tuple(range(1 + row * pages, 1 + (row + 1) * pages)) for row in numbers}
    prompts = tuple(Piece(row, 0, (0, 0), last=True) for row in numbers)
    counts = {row: 0 for row in numbers}
    return [
        Step((), opened, tables, prompts, (), counts),
        Step((), (), {}, (), numbers, counts),
        Step(numbers[1:], (), {}, (), (0,), counts),
        Step((0,), (), {}, (), (), {}),
    ]


def _lead(
    options: ServeOptions,
    directory: Path,
    runner: Runner,
    budget: Budget,
    gateway: Gateway,
    workers: Workers,
    weights: list[int],
    watchdog: Watchdog,
) -> None:
    """Rank 0, from when all ranks are ready. `weights`: the bytes that each holds."""
    config, chunk = runner.model.args, _chunk(options) * runner.model.chunks_at_once
    stop_ids = Text.load(directory).stop_ids
    grammars = Grammars((directory / "tokenizer.json").read_text("utf-8"), stop_ids, config.vocab_size)
    gateway.listen(Reception(grammars, config.vocab_size, budget.context, gateway.hand_on))
    facts = {"page_size": budget.page_size, "pages": budget.pages, "context": budget.context, "rows": options.rows}
    facts["page_bytes"] = budget.page_bytes
    gateway.tell({"ready": facts | {"vocab_size": config.vocab_size, "weights_bytes": weights}})
    pages = Pages(budget.pages, budget.page_size)
    scheduler = Scheduler(pages, options.rows, chunk, max(budget.page_size, chunk // BUSY_PARTS), budget.context)
    Leader(runner, scheduler, gateway, workers, watchdog).run()
