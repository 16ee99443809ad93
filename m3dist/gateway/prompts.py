"""Prompts' texts -> token ids, beside the event loop, in bounded memory. No MLX.

A tokenizer takes some 150 bytes for each byte of a text, and half a second for each million.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from m3dist.text import Text

LARGE = 2**18  # characters of a text that waits for other such texts, and of the pieces in which its tokens are counted
MARGIN = 1.01  # pieces have more tokens than the whole: some at each cut, 41 of 10 million where it was measured


class TooLong(Exception):
    """A text of more tokens than a prompt may have."""


class Encoder:
    """Encodes texts: large ones one after another, others as they come."""

    def __init__(self) -> None:
        # A thread of its own rather than a semaphore: it goes on with a text whose client has left meanwhile.
        self._one = ThreadPoolExecutor(1, thread_name_prefix="large prompts")

    async def encode(self, text: Text, prompt: str, most: int) -> list[int]:
        """The token ids of `prompt`. Raises TooLong where these are plainly more than `most`, before they are made."""
        thread = self._one if len(prompt) > LARGE else None
        return await asyncio.get_running_loop().run_in_executor(thread, encode, text, prompt, most)


def encode(text: Text, prompt: str, most: int) -> list[int]:
    """The same, here and now."""
    if len(prompt) > LARGE:
        counted = 0
        for start in range(0, len(prompt), LARGE):
            counted += len(text.encode(prompt[start : start + LARGE]))
            if counted > most * MARGIN:
                raise TooLong
    return text.encode(prompt)
