"""OpenAI's API: /v1/chat/completions, /v1/completions and /v1/models, streamed and whole."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request, Response

from m3dist.gateway.answer import Content, Event, Reasoning, ToolCall
from m3dist.gateway.answering import (
    Answers,
    Choosing,
    Piece,
    begin,
    chat,
    check_count,
    encode,
    event_stream,
    find_model,
    raw,
    sse,
    token_text,
    whole,
)
from m3dist.gateway.body import JsonRoute, parse_object
from m3dist.gateway.chat import Conversation
from m3dist.gateway.errors import BadRequest, body_for
from m3dist.gateway.ranks import Token
from m3dist.gateway.schemas_openai import (
    REFUSED,
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    ChoiceLogprobs,
    Completing,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionTokensDetails,
    FunctionAnswered,
    ModelCard,
    ModelList,
    OpenAIError,
    PromptTokensDetails,
    ResponseFormat,
    Sampled,
    TokenLogprob,
    Tool,
    ToolCallAnswered,
    TopLogprob,
    Usage,
    refuse,
)
from m3dist.text import Text

EVENTS = {"type": "string"}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "the answer; with stream, its events",
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": OpenAIError, "description": "the request cannot be answered"},
    500: {"model": OpenAIError, "description": "the request was taken, and failed"},
    503: {"model": OpenAIError, "description": "no request is taken now; Retry-After says when"},
    504: {"model": OpenAIError, "description": "the answer took longer than the server allows"},
}
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions
STARTED = int(time.time())

router = APIRouter(route_class=JsonRoute, responses=ERRORS, tags=["OpenAI"])


# ---------------------------------------------------------------------------------------------------------------------
# Chat completions


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    services = request.app.state.services
    model = find_model(services, body.model)
    refuse(body, REFUSED)
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    conversation = conversation_of(body, services.options.thinking)
    max_tokens = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    wanted = await chat(services, request, conversation, choosing_of(body, logprobs), max_tokens, body.n or 1)
    answers = begin(services, request, [wanted])
    head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}
    text = services.ranks.text
    if body.stream:
        return event_stream(_chat_events(answers, body, head, text), _error_event)
    return whole(await _chat_completion(answers, head, text))


def conversation_of(body: ChatRequest, thinking: str) -> Conversation:
    """What a chat request asks, in the chat template's terms. `thinking`: the mode where it does not say."""
    messages = [_template_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    return Conversation(
        messages=messages,
        tools=[template_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        thinking=_thinking(body, thinking),
        response_format=_response_format(body.response_format),
        stop=body.stop_strings,
    )


def _template_message(message: ChatMessage, path: str) -> dict[str, Any]:
    """A message as chat templates read it: arguments of tool calls as mappings."""
    made: dict[str, Any] = {"role": message.role}
    parts = message.content
    made["content"] = parts if isinstance(parts, str) else [part.model_dump() for part in parts or ()]
    if (reasoning := message.reasoning_content or message.reasoning) is not None and message.role == "assistant":
        made["reasoning_content"] = reasoning
    if message.tool_calls:
        made["tool_calls"] = [
            template_call(call.id, call.function.name, call.function.arguments, f"{path}.tool_calls[{i}].function")
            for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    return made


def template_call(id: str | None, name: str, arguments: str | Mapping[str, Any], path: str) -> dict[str, Any]:
    """A tool call of the conversation so far. Raises BadRequest where `arguments` are no JSON object."""
    if isinstance(arguments, str):
        try:
            arguments = parse_object(arguments or "{}")
        except BadRequest as error:
            raise BadRequest(f"{path}.arguments: {error.message}", f"{path}.arguments") from None
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def template_tool(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates show it to the model: what says nothing is left out."""
    return {"type": "function", "function": tool.function.model_dump(exclude={"strict"}, exclude_none=True)}


def _tool_choice(body: ChatRequest) -> Any:
    choice = body.tool_choice
    return (choice or "auto") if isinstance(choice, str | None) else {"name": choice.function.name}


def _thinking(body: ChatRequest, default: str) -> str:
    """The template's own option first, then OpenAI's."""
    options = body.chat_template_kwargs
    if options and options.thinking_mode is not None:
        return options.thinking_mode
    if options and options.enable_thinking is not None:
        return "enabled" if options.enable_thinking else "disabled"
    return thinking_of(body.reasoning_effort, default)


def thinking_of(effort: str | None, default: str) -> str:
    """M3 has no degrees: any effort but "none" is thinking."""
    return default if effort is None else "disabled" if effort == "none" else "enabled"


def _response_format(format: ResponseFormat | None) -> dict[str, Any] | None:
    if format is None or format.type == "text":
        return None
    if format.json_schema is None or format.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "schema": format.json_schema.schema_}


def choosing_of(body: Sampled, logprobs: int | None) -> Choosing:
    return Choosing(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        logprobs=logprobs,
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
    )


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for name in bias:
        if not (name.isascii() and name.isdecimal() and len(name) <= 10):
            raise BadRequest(f"logit_bias: {name[:100]!r} is no token id", "logit_bias")
    return {int(name): value for name, value in bias.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Chat completions: answers


async def _chat_completion(answers: Answers, head: Mapping[str, Any], text: Text) -> ChatCompletion:
    events: list[list[Event]] = [[] for _ in answers.choices]
    logprobs: list[list[TokenLogprob]] = [[] for _ in answers.choices]
    async for piece in answers.pieces():
        events[piece.choice.index] += piece.events
        logprobs[piece.choice.index] += token_logprobs(piece.token, text)
    choices = [
        ChatChoice(
            index=choice.index,
            message=_message(events[choice.index]),
            logprobs=ChoiceLogprobs(content=shown) if (shown := logprobs[choice.index]) else None,
            finish_reason=choice.finish_reason,
        )
        for choice in answers.choices
    ]
    return ChatCompletion(**head, object="chat.completion", choices=choices, usage=usage_of(answers))


def _message(events: Sequence[Event]) -> AnswerMessage:
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls = [_answered(event) for event in events if isinstance(event, ToolCall)]
    said: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    said |= {"reasoning_content": reasoning} if reasoning else {}
    said |= {"tool_calls": calls} if calls else {}
    return AnswerMessage(**said)


def _answered(call: ToolCall) -> ToolCallAnswered:
    function = FunctionAnswered(name=call.name, arguments=arguments(call))
    return ToolCallAnswered(id=call.id, type="function", function=function)


def arguments(call: ToolCall) -> str:
    """A call's arguments as OpenAI's API has them: JSON as text."""
    return json.dumps(call.arguments, ensure_ascii=False)


def token_logprobs(token: Token | None, text: Text) -> list[TokenLogprob]:
    if token is None or token.logprob is None:
        return []
    top = [_top_logprob(text, id, logprob) for id, logprob in token.top or ()]
    chosen = _top_logprob(text, token.id, token.logprob)
    return [TokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)]


def _top_logprob(text: Text, id: int, logprob: float) -> TopLogprob:
    shown, token_bytes = token_text(text, id)
    return TopLogprob(token=shown, logprob=logprob, bytes=token_bytes)


def usage_of(answers: Answers) -> Usage:
    return Usage(
        prompt_tokens=answers.prompt_tokens,
        completion_tokens=answers.tokens,
        total_tokens=answers.prompt_tokens + answers.tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=answers.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=answers.reasoning_tokens),
    )


async def _chat_events(
    answers: Answers, body: ChatRequest, head: Mapping[str, Any], text: Text
) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk"}
    usage = {"usage": None} if _includes_usage(body) else {}

    def chunk(piece: Piece, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> bytes:
        choice = {"index": piece.choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return sse({**head, "choices": [choice], **usage})

    for choice in answers.choices:
        yield chunk(Piece(choice, ()), {"role": "assistant", "content": ""})
    async for piece in answers.pieces():
        deltas = [delta for event in piece.events for delta in _deltas(event)]
        logprobs = [entry.model_dump() for entry in token_logprobs(piece.token, text)]
        if logprobs:
            yield chunk(piece, deltas.pop(0) if deltas else {"content": ""}, {"content": logprobs})
        for delta in deltas:
            yield chunk(piece, delta)
        if piece.token is None:
            yield chunk(piece, {}, finish_reason=piece.choice.finish_reason)
    if usage:
        yield sse({**head, "choices": [], "usage": usage_of(answers).model_dump()})
    yield b"data: [DONE]\n\n"


def _includes_usage(body: Completing) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _deltas(event: Event) -> Iterator[dict[str, Any]]:
    """A tool call comes whole: its arguments are known when the last of them is."""
    if isinstance(event, Reasoning):
        yield {"reasoning_content": event.text}
    elif isinstance(event, Content):
        yield {"content": event.text}
    else:
        begun = {"index": event.index, "id": event.id, "type": "function"}
        yield {"tool_calls": [{**begun, "function": {"name": event.name, "arguments": ""}}]}
        yield {"tool_calls": [{"index": event.index, "function": {"arguments": arguments(event)}}]}


def _error_event(message: str, status: int) -> bytes:
    return sse(body_for("/v1/chat/completions", status, message))


# ---------------------------------------------------------------------------------------------------------------------
# Completions


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    services = request.app.state.services
    model = find_model(services, body.model)
    refuse(body, REFUSED)
    if body.echo and body.logprobs is not None:
        raise BadRequest("echo cannot go with logprobs: m3dist gives log probabilities of answers only", "echo")
    prompts, count = _prompts(body.prompt), body.n or 1
    check_count(services, request, count, len(prompts))
    text, choosing = services.ranks.text, choosing_of(body, body.logprobs)
    most = body.max_tokens or DEFAULT_COMPLETION_TOKENS
    encoded = [await encode(services, "prompt", each) if isinstance(each, str) else each for each in prompts]
    wanted = [raw(services, ids, choosing, most, body.stop_strings, count) for ids in encoded]
    echoed = [_echo(text, prompt) if body.echo else "" for prompt in prompts for _ in range(count)]
    answers = begin(services, request, wanted)
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}
    if body.stream:
        return event_stream(_completion_events(answers, body, head, echoed, text), _error_event)
    return whole(await _completion(answers, head, echoed, text))


def _prompts(prompt: Any) -> list[str | list[int]]:
    """One prompt, or several, each a text or its token ids."""
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if single else list(prompt)


def _echo(text: Text, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else text.decode(prompt)


async def _completion(answers: Answers, head: Mapping[str, Any], echoed: Sequence[str], text: Text) -> Completion:
    pieces: list[list[Piece]] = [[] for _ in answers.choices]
    async for piece in answers.pieces():
        pieces[piece.choice.index].append(piece)
    choices = [
        CompletionChoice(
            index=choice.index,
            text=echoed[choice.index] + _text_of(pieces[choice.index]),
            logprobs=_completion_logprobs(pieces[choice.index], text),
            finish_reason=choice.finish_reason,
        )
        for choice in answers.choices
    ]
    return Completion(**head, choices=choices, usage=usage_of(answers))


async def _completion_events(
    answers: Answers, body: CompletionRequest, head: Mapping[str, Any], echoed: Sequence[str], text: Text
) -> AsyncIterator[bytes]:
    usage = {"usage": None} if _includes_usage(body) else {}

    def chunk(index: int, shown: str, logprobs: CompletionLogprobs | None = None, finish: str | None = None) -> bytes:
        listed = logprobs.model_dump() if logprobs else None
        choice = {"index": index, "text": shown, "logprobs": listed, "finish_reason": finish}
        return sse({**head, "choices": [choice], **usage})

    for choice in answers.choices:
        if echoed[choice.index]:
            yield chunk(choice.index, echoed[choice.index])
    async for piece in answers.pieces():
        shown, logprobs, finish = _text_of([piece]), _completion_logprobs([piece], text), piece.choice.finish_reason
        if shown or logprobs or piece.token is None:
            yield chunk(piece.choice.index, shown, logprobs, finish)
    if usage:
        yield sse({**head, "choices": [], "usage": usage_of(answers).model_dump()})
    yield b"data: [DONE]\n\n"


def _text_of(pieces: Sequence[Piece]) -> str:
    return "".join(event.text for piece in pieces for event in piece.events if isinstance(event, Content))


def _completion_logprobs(pieces: Sequence[Piece], text: Text) -> CompletionLogprobs | None:
    """The likeliest tokens of each place, and the chosen one among them as OpenAI has it; None if none were asked."""
    tokens = [(piece, piece.token) for piece in pieces if piece.token and piece.token.logprob is not None]
    if not tokens:
        return None
    chosen = [_top_logprob(text, token.id, token.logprob or 0.0) for _, token in tokens]
    top = [[_top_logprob(text, id, logprob) for id, logprob in token.top or ()] for _, token in tokens]
    return CompletionLogprobs(
        tokens=[token.token for token in chosen],
        token_logprobs=[token.logprob for token in chosen],
        top_logprobs=[{one.token: one.logprob for one in [*likeliest, own]} for likeliest, own in zip(top, chosen)],
        text_offset=[piece.offset for piece, _ in tokens],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> Response:
    services = request.app.state.services
    cards = [_card(services, name) for name in services.models]
    first, last = (cards[0].id, cards[-1].id) if cards else (None, None)
    return whole(ModelList(object="list", data=cards, has_more=False, first_id=first, last_id=last))


@router.get("/v1/models/{model:path}", response_model=ModelCard)
async def get_model(request: Request, model: str) -> Response:
    services = request.app.state.services
    return whole(_card(services, find_model(services, model)))


def _card(services: Any, name: str) -> ModelCard:
    facts = services.ranks.facts
    return ModelCard(
        id=name,
        object="model",
        created=STARTED,
        owned_by="m3dist",
        max_model_len=facts["context"] if facts else None,
        type="model",
        display_name=name,
        created_at=datetime.fromtimestamp(STARTED, timezone.utc).isoformat().replace("+00:00", "Z"),
    )


def new_id(prefix: str) -> str:
    """An identifier that no other answer has."""
    return f"{prefix}{secrets.token_hex(12)}"
