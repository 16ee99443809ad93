"""When the stages of a prefill are submitted, and when they are waited for. A stage ends where ranks sum.

On Metal MLX runs every collective on the CPU, and GPU work submitted together with one waits for it inside a command
buffer: where a peer is slow or dead, the GPU's watchdog kills that after about 5 s. So there a sum is submitted by
itself, and what needs it only once it has arrived. The GPU would idle meanwhile, and for the handing over between GPU
and CPU: so two chunks take turns, one computing while the other's sum travels. No product gets smaller by that, where
halves of a chunk would read the experts twice.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx


def sums_travel_apart(world: int, kind: str) -> bool:
    """Whether `world` ranks that compute on `kind`, a key of tuning.TUNING, do so.

    Not on CUDA: NCCL's sums are kernels in the GPU's own stream, and nothing ends one that waits. Not on the CPU, where
    sums and compute are one queue.
    """
    return kind == "metal" and world > 1


def run_in_turns(parts: Sequence[Iterator[mx.array | list[mx.array]]], ahead: int) -> None:
    """Submit what the parts yield, one result of each in turn, with fewer than `ahead` unfinished when a part goes on.

    Every part yields as many. So with `ahead` = len(parts) each goes on when its own last result is there, the others'
    being on their way. Returns when all results are there. Ranks that call it alike submit their sums in one order.
    """
    running, unfinished = deque(parts), deque()
    while running:
        part = running.popleft()
        if (result := next(part, None)) is None:
            continue
        running.append(part)
        mx.async_eval(result)
        unfinished.append(result)
        if len(unfinished) == ahead:
            mx.eval(unfinished.popleft())
    mx.eval(list(unfinished))
