"""What the APIs have in common: from a request's fields to work for the ranks, and from their tokens to answers."""

import asyncio
import codecs
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from m3dist.gateway.answer import Answer, Event, Reasoning
from m3dist.gateway.chat import Conversation, grammar_of, prompt_of
from m3dist.gateway.errors import BadRequest
from m3dist.gateway.prompts import TooLong
from m3dist.gateway.ranks import RequestFailed, Stream, Token, Work
from m3dist.sampling import Sampling
from m3dist.text import Text

# ---------------------------------------------------------------------------------------------------------------------
# What is wanted


@dataclass(frozen=True)
class Wanted:
    """`count` answers to one prompt. `conversation`: what it asks of the answer; None: raw text."""

    work: Work
    stop: tuple[str, ...] = ()
    conversation: Conversation | None = None
    count: int = 1


@dataclass(frozen=True)
class Choosing:
    """What a request says of the choice of tokens, whatever its API; None: nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False


def find_model(services: Any, name: str) -> str:
    """The served model of that name. Raises BadRequest (404)."""
    if name not in services.models:
        served = ", ".join(services.models)
        raise BadRequest(f"the model {name[:100]!r} does not exist; served: {served}", "model", "model_not_found", 404)
    return name


def check_count(services: Any, request: Request, count: int, prompts: int = 1) -> None:
    """Raise BadRequest where `count` answers to each of `prompts` can never be taken, Busy or Unavailable if not now.

    To be called before any work is done for them.
    """
    ranks = services.ranks
    if count * prompts > ranks.most:
        field = "n" if count > 1 else "prompt"
        told = f"{field}: {count * prompts} answers at a time are more than this server takes, {ranks.most}"
        raise BadRequest(told, field)
    ranks.check(count * prompts, request.state.client)


async def chat(
    services: Any,
    request: Request,
    conversation: Conversation,
    choosing: Choosing,
    max_tokens: int | None,
    count: int = 1,
    field: str = "messages",
    places: Sequence[str] = (),
) -> Wanted:
    """`count` answers to a conversation, which the client gave as `field`; for `places` see `prompt_ids`.

    Raises BadRequest; and before any work is done for it, Busy or Unavailable.
    """
    check_count(services, request, count)
    prompt = await prompt_ids(services, conversation, field, places)
    room = _room(services, field, prompt)
    grammar = await asyncio.to_thread(grammar_of, conversation)
    return Wanted(_work(services, prompt, room, choosing, max_tokens, grammar), conversation.stop, conversation, count)


async def prompt_ids(
    services: Any, conversation: Conversation, field: str = "messages", places: Sequence[str] = ()
) -> list[int]:
    """The token ids of a conversation, which the client gave as `field`, made beside the event loop. Raises BadRequest.

    `places`: where in the client's request each message stood, if not in messages[i]: errors name it.
    """
    try:
        prompt = await asyncio.to_thread(prompt_of, conversation, services.ranks.text)
    except BadRequest as error:
        raise BadRequest(_place(error.message, places), _place(error.param, places), error.code, error.status) from None
    return await encode(services, field, prompt)


async def encode(services: Any, field: str, prompt: str) -> list[int]:
    """The token ids of a text, made beside the event loop. Raises BadRequest where it is much too long for `field`."""
    context = services.ranks.facts["context"]
    try:
        return await services.encoder.encode(services.ranks.text, prompt, context)
    except TooLong:
        raise _too_long(field, f"more than {context}", context) from None


def _place(text: str | None, places: Sequence[str]) -> Any:
    if text is None or not places:
        return text
    return re.sub(r"\bmessages\[(\d+)\]", lambda found: places[int(found[1])], text)


def raw(
    services: Any, prompt: Sequence[int], choosing: Choosing, max_tokens: int, stop: tuple[str, ...], count: int
) -> Wanted:
    """`count` continuations of a prompt of token ids. Raises BadRequest."""
    room = _room(services, "prompt", prompt)
    return Wanted(_work(services, prompt, room, choosing, max_tokens, None), stop, None, count)


def _room(services: Any, field: str, prompt: Sequence[int]) -> int:
    """Tokens that the answer to `prompt` may have. Raises BadRequest where none."""
    facts = services.ranks.facts
    _check_tokens(prompt, field, facts["vocab_size"])
    if not prompt:
        raise BadRequest(f"{field} must have at least one token", field)
    if len(prompt) >= facts["context"]:
        raise _too_long(field, str(len(prompt)), facts["context"])
    return facts["context"] - len(prompt)


def _too_long(field: str, tokens: str, context: int) -> BadRequest:
    return BadRequest(
        f"{field}: the prompt is too long: {tokens} tokens; this server's maximum context length is {context} tokens, "
        "prompt and answer together",
        field,
        "context_length_exceeded",
    )


def _work(
    services: Any, prompt: Sequence[int], room: int, choosing: Choosing, max_tokens: int | None, grammar: str | None
) -> Work:
    vocab_size = services.ranks.facts["vocab_size"]
    _check_tokens(choosing.logit_bias, "logit_bias", vocab_size)
    _check_tokens(choosing.stop_ids, "stop_token_ids", vocab_size)
    own = services.ranks.text.stop_ids
    # After the end of what a grammar allows there are only these: the answer would go on with them, unseen.
    ends = grammar is not None or not choosing.ignore_eos
    return Work(
        prompt=prompt,
        max_tokens=min(max_tokens or room, room),
        stop_ids=tuple(sorted({*(own if ends else ()), *choosing.stop_ids})),
        sampling=_sampling(choosing, _defaults(services.ranks.files)),
        grammar=grammar,
    )


def _check_tokens(ids: Any, param: str, vocab_size: int) -> None:
    outside = next((id for id in ids if not 0 <= id < vocab_size), None)
    if outside is not None:
        raise BadRequest(f"{param}: token {outside} is not in the vocabulary of {vocab_size}", param)


def _sampling(choosing: Choosing, default: Sampling) -> Sampling:
    said = {
        name: value
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(choosing, name)) is not None
    }
    if choosing.top_k is not None:
        said["top_k"] = max(choosing.top_k, 0)
    seed = secrets.randbits(63) if choosing.seed is None else choosing.seed
    return replace(default, **said, seed=seed, logprobs=choosing.logprobs, logit_bias=dict(choosing.logit_bias))


def _defaults(files: Mapping[str, str]) -> Sampling:
    """What generation_config.json recommends, and M3's own values for the rest."""
    try:
        config = json.loads(files.get("generation_config.json", "{}"))
        return Sampling(
            temperature=float(config.get("temperature", Sampling.temperature)),
            top_p=float(config.get("top_p", Sampling.top_p)),
            top_k=int(config.get("top_k", Sampling.top_k)),
        )
    except (ValueError, TypeError, AttributeError):
        return Sampling()


