"""What the verbs were asked to do, and the words their flags know. No MLX."""

import ipaddress
from dataclasses import dataclass

THINKING = ("enabled", "adaptive", "disabled")
DTYPES = ("float32", "bfloat16", "float16")
EXPERTS = ("columns", "whole")
ATTENTION = ("heads", "replicated")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
RANDOM = ("4bit", "3bit", "5bit", "6bit", "8bit", "mxfp4", "mxfp8", "nvfp4", "bf16", "f32")
MAX_RANKS = 16
# Tokens of a prompt computed at a time where --prefill-chunk is left out. On a GPU as mlx-lm's generators do.
# On the CPU 2,048 tokens of a small 4-bit model took 10 s at 512 a time as at 2048, above the weights 48 and 140 MiB.
GPU_PREFILL_CHUNK, CPU_PREFILL_CHUNK = 2048, 512
CONNECTIONS = 8  # ranges that a rank asks the hub for at a time
RANGE_SIZE = 16 << 20  # bytes of a range, at most, unless a row has more
DECODE_SUM = 12 * 1024  # bytes that MiniMax-M3 sums at a time in decode: a token's hidden state in bfloat16


@dataclass(frozen=True)
class GenerateOptions:
    """One generation. Every value is in range; `weights`, if given, has one entry per rank.

    `prompt` is the text itself; "-" means that rank 0 reads it from standard input (the other ranks' is empty).
    """

    prompt: str
    model: str = "tiny"  # a directory, a hub id, or "tiny": the checkpoint inside the package
    system: str | None = None
    thinking: str = "adaptive"  # one of THINKING
    raw: bool = False  # give the prompt to the model as it is, without the chat template
    json: bool = False  # print one JSON object instead of streaming text
    max_tokens: int = 512  # >= 1
    temperature: float = 1.0  # >= 0; 0 is greedy
    top_p: float = 0.95  # in (0, 1]; 1 is off
    top_k: int = 40  # >= 0; 0 is off
    min_p: float = 0.0  # in [0, 1]; 0 is off
    seed: int | None = None  # None: chosen by rank 0
    stop: tuple[str, ...] = ()  # no empty string
    dtype: str | None = None  # one of DTYPES; None: bfloat16 on a GPU, float32 on the CPU
    experts: str = "columns"  # one of EXPERTS: how the routed experts are cut
    attention: str = "heads"  # one of ATTENTION: how the attention is cut
    weights: tuple[float, ...] | None = None  # each rank's share of the work, > 0; None: equal
    prefill_chunk: int | None = None  # >= 1, tokens of the prompt computed at a time; None: by the device
    mode: str | None = None  # one of MODES; with bits and group_size: which of the formats that are kept; None: any
    bits: int | None = None
    group_size: int | None = None
    fetch: bool = False  # get what is missing first


@dataclass(frozen=True)
class ServeOptions:
    """One server. Every value is in range; `weights`, if given, has one entry per rank. API keys are never in here."""

    model: str = "tiny"  # a directory, a hub id, or "tiny": the checkpoint inside the package
    names: tuple[str, ...] = ()  # what clients may call the model beside its own name
    host: str = "127.0.0.1"  # address the gateway listens on
    port: int = 8080  # in 0..65535; 0: one that is free
    insecure: bool = False  # may listen beyond this machine without API keys
    rows: int = 32  # >= 1: requests computed together, at most
    queue: int = 256  # >= 0: requests that may wait for a row
    context: int | None = None  # >= 1, tokens of one prompt and its answer; None: the model's, as far as memory goes
    cache_tokens: int | None = None  # >= 1, tokens that the cache holds for all requests; None: by each Mac's memory
    prefill_chunk: int | None = None  # >= 1, tokens of prompts computed at a time; None: by the device
    thinking: str = "adaptive"  # one of THINKING, where a request does not say
    restarts: int = 5  # >= 0: how often in a row the ranks are started again, before the server gives up
    drain: float = 30.0  # >= 0, seconds that running requests may take to finish once the server is told to end
    request_limit: float = 3600.0  # > 0, seconds that one request may take in all
    dtype: str | None = None  # from here on as GenerateOptions
    experts: str = "columns"
    attention: str = "heads"
    weights: tuple[float, ...] | None = None
    mode: str | None = None
    bits: int | None = None
    group_size: int | None = None
    fetch: bool = False


