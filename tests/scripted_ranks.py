"""A rank 0 without a model, for tests of the gateway alone: its end of the link, and tokens by a rule.

The next token is a function of the whole prefix, so that a request that goes on after a fall is seen to go on right.
Everything else is as a test wants it: the pace, when it falls, what it says that it should not.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import m3dist.tiny
from m3dist.cluster.channel import ChannelClosed
from m3dist.engine.link import dial, text_files
from m3dist.engine.request import Request

VOCABULARY, CONTEXT, PAGE = 1024, 8192, 16
FILES = text_files(Path(m3dist.tiny.__file__).parent / "checkpoint")
TICK = 0.002  # seconds between looks at what has arrived, where nothing is computed

Rule = Callable[[Sequence[int]], int | None]  # prefix -> its next token; None where the answer ends


def next_token(prefix: Sequence[int]) -> int:
    """A token of the tiny checkpoint's first 256, bytes all of them."""
    return hashlib.blake2b(repr(list(prefix)).encode(), digest_size=1).digest()[0]


def answer_to(prompt: Sequence[int], tokens: int, rule: Rule = next_token) -> list[int]:
    """The undisturbed answer."""
    prefix = list(prompt)
    for _ in range(tokens):
        token = rule(prefix)
        if token is None:
            break
        prefix.append(token)
    return prefix[len(prompt) :]


class ScriptedRanks:
    """One life of the ranks. Connects when made; a thread computes a step every `pace` seconds.

    `kills` are tokens: a prompt with one of them
    makes the ranks fall in the step after its row began, or where `early`, as soon as it arrives.
    """

    def __init__(
        self,
        address: str,
        secret: str,
        rule: Rule = next_token,
        pace: float = 0.001,
        rows: int = 4,
        kills: Sequence[int] = (),
        early: bool = False,
        ready: bool = True,
        files: dict[str, str] = FILES,
    ):
        self.rule, self.pace, self.rows, self.kills, self.early = rule, pace, rows, set(kills), early
        self.submitted: list[Request] = []  # in order of arrival
        self.cancelled: list[int] = []
        self.told_to_stop = False
        self.steps = 0
        self._channel = dial(address, secret, 5.0)
        self._rows: dict[int, Request] = {}  # requests that are computed
        self._waiting: list[Request] = []
        self._stepping, self._moving, self._over = threading.Lock(), True, False
        hello = {"world": 2, "hosts": ["mac1", "mac2"], "model": "tiny", "files": files}
        self.say({"hello": hello})
        self.say({"loading": 0.4})
        if ready:
            self.get_ready()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def get_ready(self) -> None:
        facts = {"page_size": PAGE, "pages": 1000, "context": CONTEXT, "vocab_size": VOCABULARY, "rows": self.rows}
        self.say({"ready": {**facts, "weights_bytes": [100, 200]}})

    def say(self, message: dict[str, Any]) -> None:
        """Anything, true or not."""
        with suppress(ChannelClosed):
            self._channel.send(message)

    def say_bytes(self, data: bytes) -> None:
        """Not even a message."""
        os.write(self._channel.writing, data)

    def stall(self) -> None:
        """No step from now on until `go_on`; what arrives is heard."""
        with self._stepping:
            self._moving = False

    def go_on(self) -> None:
        self._moving = True

    def fall(self) -> None:
        """The connection is gone, in the middle of whatever it was. May be called again."""
        self._over = True
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _live(self) -> None:
        with suppress(ChannelClosed):
            while not self._over:
                self._hear()
                with self._stepping:
                    if self._moving and not self._over:
                        self._step()
        self._channel.close()

    def _hear(self) -> None:
        """What arrives until the next step is due."""
        end = time.monotonic() + (self.pace if self._rows or self._waiting else TICK)
        while not self._over and (message := self._channel.receive(max(0.0, end - time.monotonic()))) is not None:
            if "submit" in message:
                request = Request.from_json(message["submit"], VOCABULARY, CONTEXT)
                self.submitted.append(request)
                self._waiting.append(request)
                self._over = self._over or (self.early and not self.kills.isdisjoint(request.prompt))
            elif "cancel" in message:
                self.cancelled.append(message["cancel"])
                self._rows.pop(message["cancel"], None)
                self._waiting = [request for request in self._waiting if request.id != message["cancel"]]
            elif "stop" in message:
                self._over = self.told_to_stop = True

    def _step(self) -> None:
        """Fill the rows; a token for each; ends."""
        while self._waiting and len(self._rows) < self.rows:
            request = self._waiting.pop(0)
            self._rows[request.id] = request
            self.say({"started": request.id, "cached": len(request.prompt) // 2})
        if any(not self.kills.isdisjoint(request.prompt) for request in self._rows.values()):
            self._over = True
            return
        tokens, ends = [], []
        for id, request in list(self._rows.items()):
            token = self.rule([*request.prompt, *request.emitted])
            if token is None or token in request.stop_ids:
                ends.append({"ended": id, "reason": "stop"})
                continue
            request = Request(**{**request.__dict__, "emitted": (*request.emitted, token)})
            self._rows[id] = request
            tokens.append([id, token, *self._logprobs(request, token)])
            if len(request.emitted) >= request.max_tokens:
                ends.append({"ended": id, "reason": "length"})
        if tokens or ends:
            self.steps += 1
            self.say({"tokens": tokens})
        for end in ends:
            del self._rows[end["ended"]]
            self.say(end)

    def _logprobs(self, request: Request, token: int) -> list[Any]:
        if request.sampling.logprobs is None:
            return []
        return [-0.5, [[(token + i) % VOCABULARY, -0.5 - i] for i in range(request.sampling.logprobs)]]
