"""`m3dist generate`: one prompt, one answer. Every rank runs this; rank 0 reads, tokenises, decides and prints."""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from m3dist.checkpoint import resolve
from m3dist.cluster.claim import claim_addresses
from m3dist.cluster.environment import Launch
from m3dist.comm import check_same, connect, failures, versions
from m3dist.errors import CommunicationError, M3Error
from m3dist.loader import load
from m3dist.model import Model
from m3dist.options import GenerateOptions
from m3dist.sample import Sampling, choose
from m3dist.text import ReasoningSplitter, Text, TextStream
from m3dist.watchdog import EXIT_PEER_LOST, Watchdog, end_process

# Seconds a rank may go without finishing anything, before it ends itself: until every rank has joined; and for loading
# one tensor, one prefill chunk or one decode step (the first of which compiles kernels).
START_LIMIT = float(os.environ.get("M3DIST_START_LIMIT", 60))
STEP_LIMIT = float(os.environ.get("M3DIST_STEP_LIMIT", 120))


@dataclass(frozen=True)
class Request:
    """What rank 0 asks all ranks to compute; plain values, sent as JSON."""

    prompt: list[int]
    max_tokens: int
    seed: int
    prefill_chunk: int
    stop_ids: list[int]
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Request":
        return cls(**values | {"sampling": Sampling(**values["sampling"])})


def generate_tokens(
    model: Model,
    request: Request,
    finished: Callable[[int], bool] = lambda token: False,
    progress: Callable[[str], None] = lambda phase: None,
) -> Iterator[int]:
    """The answer's tokens, the same on every rank, without the stop token.

    Rank 0 samples; its token reaches the others inside the graph. The next step is started before this one's token is
    on the host. `finished` is asked on rank 0 alone, with each token; its yes travels with the step after next, so that
    all ranks stop at the same step. Raises CommunicationError where the ranks' hidden states are no longer equal.
    """
    comm, cache = model.comm, model.make_cache()
    key = mx.random.key(request.seed)
    stopping = False

    def step(tokens: mx.array) -> mx.array:
        """tokens [n] -> uint32 [token, rank 0 says stop, ranks agree]."""
        nonlocal key
        hidden = model.hidden(tokens[None], cache=cache)[0, -1]
        candidates = model.candidates(hidden, request.sampling)
        key, now = mx.random.split(key)
        said = mx.concatenate([choose(candidates, request.sampling, now), mx.array([stopping], dtype=mx.uint32)])
        packet = mx.concatenate([comm.from_rank_0(said), candidates.agree[None].astype(mx.uint32)])
        mx.async_eval(packet)
        return packet

    prompt = mx.array(request.prompt, dtype=mx.uint32)
    while prompt.size > request.prefill_chunk:
        progress(f"prefill of {len(request.prompt)} tokens, at {len(request.prompt) - prompt.size}")
        model.hidden(prompt[None, : request.prefill_chunk], cache=cache)
        mx.eval([layer.state for layer in cache])
        prompt = prompt[request.prefill_chunk :]
    progress(f"prefill of {len(request.prompt)} tokens, at {len(request.prompt) - prompt.size}")
    current = step(prompt)
    for number in range(request.max_tokens):
        following = step(current[:1]) if number + 1 < request.max_tokens else None
        token, stop, agree = current.tolist()
        progress(f"decode step {number + 1}")
        if not agree:
            raise CommunicationError(
                f"the ranks' hidden states differ at step {number}: their results cannot be trusted"
            )
        if stop or token in request.stop_ids:
            return
        if not stopping:
            yield token
            stopping = comm.rank == 0 and finished(token)
        current = following


def dtype_of_device() -> str:
    """bfloat16 on a GPU. On the CPU MLX multiplies experts in float32 only, and quantised bfloat16 ten times slower."""
    return "float32" if mx.default_device().type == mx.DeviceType.cpu else "bfloat16"


def main(options: GenerateOptions, launch: Launch) -> int:
    """Be one rank of the job, or all of it. An error ends this process at once: else it would hold up the others."""
    watchdog = Watchdog(f"rank {launch.rank}")
    try:
        return _run(options, launch, watchdog)
    except M3Error as error:
        code = EXIT_PEER_LOST if isinstance(error, CommunicationError) else 2
        end_process(code, f"rank {launch.rank}: {error}", watchdog.abort)
    except RuntimeError as error:
        if "connection to a peer was lost" in str(error):
            end_process(EXIT_PEER_LOST, f"rank {launch.rank}: another rank is gone ({error})", watchdog.abort)
        traceback.print_exc()
        end_process(1, f"rank {launch.rank}: {error}", watchdog.abort)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        traceback.print_exc()
        end_process(1, f"rank {launch.rank}: {type(error).__name__}: {error}", watchdog.abort)
    return 1