# ---------------------------------------------------------------------------------------------------------------------
# Answers under way


class Choice:
    """One answer under way."""

    def __init__(self, index: int, stream: Stream, answer: Answer, text: Text):
        self.index = index
        self.stream = stream
        self.answer = answer
        self.tokens = 0  # so far
        self.reasoning_tokens = 0  # of these
        self.finish_reason: Any = None  # "stop", "length" or "tool_calls" after the end
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._token_bytes = text.token_bytes

    @property
    def cached(self) -> int:
        """Tokens of the prompt that the ranks had kept."""
        return self.stream.cached or 0

    async def pieces(self) -> AsyncIterator["Piece"]:
        """Token by token what it adds, and last of all, without a token, what was held back."""
        async for token in self.stream:
            self.tokens += 1
            events = self.answer.feed(token.id)
            if any(isinstance(event, Reasoning) for event in events):
                self.reasoning_tokens = self.tokens
            yield Piece(self, events, token, self._offset(token.id))
            if self.answer.stopped:
                self.stream.complete()
                break
        events = self.answer.finish()
        self.finish_reason = self.answer.finish_reason(self.stream.finish or "stop")
        yield Piece(self, events)

    def _offset(self, id: int) -> int:
        """Characters of the answer before this token."""
        offset = self._length
        self._length += len(self._characters.decode(self._token_bytes(id)))
        return offset


@dataclass(frozen=True)
class Piece:
    """What one token adds to one answer; without a token: its end."""

    choice: Choice
    events: Sequence[Event]
    token: Token | None = None
    offset: int = 0


class Answers:
    """All answers to one HTTP request."""

    def __init__(self, prompts: Sequence[Wanted], choices: Sequence[Choice]):
        self.choices = choices
        self._prompts = prompts

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers as they come. Raises RequestFailed."""
        if len(self.choices) == 1:
            async for piece in self.choices[0].pieces():
                yield piece
            return
        arrived: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(_pass_on(choice, arrived)) for choice in self.choices]
        try:
            under_way = len(tasks)
            while under_way:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    under_way -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many answers it has."""
        return sum(len(wanted.work.prompt) for wanted in self._prompts)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, those that the ranks had kept from earlier requests."""
        firsts, at = 0, 0
        for wanted in self._prompts:
            firsts += self.choices[at].cached
            at += wanted.count
        return firsts

    @property
    def tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.reasoning_tokens for choice in self.choices)


async def _pass_on(choice: Choice, arrived: "asyncio.Queue[Piece | BaseException | None]") -> None:
    try:
        async for piece in choice.pieces():
            arrived.put_nowait(piece)
        arrived.put_nowait(None)
    except Exception as error:
        arrived.put_nowait(error)


def begin(services: Any, request: Request, prompts: Sequence[Wanted]) -> Answers:
    """Hand the ranks all that is wanted: answer i of a prompt has its seed + i. Raises Busy or Unavailable.

    What is begun ends with the HTTP request, see access.py.
    """
    text = services.ranks.text
    services.ranks.check(sum(wanted.count for wanted in prompts), request.state.client)  # all, or none
    choices: list[Choice] = []
    for wanted in prompts:
        for i in range(wanted.count):
            sampling = replace(wanted.work.sampling, seed=wanted.work.sampling.seed + i)
            stream = services.ranks.submit(replace(wanted.work, sampling=sampling), request.state.client)
            answer = Answer(text, wanted.conversation, wanted.stop)
            choices.append(Choice(len(choices), stream, answer, text))
    return Answers(prompts, choices)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens as text


def token_text(text: Text, id: int) -> tuple[str, list[int]]:
    """A token as log probabilities show it, and its bytes. Bytes that are no text by themselves read \\xe2\\x80."""
    token_bytes = text.token_bytes(id) or (text.tokenizer.id_to_token(id) or "").encode()
    try:
        return token_bytes.decode(), list(token_bytes)
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token_bytes), list(token_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# Responses


def whole(model: BaseModel) -> Response:
    """A complete answer; of the model's fields those that were set."""
    return Response(model.model_dump_json(exclude_unset=True, by_alias=True), media_type="application/json")


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """A server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def event_stream(events: AsyncIterator[bytes], failed: Callable[[str, int], bytes]) -> StreamingResponse:
    """`events` as a response; where they break off, `failed` makes the API's error event of reason and status."""
    return StreamingResponse(
        _told(events, failed),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _told(events: AsyncIterator[bytes], failed: Callable[[str, int], bytes]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield event
    except RequestFailed as error:  # the status is sent already
        yield failed(error.message, error.status)
