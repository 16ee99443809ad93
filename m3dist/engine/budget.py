"""How many pages of cache the ranks' memory holds, and how long a request they let be. No MLX."""

from collections.abc import Sequence
from dataclasses import dataclass

from m3dist.errors import PlanError
from m3dist.plan import Plan

DENSE_PAGE = 128  # tokens of a page where no layer is sparse: else pages are the blocks that sparse attention chooses
CONTEXTS = 64  # requests of full length: memory for more would never be used


@dataclass(frozen=True)
class Room:
    """What a rank has for weights and caches, in bytes."""

    host: str
    nbytes: int


@dataclass(frozen=True)
class Budget:
    """Page 0 is nobody's: the model writes padding there."""

    page_size: int  # tokens
    pages: int  # page 0 included
    context: int  # tokens, prompt and answer, that one request may have
    page_bytes: int = 0  # of a page, on all ranks together

    @property
    def tokens(self) -> int:
        return self.page_size * self.pages


def make_budget(plan: Plan, rooms: Sequence[Room], cache_tokens: int | None, context: int | None) -> Budget:
    """`rooms`: each rank's. `cache_tokens`, `context`: what --cache-tokens and --context said; None: as much as there
    is room for, and as the model takes.

    Raises PlanError, naming rank and host, where that is less than a page.
    """
    config = plan.inventory.config
    size = config.sparse_block_size if any(config.sparse_attention_freq) else DENSE_PAGE
    longest = min(context or config.max_position_embeddings, config.max_position_embeddings)
    if cache_tokens is None:
        counts = [_pages(plan, rank, room, size) for rank, room in enumerate(rooms)]
        pages = min(*counts, CONTEXTS * -(-longest // size) + 1)
        if pages < 2:
            rank = counts.index(min(counts))
            raise PlanError(
                f"rank {rank} on {rooms[rank].host}: beside {plan.bytes_held(rank) / 2**30:.1f} GiB of weights there "
                "is no memory for a cache; use more machines, fewer bits or a smaller share by --weights"
            )
    else:
        pages = -(-cache_tokens // size) + 1
    page_bytes = size * sum(map(plan.cache_bytes_per_token, range(plan.world)))
    return Budget(size, pages, min(longest, (pages - 1) * size), page_bytes)


def _pages(plan: Plan, rank: int, room: Room, size: int) -> int:
    return (room.nbytes - plan.bytes_held(rank)) // (size * plan.cache_bytes_per_token(rank))
