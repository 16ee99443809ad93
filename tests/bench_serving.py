"""Measures m3dist serve beside mlx_lm.server: python tests/bench_serving.py

Both serve one checkpoint over the same number of local ranks, one server at a time, in turn: the tiny checkpoint in
float32 (MLX's CPU backend multiplies experts in float32 only), with an end token that is never said, so that every
answer has as many tokens as were asked for. Clients stream chat completions, each its next as soon as the last has
ended. Tokens per second are of all clients together; seconds to the first token and between tokens are medians over
all requests. Then conversations of two turns: a prompt of some 2,000 tokens, its answer, and a short question more.
Figures are medians over the rounds, ratios those of each round's neighbours.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import mlx.core as mx

import m3dist
from m3dist.text import Text

TINY = Path(m3dist.__file__).parent / "tiny" / "checkpoint"
START, ANSWER = 120.0, 600.0  # seconds
MPIRUN = "mpirun --allow-run-as-root --oversubscribe --bind-to none --mca mpi_yield_when_idle 1"
WORDS = "the old river walks behind a green house while nine small stones wait under one quiet bridge".split()


@dataclass
class Stream:
    """One answer: seconds it took, to its first token, and between its tokens; how many there were."""

    seconds: float
    first: float
    between: list[float]
    tokens: int
    text: str


def checkpoint(directory: Path) -> None:
    """The tiny checkpoint in float32, whose end token is one that is never said."""
    shutil.copytree(TINY, directory)
    weights = mx.load(str(TINY / "model.safetensors"))
    whole = {name: x.astype(mx.float32) for name, x in weights.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), whole, metadata={"format": "pt"})
    never = Text.load(TINY).tokenizer.get_vocab_size() - 1
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = directory / name
        values = json.loads(path.read_text())
        for config in (values, values.get("text_config", {})):
            if "eos_token_id" in config:
                config["eos_token_id"] = never
            if "torch_dtype" in config:
                config["torch_dtype"] = "float32"
        if "eos_token" in values:
            values["eos_token"] = Text.load(TINY).tokenizer.id_to_token(never)
        path.write_text(json.dumps(values))


def ours(model: Path, ranks: int, port: int, backend: str) -> list[str]:
    flags = ["--model", str(model), "--name", str(model), "-n", str(ranks), "--backend", backend, "--port", str(port)]
    return [sys.executable, "-m", "m3dist", "serve", *flags]


def theirs(model: Path, ranks: int, port: int, backend: str) -> list[str]:
    launcher = [f"{Path(sys.executable).parent}/mlx.launch", "-n", str(ranks), "--backend", "ring", "--"]
    if backend == "mpi":
        launcher = [*MPIRUN.split(), "-n", str(ranks)]
    server = [sys.executable, "-m", "mlx_lm.server", "--model", str(model), "--port", str(port)]
    return [*(launcher if ranks > 1 else []), *server, "--decode-concurrency", "32", "--prompt-concurrency", "8"]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, model: Path) -> Iterator[str]:
    """The address of a server that answers; ended afterwards, with all that it started."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            wait(process, url, model, log)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(process: "subprocess.Popen[bytes]", url: str, model: Path, log) -> None:
    end = time.monotonic() + START
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            body = {"model": str(model), "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            if httpx.post(f"{url}/v1/chat/completions", json=body, timeout=START).status_code == 200:
                return
        time.sleep(0.2)
    log.seek(0)
    raise SystemExit(f"the server did not start:\n{log.read().decode(errors='replace')[-3000:]}")


async def ask(client: httpx.AsyncClient, model: Path, messages: list[dict], tokens: int) -> Stream:
    """One streamed chat completion, greedy; asked again where the server did not take the connection, as mlx-lm's does
    of which 5 may wait. That time counts."""
    began = time.perf_counter()
    while True:
        try:
            stream = await ask_once(client, model, messages, tokens)
        except httpx.TransportError:
            if time.perf_counter() - began > ANSWER:
                raise
            await asyncio.sleep(0.05)
            continue
        waited = time.perf_counter() - began - stream.seconds
        return replace(stream, first=stream.first + waited)


async def ask_once(client: httpx.AsyncClient, model: Path, messages: list[dict], tokens: int) -> Stream:
    body = {"model": str(model), "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began = last = time.perf_counter()
    first, between, counted, text = None, [], 0, ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
            delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
            said = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("content") or ""
            if not said:
                continue
            now = time.perf_counter()
            if first is None:
                first = now - began
            else:
                between.append(now - last)
            last, text = now, text + said
    seconds = time.perf_counter() - began
    return Stream(seconds, first or seconds, between, counted, text)


def prompt(chance: random.Random, words: int) -> list[dict]:
    return [{"role": "user", "content": " ".join(chance.choice(WORDS) for _ in range(words))}]


async def load(url: str, model: Path, clients: int, requests: int, words: int, tokens: int, seed: int) -> dict:
    """Many clients at once: tokens per second of all, and medians of a stream's times in seconds."""
    chance = random.Random(seed)
    streams: list[Stream] = []

    async def run(client: httpx.AsyncClient, prompts: list[list[dict]]) -> None:
        for messages in prompts:
            streams.append(await ask(client, model, messages, tokens))

    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER, limits=limits) as client:
        work = [[prompt(chance, words) for _ in range(requests)] for _ in range(clients)]
        began = time.perf_counter()
        await asyncio.gather(*(run(client, prompts) for prompts in work))
        seconds = time.perf_counter() - began
    return {
        "tokens/s": sum(stream.tokens for stream in streams) / seconds,
        "first": statistics.median(stream.first for stream in streams),
        "between": statistics.median(gap for stream in streams for gap in stream.between),
    }


async def turns(url: str, model: Path, words: int, seed: int) -> dict:
    """Seconds to the first token of a long prompt, and of the turn after its answer."""
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER) as client:
        messages = prompt(random.Random(seed), words)
        first = await ask(client, model, messages, 16)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is 7 + 5?"}]
        second = await ask(client, model, messages, 16)
    return {"first turn": first.first, "second turn": second.first, "times sooner": first.first / second.first}


