"""What `m3dist generate` was asked to do, and the words the flags know. No MLX."""

from dataclasses import dataclass

THINKING = ("enabled", "adaptive", "disabled")
DTYPES = ("float32", "bfloat16", "float16")
EXPERTS = ("columns", "whole")
ATTENTION = ("heads", "replicated")
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
MAX_RANKS = 16


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
    prefill_chunk: int = 512  # >= 1, tokens of the prompt computed at a time
