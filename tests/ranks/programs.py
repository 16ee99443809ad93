"""What rank processes do in tests: each function runs on every rank and returns something to pickle."""

import io
import json
import os
import pickle
import re
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from m3dist.adjust import RowState, adjust_rows
from m3dist.comm import Comm, connect
from m3dist.engine.alone import Request, generate_tokens
from m3dist.errors import M3Error
from m3dist.fetch import target
from m3dist.fetch.program import fetch
from m3dist.loader import load
from m3dist.model import Model, ModelArgs, cpu
from m3dist.options import FetchOptions
from m3dist.sample import sample_batch
from m3dist.sampling import Sampling, uniform
from m3dist.watchdog import Watchdog


def logits(comm: Comm, cases: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
    """For each case (directory, tokens, sizes, options): logits fed in pieces, and the last hidden state's bits."""
    found = []
    for case in cases:
        model = load(Path(case["directory"]), comm, dtype="float32", **case.get("options", {}))
        tokens, cache, pieces, start = mx.array(case["tokens"])[None], model.make_cache(), [], 0
        for size in case["sizes"]:
            hidden = model.hidden(tokens[:, start : start + size], cache=cache)
            pieces.append(model.whole_vocabulary(model.local_logits(hidden)))
            mx.eval(pieces[-1], hidden)
            start += size
        found.append({"logits": np.array(mx.concatenate(pieces, axis=1)[0]), "hidden": np.array(hidden)})
    return found


def differences_from_shard(comm: Comm, cases: list[dict[str, Any]]) -> list[list[str]]:
    """For each case: the tensors in which load(plan) and shard(whole) differ in a bit, a shape or a dtype; and whether
    the sharded model computes the same (on the CPU MLX computes experts in bfloat16 only where they are quantised)."""
    found = []
    for case in cases:
        directory, options = Path(case["directory"]), case.get("options", {})
        model = load(directory, comm, **options)
        loaded = dict(model.held_arrays())
        whole = Model(ModelArgs.from_dict(json.loads((directory / "config.json").read_text())))
        stored = {}
        for file in sorted(directory.glob("*.safetensors")):
            stored |= mx.load(str(file))
        whole.load_weights(whole.sanitize(stored).items())
        plan = whole.shard(comm, **options)
        sharded = dict(whole.held_arrays())
        odd = sorted(loaded.keys() ^ sharded.keys())
        for name in loaded.keys() & sharded.keys():
            a, b = loaded[name], sharded[name]
            if a.shape != b.shape or a.dtype != b.dtype or not mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)):
                odd.append(f"{name}: {a.dtype}{list(a.shape)} {b.dtype}{list(b.shape)}")
        if plan.inventory.quantization and comm.world <= 2:
            ours, other = (m(mx.array([case["tokens"][:40]])) for m in (model, whole))
            odd += [] if mx.array_equal(ours, other) else ["logits"]
        found.append(odd)
    return found


def sums_of_a_step(comm: Comm, directory: str, options: dict) -> list[int]:
    """How many layers a model has, and how many sums one step of it makes."""
    model, made = load(Path(directory), comm, dtype="float32", **options), []
    all_sum = comm.all_sum
    comm.all_sum = lambda x: made.append(x) or all_sum(x)
    mx.eval(model.hidden(mx.array([[3]])))
    return [len(model.layers), len(made)]


