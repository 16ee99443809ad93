"""What rank 0 makes of the gateway's messages, so that its loop can act on them at once. No MLX.

A grammar may take seconds to compile. Meanwhile everything else goes on, but for the later requests of the same client:
those stay in their order.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from m3dist.cluster.channel import Message
from m3dist.engine.grammar import Grammars, Matcher
from m3dist.engine.request import Request, RequestError


@dataclass(frozen=True)
class Submitted:
    request: Request
    matcher: Matcher | None  # of its grammar


@dataclass(frozen=True)
class Refused:
    """A request that cannot be computed."""

    id: int
    why: str


@dataclass(frozen=True)
class Cancelled:
    id: int


@dataclass(frozen=True)
class Stop:
    """The ranks are to end in good order."""


Heard = Submitted | Refused | Cancelled | Stop


class Reception:
    """Called with each message, in order; what becomes of it goes to `hand_on`, from here or from a thread that
    compiles grammars: one at a time, the clients in turn."""

    def __init__(self, grammars: Grammars, vocab_size: int, context: int, hand_on: Callable[[Heard], None]):
        self._grammars, self._vocab_size, self._context, self._hand_on = grammars, vocab_size, context, hand_on
        # Of each client those that wait for a grammar, their own or an earlier one's. The first of all is being done.
        self._waiting: OrderedDict[str, deque[Request]] = OrderedDict()
        self._changed = threading.Condition()
        threading.Thread(target=self._compile, name="grammars", daemon=True).start()

    def __call__(self, message: Message) -> None:
        if "submit" in message:
            self._submit(message["submit"])
        elif "cancel" in message:
            self._cancel(message["cancel"])
        else:
            self._hand_on(Stop())

    def _submit(self, values: Message) -> None:
        try:
            request = Request.from_json(values, self._vocab_size, self._context)
        except RequestError as error:
            self._hand_on(Refused(values["id"], str(error)))
            return
        with self._changed:
            if request.grammar is None and request.client not in self._waiting:
                self._hand_on(Submitted(request, None))
            else:
                self._waiting.setdefault(request.client, deque()).append(request)
                self._changed.notify()

    def _cancel(self, id: int) -> None:
        with self._changed:
            for client, requests in list(self._waiting.items()):
                if kept := deque(request for request in requests if request.id != id):
                    self._waiting[client] = kept
                else:
                    del self._waiting[client]
            self._hand_on(Cancelled(id))

    def _compile(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                client, (request, *_) = next(iter(self._waiting.items()))
            prepared = self._prepare(request)
            with self._changed:
                requests = self._waiting.get(client)
                if not requests or requests[0] is not request:
                    continue  # cancelled meanwhile
                self._hand_on(prepared)
                requests.popleft()
                if requests:
                    self._waiting.move_to_end(client)
                else:
                    del self._waiting[client]

    def _prepare(self, request: Request) -> Heard:
        try:
            grammar = request.grammar
            return Submitted(request, None if grammar is None else self._grammars.compile(grammar, request.emitted))
        except BaseException as error:  # a panic of llguidance's is no Exception, and the thread is there for all
            return Refused(request.id, str(error))