def _run(options: GenerateOptions, launch: Launch, watchdog: Watchdog) -> int:
    watchdog.progress("rendezvous", START_LIMIT)
    claim_addresses(launch, os.environ.get("MLX_HOSTFILE"))
    comm, job = connect(launch.backend, launch.job, START_LIMIT)
    watchdog.who, watchdog.abort = f"rank {comm.rank} of {comm.world}", comm.abort
    check_same(comm, {"job": job, "model": options.model} | versions())
    directory = resolve(options.model)

    def loading(name: str) -> None:
        watchdog.progress(f"load of {name}", STEP_LIMIT)

    began, dtype = time.perf_counter(), options.dtype or dtype_of_device()
    model = load(directory, comm, weights=options.weights, experts=options.experts, dtype=dtype, progress=loading)
    stats = {"rank": comm.rank, "load_seconds": round(time.perf_counter() - began, 3)}

    answer, request = None, None
    error: Exception | None = None
    if comm.rank == 0:
        try:
            answer = Answer(options, Text.load(directory))
            request = answer.request(model.args.vocab_size)
        except Exception as caught:
            error = caught
    failures(comm, error)
    request = Request.from_json(comm.object_from_rank_0(request and asdict(request)))
    count, first, began = 0, None, time.perf_counter()

    def computing(phase: str) -> None:
        watchdog.progress(phase, STEP_LIMIT)

    for _ in generate_tokens(model, request, answer.add if answer else bool, computing):
        first = first or time.perf_counter()
        count += 1
    ended = time.perf_counter()
    watchdog.progress("the end", START_LIMIT)
    stats |= {
        "weights_bytes": sum(x.nbytes for _, x in model.held_arrays()),
        "peak_mlx_bytes": mx.get_peak_memory(),
        "peak_resident_bytes": _peak_resident_bytes(),
    }
    ranks = comm.gather_objects(stats)
    watchdog.stop()
    if answer:
        first = first or ended
        timing = {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": count,
            "time_to_first_token_seconds": round(first - began, 3),
            "tokens_per_second": round((count - 1) / (ended - first), 2) if count > 1 else None,
        }
        answer.finish({"world": comm.world, "backend": launch.backend, "seed": request.seed} | timing, ranks)
    return 0


class Answer:
    """Rank 0's side: the prompt's tokens, and the text as it comes."""

    def __init__(self, options: GenerateOptions, text: Text):
        self.options, self.text = options, text
        self.tokens: list[int] = []
        self.stream = TextStream(text, list(options.stop))
        self.splitter = ReasoningSplitter("disabled" if options.raw else options.thinking)
        self.reasoning, self.content = "", ""
        self._dimmed = False

    def request(self, vocab_size: int) -> Request:
        """Raises M3Error where the prompt cannot be made into tokens this model has."""
        options = self.options
        prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
        if options.raw:
            ids = self.text.encode(prompt)
        else:
            system = [{"role": "system", "content": options.system}] if options.system else []
            ids = self.text.prompt_ids([*system, {"role": "user", "content": prompt}], thinking=options.thinking)
        if not ids:
            raise M3Error("the prompt has no tokens; give --prompt some text")
        if max(ids) >= vocab_size:
            raise M3Error(
                f"the tokenizer gave id {max(ids)}, but the model has {vocab_size}: they do not belong together"
            )
        seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")
        sampling = Sampling(options.temperature, options.top_p, options.top_k, options.min_p)
        return Request(ids, options.max_tokens, seed, options.prefill_chunk, sorted(self.text.stop_ids), sampling)

    def add(self, token: int) -> bool:
        """Take the next token, show what can be shown; true once a stop string has come."""
        self.tokens.append(token)
        self._show(*self.splitter.feed(self.stream.feed(token)))
        return self.stream.stopped

    def finish(self, timing: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
        self._show(*self.splitter.feed(self.stream.finish()))
        self._show(*self.splitter.finish())
        if self.stream.stopped or len(self.tokens) < self.options.max_tokens:
            reason = "stop"
        else:
            reason = "length"
        if self.options.json:
            said = {"text": self.content, "reasoning": self.reasoning, "finish_reason": reason, "tokens": self.tokens}
            print(json.dumps(said | timing | {"ranks": ranks}, ensure_ascii=False), flush=True)
            return
        self._dim(False)
        print(flush=True)
        print(report(timing, ranks), file=sys.stderr, flush=True)

    def _show(self, reasoning: str, content: str) -> None:
        self.reasoning += reasoning
        self.content += content
        if self.options.json:
            return
        for piece, dim in ((reasoning, True), (content, False)):
            if piece:
                self._dim(dim)
                sys.stdout.write(piece)
        sys.stdout.flush()

    def _dim(self, dim: bool) -> None:
        """Reasoning is dim on a terminal; elsewhere a line break sets the answer off from it."""
        if dim == self._dimmed:
            return
        self._dimmed = dim
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[2m" if dim else "\x1b[0m\n")
        elif not dim:
            sys.stdout.write("\n")


def report(timing: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    """The lines below an answer: one a rank, then the speed."""
    lines = [
        f"rank {r['rank']}: weights {_mib(r['weights_bytes'])}, peak in MLX {_mib(r['peak_mlx_bytes'])}, "
        f"peak resident {_mib(r['peak_resident_bytes'])}, loaded in {r['load_seconds']:.2f} s"
        for r in ranks
    ]
    speed = timing["tokens_per_second"]
    lines.append(
        f"prompt {timing['prompt_tokens']} tokens, first token after {timing['time_to_first_token_seconds']:.2f} s, "
        f"{timing['completion_tokens']} tokens" + (f" at {speed:.1f} tokens/s" if speed else "")
    )
    return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