def measure(command: Sequence[str], port: int, model: Path, options: argparse.Namespace, seed: int) -> dict:
    """One server's figures: by number of clients, and "turns"."""
    with serving(command, port, model) as url:
        asyncio.run(load(url, model, max(options.clients), 1, options.words, 8, seed))  # warm
        found: dict = {}
        for clients in options.clients:
            requests = max(options.requests, 8 // clients)
            found[clients] = asyncio.run(load(url, model, clients, requests, options.words, options.tokens, seed + 1))
        found["turns"] = asyncio.run(turns(url, model, options.turn_words, seed + 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("ring", "mpi"), default="ring")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 32])
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--words", type=int, default=40, help="of a prompt")
    parser.add_argument("--turn-words", type=int, default=1430, help="of the first turn, some 2,000 tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        checkpoint(model)
        found: dict[str, list[dict]] = {"m3dist": [], "mlx-lm": []}
        for number in range(options.rounds):
            for name, command in (("m3dist", ours), ("mlx-lm", theirs)):
                port = 18_000 + 2 * number + (name == "mlx-lm")
                line = command(model, options.ranks, port, options.backend)
                found[name].append(measure(line, port, model, options, 100 * number))
                print(json.dumps({"server": name, "round": number} | {str(k): v for k, v in found[name][-1].items()}))
    show(found, options)


def show(found: dict[str, list[dict]], options: argparse.Namespace) -> None:
    def middle(name: str, key: object, field: str) -> float:
        return statistics.median(figures[key][field] for figures in found[name])

    def ratio(key: object, field: str) -> float:
        return statistics.median(a[key][field] / b[key][field] for a, b in zip(found["m3dist"], found["mlx-lm"]))

    print("| clients | m3dist | mlx-lm | ratio | first token | mlx-lm | between tokens | mlx-lm |")
    print("|---|---|---|---|---|---|---|---|")
    for clients in options.clients:
        cells = [f"{middle(name, clients, 'tokens/s'):,.0f} tokens/s" for name in found]
        cells.append(f"{ratio(clients, 'tokens/s'):.2f}x")
        for field in ("first", "between"):
            cells += [f"{1000 * middle(name, clients, field):,.1f} ms" for name in found]
        print(f"| {clients} | {' | '.join(cells)} |")
    for name in found:
        first, second = (1000 * middle(name, "turns", field) for field in ("first turn", "second turn"))
        times = middle(name, "turns", "times sooner")
        print(f"{name}: first turn {first:,.0f} ms, second turn {second:,.0f} ms to the first token: {times:.1f} times")


if __name__ == "__main__":
    main()