def prefills(comm: Comm, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case (directory, tokens, chunk, options) the engine's prefill with sums that travel apart, and one in
    chunks without: logits and hidden state of the last token and the caches after each, and the submissions of each, as
    (sums, sums with work behind them). All by MLX, as on a Mac: numpy's products would wait for sums themselves."""
    cpu.usable = lambda *arrays: False
    found = []
    for case in cases:
        model = load(Path(case["directory"]), comm, dtype="float32", **case.get("options", {}))
        (*prompt, last), result = case["tokens"], {}
        for apart in (True, False):
            model.language_model.model.apart, cache = apart, model.make_cache()
            with submissions() as submitted:
                size = case["chunk"] * model.chunks_at_once
                for first in range(0, len(prompt), size):
                    model.prefill(mx.array([prompt[first : first + size]]), cache, case["chunk"])
            caches = [np.array(x[:, :, : len(prompt)]) for layer in cache for x in layer.state]
            hidden = model.hidden(mx.array([[last]]), cache)
            logits = model.whole_vocabulary(model.local_logits(hidden))
            arrays = {"logits": np.array(logits), "hidden": np.array(hidden), "caches": caches}
            result[apart] = arrays | {"submitted": submitted}
        found.append(result)
    return found


@contextmanager
def submissions() -> Iterator[list[tuple[int, int]]]:
    """Of each graph given to async_eval: its sums over the ranks, and those of them that others in it wait for."""
    submit, found = mx.async_eval, []

    def noting(*arrays: Any) -> None:
        graph = io.StringIO()
        mx.export_to_dot(graph, *arrays)
        sums = re.findall(r'{ (\d+) \[label ="Sum AllReduce"', graph.getvalue())
        results = [re.search(rf'\n{number} -> ("\w+")', graph.getvalue())[1] for number in sums]
        found.append((len(sums), sum(f"{{ rank=sink; {name}; }}" not in graph.getvalue() for name in results)))
        submit(*arrays)

    mx.async_eval = noting
    try:
        yield found
    finally:
        mx.async_eval = submit


def tokens(comm: Comm, directory: str, prompt: list[int], max_tokens: int, sampling: dict, options: dict) -> list[int]:
    """Tokens of one generation, as every rank saw them."""
    model = load(Path(directory), comm, **options)
    request = Request(prompt, max_tokens, 7, 32, [], Sampling(**sampling))
    return list(generate_tokens(model, request))


def stopped(comm: Comm, directory: str, prompt: list[int], after: int) -> tuple[list[int], int]:
    """Tokens of a generation that rank 0 ends `after` so many, and how many ranks still hear each other then."""
    model, seen = load(Path(directory), comm), []
    request = Request(prompt, 40, 7, 32, [], Sampling(temperature=0))
    for token in generate_tokens(model, request, lambda token: comm.rank or len(seen) == after):
        seen.append(token)
    return seen, len(comm.gather_objects(None))


def disagreements(comm: Comm, directory: str) -> list[str]:
    """What every rank says where plans differ, where weights are not as many as ranks, and where states differ."""
    model = load(Path(directory), comm)
    if comm.rank == comm.world - 1:
        norm = model.language_model.model.norm
        norm.weight = norm.weight * 1.001
    request = Request([1, 2, 3], 5, 7, 32, [])
    said = []
    for attempt in (
        lambda: load(Path(directory), comm, experts="whole" if comm.rank else "columns"),
        lambda: load(Path(directory), comm, weights=[1.0] * (comm.world + 1)),
        lambda: list(generate_tokens(model, request)),
    ):
        try:
            attempt()
            said.append("nothing")
        except M3Error as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def answers(comm: Comm, directory: str, prompts: list[list[int]], stop: int, max_tokens: int) -> list[list[int]]:
    """Greedy answers without the stop token, many prompts of unequal length at a time."""
    model, found = load(Path(directory), comm, dtype="float32"), {}
    for rows in batches([len(prompt) for prompt in prompts], tokens=6000):
        lengths = [len(prompts[i]) for i in rows]
        padded = mx.array([prompts[i] + [0] * (max(lengths) - len(prompts[i])) for i in rows])
        cache, replies = model.make_cache(), [[] for _ in rows]
        hidden = model.hidden(padded, cache=cache, lengths=lengths)
        last = hidden[mx.arange(len(rows)), mx.array(lengths) - 1]
        for _ in range(max_tokens):
            chosen = model.whole_vocabulary(model.local_logits(last)).argmax(-1)
            for reply, token in zip(replies, chosen.tolist(), strict=True):
                reply.append(token)
            if all(stop in reply for reply in replies):
                break
            last = model.hidden(chosen[:, None], cache=cache)[:, 0]
        for i, reply in zip(rows, replies, strict=True):
            found[i] = reply[: reply.index(stop)] if stop in reply else reply
    return [found[i] for i in range(len(prompts))]


def sampled_steps(comm: Comm, logits: list, samplings: list[dict], prompts: list[list[int]], masks: list) -> list[dict]:
    """Steps of sampling without a model: logits [steps, rows, vocabulary], of which rank r holds r + 1 parts of the
    vocabulary; `masks`: each row's allowed ids, or None. What every step gives, and one more in which the last rank's
    hidden state of row 1 is another."""
    logits, found = np.array(logits, np.float32), []
    rows, vocabulary = logits.shape[1:]
    parts = np.cumsum([0, *range(1, comm.world + 1)]) * vocabulary // (comm.world * (comm.world + 1) // 2)
    first, end = parts[comm.rank : comm.rank + 2].tolist()
    wanted = [Sampling.from_json(values) for values in samplings]
    states = [RowState(s, prompt, [], first, end - first) for s, prompt in zip(wanted, prompts)]
    bits = [None if ids is None else np.isin(np.arange(-(-vocabulary // 32) * 32), ids) for ids in masks]
    packed = [None if row is None else np.packbits(row, bitorder="little").tobytes() for row in bits]
    hidden = mx.zeros((rows, 8))
    for step in range(len(logits) + 1):
        if step == len(logits) and comm.rank == comm.world - 1:
            hidden[1, 3] = 1e-30
        local = adjust_rows(mx.array(logits[step % len(logits), :, first:end]), states, packed)
        uniforms = [uniform(s.seed, step) for s in wanted]
        widest = int(np.diff(parts).max())
        sampled = sample_batch(local, first, widest, hidden, wanted, uniforms, vocabulary, comm)
        for state, token in zip(states, sampled.tokens):
            state.took(token)
        found.append({name: np.array(getattr(sampled, name)) for name in ("tokens", "agree", "logprobs", "top_ids")})
    return found


def batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices in batches of at most so many padded tokens, alike lengths together."""
    found: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found[-1] and (len(found[-1]) + 1) * lengths[i] > tokens:
            found.append([])
        found[-1].append(i)
    return found


def objects(comm: Comm) -> list[Any]:
    """What the small exchanges give."""
    mine = {"rank": comm.rank, "text": "é" * comm.rank}
    return [comm.gather_objects(mine), comm.object_from_rank_0(mine)]


def fetched(comm: Comm, folder: str, largest: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each job, FetchOptions' fields: this rank's entry, the files in it, and what the hub sent and rank 0 said.
    Every rank has a store of its own in `folder`, whose files have `largest` bytes at most."""
    os.environ["M3DIST_STORE"] = f"{folder}/store{comm.rank}"
    target.LARGEST_FILE = largest
    watchdog, found = Watchdog(f"rank {comm.rank}"), []
    for job in jobs:
        with redirect_stderr(io.StringIO()) as said:
            entry = fetch(FetchOptions(**job), comm, watchdog)
        watchdog.stop()
        comm.barrier()
        files = {kept.name: (kept.nbytes, kept.sha256) for kept in entry.manifest.files}
        directory, revision = str(entry.directory), entry.manifest.revision
        stats = hub("/_stats") if comm.rank == 0 else None
        found.append(dict(directory=directory, revision=revision, files=files, stats=stats, said=said.getvalue()))
        if comm.rank == 0:
            hub("/_reset", b"")
        comm.barrier()
    return found


def hub(path: str, data: bytes | None = None) -> Any:
    """What tests/hub_server.py says of itself, or is told."""
    with urllib.request.urlopen(os.environ["HF_ENDPOINT"] + path, data) as answer:
        return json.load(answer)


if __name__ == "__main__":
    function, out, arguments = sys.argv[1:]
    backend = "mpi" if "OMPI_COMM_WORLD_RANK" in os.environ else "ring" if "MLX_WORLD" in os.environ else None
    joined, _ = connect(backend)
    result = globals()[function](joined, **json.loads(arguments))
    (Path(out) / f"result{joined.rank}").write_bytes(pickle.dumps(result))
    joined.barrier()
