"""`m3dist generate`: one prompt, one answer. Every rank runs this; rank 0 reads, tokenises, decides and prints."""

import json
import math
import os
import resource
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from m3dist.cluster.environment import Launch
from m3dist.comm import Comm, all_ranks
from m3dist.config import ModelConfig, read_config
from m3dist.engine.alone import Request, generate_tokens
from m3dist.errors import M3Error
from m3dist.find import directory_of, find_or_fetch
from m3dist.options import GenerateOptions
from m3dist.rank import START_LIMIT, STEP_LIMIT, join, load_model, prefill_chunk_of_device, run_rank
from m3dist.sample import Sampling
from m3dist.text import ReasoningSplitter, Text, TextStream
from m3dist.watchdog import Watchdog


def main(options: GenerateOptions, launch: Launch) -> int:
    """Be one rank of the job, or all of it. An error ends this process at once: else it would hold up the others."""
    return run_rank(partial(_run, options, launch), launch, options.dtype)


def _run(options: GenerateOptions, launch: Launch, watchdog: Watchdog) -> int:
    comm = join(launch, options.model, watchdog)
    cut = {"weights": options.weights, "experts": options.experts, "attention": options.attention}
    found = find_or_fetch(options.model, options, comm, watchdog)
    watchdog.progress("reading the prompt", math.inf if options.prompt == "-" else STEP_LIMIT)  # someone may type it
    answer, request = _ask(options, directory_of(found), comm, watchdog)
    began = time.perf_counter()
    context = len(request.prompt) + request.max_tokens
    model, _ = load_model(options.model, found, comm, watchdog, options.dtype, context, **cut)
    load_seconds = time.perf_counter() - began

    def computing(phase: str) -> None:
        watchdog.progress(phase, STEP_LIMIT)

    began, times = time.perf_counter(), []
    for _ in generate_tokens(model, request, answer.add if answer else bool, computing):
        times.append(time.perf_counter())
    watchdog.progress("the end", START_LIMIT)
    memory = {
        "weights_bytes": sum(x.nbytes for _, x in model.held_arrays()),
        "peak_mlx_bytes": mx.get_peak_memory(),
        "peak_resident_bytes": _peak_resident_bytes(),
    }
    ranks = comm.gather_objects({"rank": comm.rank, "load_seconds": round(load_seconds, 3)} | memory)
    watchdog.stop()
    if answer:
        job_facts = {"world": comm.world, "backend": launch.backend, "seed": request.seed}
        answer.finish(job_facts | timing(request, began, times), ranks)
    return 0


def _ask(options: GenerateOptions, directory: Path, comm: Comm, watchdog: Watchdog) -> tuple["Answer | None", Request]:
    """What rank 0 wants computed, on every rank; and on rank 0 the answer to be. Loads nothing yet: a prompt that
    cannot be answered is known at once."""
    answer = request = None
    with all_ranks(comm):
        if comm.rank == 0:
            answer = Answer(options, Text.load(directory))
            request = asdict(answer.request(ModelConfig.from_dict(read_config(directory))))
            watchdog.progress("sending the prompt", STEP_LIMIT)
    return answer, Request.from_json(comm.object_from_rank_0(request))


def timing(request: Request, began: float, times: list[float]) -> dict[str, Any]:
    """Counts and speeds, from when the computation began and when each token was there (seconds)."""
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": len(times),
        "time_to_first_token_seconds": round(times[0] - began, 3) if times else None,
        "tokens_per_second": rate and round(rate, 2),
    }


class Answer:
    """Rank 0's side: the prompt's tokens, and the text as it comes."""

    def __init__(self, options: GenerateOptions, text: Text):
        self.options, self.text = options, text
        self.tokens: list[int] = []
        self.max_tokens = options.max_tokens
        self.stream = TextStream(text, list(options.stop))
        self.splitter = ReasoningSplitter("disabled" if options.raw else options.thinking)
        self.reasoning, self.content = "", ""
        self._reasoned = False  # what was last shown

    def request(self, config: ModelConfig) -> Request:
        """Raises M3Error where the prompt cannot be made into tokens this model has, or has room for."""
        options = self.options
        prompt = read_prompt() if options.prompt == "-" else options.prompt
        if options.raw:
            ids = self.text.encode(prompt)
        else:
            system = [{"role": "system", "content": options.system}] if options.system else []
            ids = self.text.prompt_ids([*system, {"role": "user", "content": prompt}], thinking=options.thinking)
        if not ids:
            raise M3Error("the prompt has no tokens; give --prompt some text")
        if max(ids) >= config.vocab_size:
            raise M3Error(
                f"the tokenizer gave id {max(ids)}, but the model has {config.vocab_size}: they do not belong together"
            )
        most = config.max_position_embeddings
        if len(ids) >= most:
            raise M3Error(
                f"the prompt has {len(ids)} tokens; with the answer this model takes at most {most}"
                " (max_position_embeddings in config.json)"
            )
        self.max_tokens = min(options.max_tokens, most - len(ids))
        seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")
        sampling = Sampling(options.temperature, options.top_p, options.top_k, options.min_p)
        chunk = options.prefill_chunk or prefill_chunk_of_device()
        return Request(ids, self.max_tokens, seed, chunk, sorted(self.text.stop_ids), sampling)

    def add(self, token: int) -> bool:
        """Take the next token, show what can be shown; true once a stop string has come."""
        self.tokens.append(token)
        self._show(*self.splitter.feed(self.stream.feed(token)))
        return self.stream.stopped

    def finish(self, facts: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
        self._show(*self.splitter.feed(self.stream.finish()))
        self._show(*self.splitter.finish())
        reason = "stop" if self.stream.stopped or len(self.tokens) < self.max_tokens else "length"
        if self.options.json:
            said = {"text": self.content, "reasoning": self.reasoning, "finish_reason": reason, "tokens": self.tokens}
            self._write(json.dumps(said | facts | {"ranks": ranks}) + "\n")
            return
        self._write("\n")
        print(report(facts, ranks), file=sys.stderr, flush=True)

    def _show(self, reasoning: str, content: str) -> None:
        self.reasoning += reasoning
        self.content += content
        if self.options.json:
            return
        if reasoning and sys.stdout.isatty():
            reasoning = f"\x1b[2m{reasoning}\x1b[0m"  # dim, each piece for itself: an interrupt leaves nothing dim
        for piece, reasons in ((reasoning, True), (content, False)):
            if piece:
                self._write("\n" * (self._reasoned and not reasons) + piece)
                self._reasoned = reasons

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            raise M3Error(f"standard output: {error.strerror}") from None


def read_prompt() -> str:
    """What standard input holds."""
    try:
        prompt = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise M3Error(f"--prompt -: standard input must be text, in UTF-8: {error}") from None
    if not prompt:
        raise M3Error("--prompt -: standard input is empty")
    return prompt


def report(speed: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    """The lines below an answer: one a rank, then the speed."""
    lines = [
        f"rank {r['rank']}: weights {_mib(r['weights_bytes'])}, peak in MLX {_mib(r['peak_mlx_bytes'])}, "
        f"peak resident {_mib(r['peak_resident_bytes'])}, loaded in {r['load_seconds']:.2f} s"
        for r in ranks
    ]
    said = f"prompt {speed['prompt_tokens']} tokens, answer {speed['completion_tokens']} tokens"
    if speed["completion_tokens"]:
        said += f", the first after {speed['time_to_first_token_seconds']:.2f} s"
    if speed["tokens_per_second"]:
        said += f", then {speed['tokens_per_second']:.1f} tokens/s"
    lines.append(said)
    return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
