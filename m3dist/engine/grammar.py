"""Which tokens may come next, so that an answer follows a grammar: llguidance's parser over a checkpoint's tokens.

A grammar is in llguidance's Lark and describes the whole text of an answer, reasoning included. Only rank 0 has any;
the others are sent its masks. No MLX.
"""

import re
import threading
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from m3dist.errors import M3Error
from m3dist.text import Text

LONGEST = 2**19  # characters of a grammar
LIMITS = LLParserLimits(verbose_errors=False)  # llguidance's own, of what is kept and of what one step may take
KEPT = 8  # grammars that stay compiled
PATIENCE = 5.0  # seconds for a grammar to be compiled; those that people write take milliseconds
# Rules that refer to the next, each to the next, are followed by recursion: a stack too small ends the process.
# Measured with the longest chains of rules and of $ref that a text can hold: 128 to 256 bytes of stack a character.
STACK_A_CHARACTER, LEAST_STACK = 2048, 2**24
# A multiple is recognised by its remainder, one state each, whatever LIMITS say: 12 us a state.
REMAINDERS = 50_000
MULTIPLE_OF = re.compile(r'"multipleOf"\s*:\s*(-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)')


class GrammarError(M3Error):
    """A grammar that cannot be used, or tokens that do not follow it. It ends that request alone."""


class Grammars:
    """A checkpoint's tokens, as grammars see them.

    tokenizer_json: the text of tokenizer.json. stop_ids: what may follow where a grammar can end. vocab_size: the
    model's; ids beyond the tokenizer's are never allowed, nor are special tokens other than stop_ids. Other added
    tokens, as <mm:think>, are text like any: they may come whole or in pieces. Where a grammar leaves no choice of
    text, masks allow only the tokens that the tokenizer would make of it, as the model is used to.
    """

    def __init__(self, tokenizer_json: str, stop_ids: Collection[int], vocab_size: int):
        self._stop_ids = sorted(stop_ids)
        if self._stop_ids:
            vocabulary = TokenizerWrapper(_Vocabulary(tokenizer_json, self._stop_ids, vocab_size))
            self._tokenizer = LLTokenizer(vocabulary, eos_token=self._stop_ids)
        self._compiled = lru_cache(KEPT)(self._compile)

    def compile(self, grammar: str, emitted: Sequence[int] = ()) -> "Matcher":
        """The matcher of an answer that begins with the tokens `emitted`. Other threads go on meanwhile. Answers to one
        prompt, and programs that ask again and again, have one grammar: the last few are not compiled anew.

        Raises GrammarError: not a grammar, too large a one, or one that `emitted` does not follow.
        """
        if not self._stop_ids:
            raise GrammarError("grammars need a stop token: the checkpoint's configs have no eos_token_id")
        matcher = Matcher(self._compiled(grammar).deep_copy())
        for token in emitted:
            matcher.took(token)
        return matcher

    def _compile(self, grammar: str) -> LLMatcher:
        """At its beginning, where it stays."""
        return _bounded(grammar, lambda: LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS))


def check(grammar: str) -> None:
    """Whether `compile` would take it, without a tokenizer, in the process that has none. Raises GrammarError."""
    as_lark = LLMatcher.grammar_from_lark(grammar)
    failed, messages = _bounded(grammar, lambda: LLMatcher.validate_grammar_with_warnings(as_lark, limits=LIMITS))
    if failed:
        raise GrammarError(_first_lines(messages[0]))


def _bounded(grammar: str, compile: Callable[[], Any]) -> Any:
    """What `compile` gives, which llguidance makes of `grammar`, where neither stack nor time runs out.

    Raises GrammarError. What takes longer than PATIENCE goes on without anyone who waits for it.
    """
    if len(grammar) > LONGEST:
        raise GrammarError(f"the grammar has {len(grammar)} characters; {LONGEST} are the most")
    if sum(map(_remainders, MULTIPLE_OF.findall(grammar))) > REMAINDERS:
        raise GrammarError(f"multipleOf is too large: {REMAINDERS} is the most, of all in a schema together")
    found: SimpleQueue[Any] = SimpleQueue()

    def run() -> None:
        try:
            found.put(compile())
        except BaseException as error:  # a panic of llguidance's is no Exception
            found.put(GrammarError(f"the grammar cannot be compiled: {error}"))

    thread = threading.Thread(target=run, name="grammar", daemon=True)
    with _starting:
        before = threading.stack_size(max(LEAST_STACK, STACK_A_CHARACTER * len(grammar)))
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    try:
        result = found.get(timeout=PATIENCE)
    except Empty:
        raise GrammarError(f"the grammar takes more than {PATIENCE:.0f} seconds to compile: simplify it") from None
    if isinstance(result, GrammarError):
        raise result
    return result


_starting = threading.Lock()  # the size of stacks is the whole process's


def _remainders(multiple: str) -> int:
    """How many states it takes to recognise multiples of a number: of 0.25 as many as of 25."""
    _, digits, exponent = Decimal(multiple).as_tuple()
    zeros = min(max(int(exponent), 0), len(str(REMAINDERS)))  # more change nothing
    return int("".join(map(str, digits))[: len(str(REMAINDERS)) + 1] + "0" * zeros)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self._check("the grammar cannot be used")

    def mask(self) -> bytes:
        """The tokens that may come next: uint32 words, the lowest bit first, one bit for each of the vocabulary.

        Stop tokens where the answer may end; only these where it must. Raises GrammarError where the grammar takes
        more than llguidance's limits to follow, or nothing may come next.
        """
        bits = self._matcher.compute_bitmask()
        self._check("the grammar cannot be followed")
        if bits.count(0) == len(bits):
            raise GrammarError("the grammar allows no token next")
        return bits

    def took(self, token: int) -> None:
        """The answer goes on with `token`. Raises GrammarError if that was not allowed."""
        self._matcher.consume_token(token)
        self._check(f"token {token} does not follow the grammar")

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"{what}: {_first_lines(self._matcher.get_error())}")


def _first_lines(message: str) -> str:
    """What llguidance says, without the grammar's own text, of which it adds some lines to show the place."""
    return message.partition("\n")[0].strip()[:300]


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token, which are special, and text -> ids."""

    bos_token_id = None

    def __init__(self, tokenizer_json: str, stop_ids: Sequence[int], vocab_size: int):
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        text = Text(self._tokenizer)
        self.eos_token_id = stop_ids[0]
        self.tokens = [text.token_bytes(id) for id in range(vocab_size)]
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids = sorted({id for id, token in added.items() if token.special} | {*stop_ids})
        for id in self.special_token_ids:
            self.tokens[id] = (self._tokenizer.id_to_token(id) or f"<{id}>").encode()
        self._tokenizer.encode_special_tokens = True  # text that spells a special token is text

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
