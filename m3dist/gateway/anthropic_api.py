"""Anthropic's API: /v1/messages, streamed and whole, and /v1/messages/count_tokens.

Thinking is off unless it is asked for, as there: clients that did not ask read the first block as text.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from m3dist.gateway.answer import Content, Event, Reasoning, ToolCall
from m3dist.gateway.answering import Answers, Choosing, begin, chat, event_stream, find_model, prompt_ids, sse, whole
from m3dist.gateway.body import JsonRoute
from m3dist.gateway.chat import Conversation
from m3dist.gateway.errors import BadRequest, body_for
from m3dist.gateway.openai_api import STREAMED, arguments, new_id
from m3dist.gateway.schemas_anthropic import (
    REFUSED,
    AnthropicError,
    AnthropicTool,
    CountRequest,
    Message,
    MessageAnswer,
    MessageRequest,
    NamedToolChoice,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    TokenCount,
    ToolResultBlock,
    ToolUseBlock,
)
from m3dist.gateway.schemas_openai import refuse

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": AnthropicError, "description": "the request cannot be answered"},
    500: {"model": AnthropicError, "description": "the request was taken, and failed"},
    503: {"model": AnthropicError, "description": "no request is taken now; Retry-After says when"},
    504: {"model": AnthropicError, "description": "the answer took longer than the server allows"},
}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

router = APIRouter(route_class=JsonRoute, responses=ERRORS, tags=["Anthropic"])


@router.post("/v1/messages", response_model=MessageAnswer, responses=STREAMED)
async def create_message(request: Request, body: MessageRequest) -> Response:
    services = request.app.state.services
    model = find_model(services, body.model)
    refuse(body, REFUSED)
    conversation, places = conversation_of(body, tuple(body.stop_sequences or ()))
    choosing = Choosing(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
    wanted = await chat(services, request, conversation, choosing, body.max_tokens, places=places)
    answers = begin(services, request, [wanted])
    head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
    if body.stream:
        return event_stream(_events(answers, head), _error_event)
    return whole(await _message(answers, head))


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count_tokens(request: Request, body: CountRequest) -> Response:
    services = request.app.state.services
    find_model(services, body.model)
    refuse(body, REFUSED)
    services.ranks.check(0)
    conversation, places = conversation_of(body)
    prompt = await prompt_ids(services, conversation, places=places)
    return whole(TokenCount(input_tokens=len(prompt)))


# ---------------------------------------------------------------------------------------------------------------------
# What is asked


def conversation_of(body: CountRequest, stop: tuple[str, ...] = ()) -> tuple[Conversation, list[str]]:
    """What a request asks, in the chat template's terms; and where each message stood in it. Raises BadRequest."""
    if body.messages[-1].role == "assistant":
        raise BadRequest("messages: the last must be the user's; the model begins its own", "messages")
    messages = [{"role": "system", "content": _text(body.system)}] if body.system else []
    places = ["system"] if body.system else []
    for i, message in enumerate(body.messages):
        messages += _template_messages(message, f"messages[{i}]")
        places += [f"messages[{i}]"] * (len(messages) - len(places))
    choice, format = body.tool_choice, body.output_config.format if body.output_config else None
    conversation = Conversation(
        messages=messages,
        tools=[_template_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        thinking=body.thinking.type if body.thinking else "disabled",
        response_format={"type": "json_schema", "schema": format.schema_} if format else None,
        stop=stop,
    )
    return conversation, places


def _tool_choice(body: CountRequest) -> Any:
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        return {"name": choice.name}
    return TOOL_CHOICES[choice.type] if choice else "auto"


def _template_tool(tool: AnthropicTool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description is not None else {}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}


def _template_messages(message: Message, path: str) -> list[dict[str, Any]]:
    """A message as chat templates read it: results of tools are messages of their own, before the user's text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    allowed = {
        "user": (TextBlock, ToolResultBlock),
        "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
        "system": (TextBlock,),
    }[message.role]
    for i, block in enumerate(message.content):
        if not isinstance(block, allowed):
            where = f"{path}.content[{i}]"
            raise BadRequest(f"{where}: a message of role {message.role} cannot have {block.type} blocks", where)
    results = [_tool_message(block) for block in message.content if isinstance(block, ToolResultBlock)]
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    made: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
    if thoughts := [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]:
        made["reasoning_content"] = "".join(thoughts)
    if calls := [_template_call(block) for block in message.content if isinstance(block, ToolUseBlock)]:
        made["tool_calls"] = calls
    return [*results, made] if texts or not results else results


def _template_call(block: ToolUseBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _tool_message(block: ToolResultBlock) -> dict[str, Any]:
    """The template cannot say that a result is an error: where nothing else does, its text does."""
    content = _text(block.content or "") or ("error" if block.is_error else "")
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


# ---------------------------------------------------------------------------------------------------------------------
# What is answered


async def _message(answers: Answers, head: dict[str, Any]) -> MessageAnswer:
    blocks: list[dict[str, Any]] = []
    async for piece in answers.pieces():
        for event in piece.events:
            if isinstance(event, ToolCall) or not blocks or blocks[-1]["type"] != _kind(event):
                blocks.append(_block(event))
            _add(blocks[-1], event)
    made: dict[str, Any] = {**head, "content": blocks, **_stop(answers), "usage": _usage(answers)}
    return MessageAnswer(**made)


async def _events(answers: Answers, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """The message begins with its first token: then it is known how much of the prompt was in the cache."""
    last: dict[str, Any] | None = None
    index, begun = -1, False
    async for piece in answers.pieces():
        if not begun:
            begun = True
            started = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(answers)}
            yield _event("message_start", message=started)
        for event in piece.events:
            if isinstance(event, ToolCall) or last is None or last["type"] != _kind(event):
                for closing in _closing(last, index):
                    yield closing
                index, last = index + 1, _block(event)
                yield _event("content_block_start", index=index, content_block=last)
            yield _event("content_block_delta", index=index, delta=_delta(event))
    for closing in _closing(last, index):
        yield closing
    yield _event("message_delta", delta=_stop(answers), usage=_usage(answers))
    yield _event("message_stop")


def _closing(block: dict[str, Any] | None, index: int) -> Iterator[bytes]:
    if block is None:
        return
    if block["type"] == "thinking":
        yield _event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
    yield _event("content_block_stop", index=index)


def _kind(event: Event) -> str:
    return "thinking" if isinstance(event, Reasoning) else "text" if isinstance(event, Content) else "tool_use"


def _block(event: Event) -> dict[str, Any]:
    """The block that begins with `event`, still empty."""
    if isinstance(event, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    if isinstance(event, Content):
        return {"type": "text", "text": "", "citations": None}
    return {"type": "tool_use", "id": event.id.replace("call_", "toolu_"), "name": event.name, "input": {}}


def _add(block: dict[str, Any], event: Event) -> None:
    if isinstance(event, ToolCall):
        block["input"] = event.arguments
    else:
        block[block["type"]] += event.text


def _delta(event: Event) -> dict[str, Any]:
    if isinstance(event, Reasoning):
        return {"type": "thinking_delta", "thinking": event.text}
    if isinstance(event, Content):
        return {"type": "text_delta", "text": event.text}
    return {"type": "input_json_delta", "partial_json": arguments(event)}


def _stop(answers: Answers) -> dict[str, Any]:
    choice = answers.choices[0]
    if choice.answer.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.answer.stop_string}
    return {"stop_reason": STOP_REASONS[choice.finish_reason], "stop_sequence": None}


def _usage(answers: Answers) -> dict[str, Any]:
    return {
        "input_tokens": answers.prompt_tokens - answers.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answers.cached_tokens,
        "output_tokens": answers.tokens,
    }


def _event(type: str, **values: Any) -> bytes:
    return sse({"type": type, **values}, type)


def _error_event(message: str, status: int) -> bytes:
    return sse(body_for("/v1/messages", status, message), "error")
