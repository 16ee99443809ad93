"""What the gateway says, on its way to rank 0's loop: who waits for a grammar, and who does not."""

import threading
from queue import SimpleQueue

import pytest

from m3dist.engine.grammar import GrammarError
from m3dist.engine.reception import Cancelled, Reception, Refused, Stop, Submitted


class Compiler:
    """Grammars that are compiled when a test says so. Those that begin with "!" cannot be."""

    def __init__(self) -> None:
        self.begun: SimpleQueue[str] = SimpleQueue()
        self.go_on = threading.Semaphore(0)

    def compile(self, grammar: str, emitted: tuple[int, ...]) -> str:
        self.begun.put(grammar)
        self.go_on.acquire()
        if grammar == "!":
            raise GrammarError("no grammar")
        if grammar == "!!":
            raise Panic("a mistake of the compiler's")
        return f"{grammar} after {emitted}"


class Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


class Desk:
    """A reception, and what it hands on."""

    def __init__(self) -> None:
        self.compiler, self.heard = Compiler(), SimpleQueue()
        self.reception = Reception(self.compiler, 10, 10, self.heard.put)

    def submit(self, id: int, client: str = "a", grammar: str | None = None, **more) -> None:
        self.reception({"submit": {"id": id, "client": client, "prompt": [1], "grammar": grammar} | more})

    def compiles(self) -> str:
        """What it compiles now."""
        return self.compiler.begun.get(timeout=5)

    def next(self) -> object:
        """What comes next; of a request, its id."""
        heard = self.heard.get(timeout=5)
        return heard.request.id if isinstance(heard, Submitted) else heard


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_nothing_but_the_same_client_s_requests_waits_for_a_grammar(desk):
    desk.submit(1, "a", "slow")
    assert desk.compiles() == "slow"
    desk.submit(2, "a")
    desk.submit(3, "b")
    desk.reception({"cancel": 77})
    desk.submit(4, "b", prompt=[10])
    desk.reception({"stop": True})
    assert [desk.next() for _ in range(2)] == [3, Cancelled(77)]
    assert desk.next() == Refused(4, "prompt: token ids outside 0 .. 9")
    assert desk.next() == Stop() and desk.heard.empty()
    desk.compiler.go_on.release()
    assert [desk.next(), desk.next()] == [1, 2]
    desk.submit(5, "a")
    assert desk.next() == 5


def test_a_request_comes_with_the_matcher_of_its_answer_so_far(desk):
    desk.compiler.go_on.release()
    desk.submit(1, grammar="quick", emitted=[4, 5])
    assert desk.heard.get(timeout=5).matcher == "quick after (4, 5)"


def test_nobody_hears_of_requests_cancelled_before_their_grammar_was_there(desk):
    desk.submit(1, "a", "one")
    desk.submit(2, "a", "two")
    desk.submit(3, "b", "three")
    assert desk.compiles() == "one"
    desk.reception({"cancel": 1})
    desk.reception({"cancel": 2})
    assert [desk.next(), desk.next()] == [Cancelled(1), Cancelled(2)]
    desk.submit(4, "a")  # nothing of the client's is in its way any more
    assert desk.next() == 4
    desk.compiler.go_on.release(2)
    assert desk.next() == 3
    assert [desk.compiles(), desk.compiler.begun.empty()] == ["three", True]


def test_clients_take_turns(desk):
    for id in range(3):
        desk.submit(id, "a", "many")
    desk.submit(3, "b", "one")
    desk.compiler.go_on.release(4)
    assert [desk.next() for _ in range(4)] == [0, 3, 1, 2]


def test_a_grammar_that_cannot_be_compiled_is_its_request_s_error_alone(desk):
    desk.compiler.go_on.release(3)
    desk.submit(1, grammar="!")
    desk.submit(2, grammar="!!")
    desk.submit(3, grammar="good")
    assert [desk.next(), desk.next()] == [Refused(1, "no grammar"), Refused(2, "a mistake of the compiler's")]
    assert desk.next() == 3