@dataclass(frozen=True)
class ChatOptions:
    """One chat. Every value is in range."""

    url: str | None = None  # of a server that runs; None: one is started for this chat, with the flags of serve
    api_key: str | None = None
    model: str | None = None  # what to ask the server for; None: the first that it names
    system: str | None = None
    thinking: str | None = None  # one of THINKING; None: the server's default
    max_tokens: int | None = None  # >= 1, of an answer; None: the server's default
    temperature: float | None = None  # >= 0; None: the server's default


@dataclass(frozen=True)
class BenchOptions:
    """One bench. Every value is in range; `weights`, if given, has one entry per rank."""

    model: str | None = None  # directory, hub id or "tiny"; with `random` a published name. None: tiny, or MiniMax-M3
    random: str | None = None  # one of RANDOM: make weights of this format instead of loading any
    layers: int | None = None  # >= 1: how many of the model's layers random weights are made for
    set: tuple[tuple[str, str], ...] = ()  # (field of the config, value) for random weights
    decode: tuple[int, ...] | None = None  # contexts, >= 1 each; None: the usual ones, as far as the model goes
    prefill: tuple[int, ...] | None = None  # tokens of a prompt, >= 1 each; None: as above
    chunk_at: tuple[int, ...] = ()  # depths at which `chunk` tokens are prefilled
    chunk: int = 512  # >= 1
    prefill_chunk: int | None = None  # >= 1, tokens of our prefill computed at a time; None: by the device
    tokens: int = 64  # >= 1, of a decode run
    repeats: int = 5  # >= 1
    vs: str | None = None  # "mlx-lm", or nothing to compare with
    json: bool = False  # end with one JSON line
    plot: str | None = None  # file for a picture of decode
    dtype: str | None = None  # one of DTYPES; None: bfloat16 on a GPU, float32 on the CPU
    experts: str = "columns"  # one of EXPERTS
    attention: str = "heads"  # one of ATTENTION
    weights: tuple[float, ...] | None = None  # each rank's share of the work, > 0; None: equal
    mode: str | None = None  # as GenerateOptions
    bits: int | None = None
    group_size: int | None = None
    fetch: bool = False  # as GenerateOptions


@dataclass(frozen=True)
class FetchOptions:
    """What to fetch, for which cut and in which formats. Every value is in range; `weights` has one entry per rank."""

    model: str  # hub id, or a directory
    mode: str | None = None  # one of MODES; with bits, group_size and overrides: formats other than the checkpoint's
    bits: int | None = None
    group_size: int | None = None
    overrides: str | None = None  # file of formats by pattern
    experts: str = "columns"  # one of EXPERTS
    attention: str = "heads"  # one of ATTENTION
    weights: tuple[float, ...] | None = None  # each rank's share of the work, > 0; None: equal
    rank: int | None = None  # with `world`: this machine fetches alone what that rank of so many needs
    world: int | None = None
    connections: int = CONNECTIONS  # >= 1
    range_size: int = RANGE_SIZE  # >= 1


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, to where, and to which formats. Every value is in range."""

    model: str  # hub id, or a directory
    out: str  # a directory that is not there yet
    mode: str | None = None  # as FetchOptions
    bits: int | None = None
    group_size: int | None = None
    overrides: str | None = None
    connections: int = CONNECTIONS
    range_size: int = RANGE_SIZE


@dataclass(frozen=True)
class LinksOptions:
    """One measurement of links. Every value is in range."""

    # Bytes that a rank gives to a collective, multiples of 4 each: by default from 4 by fours to 16 MiB, and M3's own.
    sizes: tuple[int, ...] = tuple(sorted([4**power for power in range(1, 13)] + [DECODE_SUM]))
    repeats: int = 50  # >= 1, at most so many runs for each figure
    json: bool = False  # end with one JSON line


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address: then a server there needs no key, see `ServeOptions.host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
