"""OpenAI's /v1/responses, streamed and whole. Nothing is kept: each request brings its whole conversation."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse

from m3dist.gateway.answer import Content, Event, Reasoning
from m3dist.gateway.answering import Answers, Piece, begin, chat, event_stream, find_model, sse, whole
from m3dist.gateway.body import JsonRoute
from m3dist.gateway.chat import Conversation
from m3dist.gateway.openai_api import (
    ERRORS,
    STREAMED,
    arguments,
    choosing_of,
    new_id,
    template_call,
    thinking_of,
    token_logprobs,
)
from m3dist.gateway.schemas_openai import refuse
from m3dist.gateway.schemas_responses import (
    REFUSED,
    FunctionTool,
    InputCall,
    InputCallOutput,
    InputMessage,
    InputReasoning,
    InputText,
    Response,
    ResponseRequest,
    TextFormat,
)
from m3dist.text import Text

LOGPROBS = "message.output_text.logprobs"  # in `include`: show them

router = APIRouter(route_class=JsonRoute, responses=ERRORS, tags=["OpenAI"])


@router.post("/v1/responses", response_model=Response, responses=STREAMED)
async def create_response(request: Request, body: ResponseRequest) -> HttpResponse:
    services = request.app.state.services
    find_model(services, body.model)
    refuse(body, REFUSED)
    shows_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or ())
    choosing = choosing_of(body, body.top_logprobs or 0 if shows_logprobs else None)
    conversation, places = conversation_of(body, services.options.thinking)
    wanted = await chat(services, request, conversation, choosing, body.max_output_tokens, field="input", places=places)
    made = Making(body, begin(services, request, [wanted]), services.ranks.text)
    if body.stream:
        return event_stream(made.events(), made.failed)
    return whole(await made.whole())


# ---------------------------------------------------------------------------------------------------------------------
# What is asked


def conversation_of(body: ResponseRequest, thinking: str) -> tuple[Conversation, list[str]]:
    """What a request asks, in the chat template's terms; and where each message stood in it.

    `thinking`: the mode where the request does not say.
    """
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if body.instructions:
        messages.append({"role": "developer", "content": body.instructions})
        places.append("instructions")
    for i, item in enumerate(items):
        _add_item(messages, item, f"input[{i}]")
        places += [f"input[{i}]"] * (len(messages) - len(places))
    choice = body.tool_choice
    conversation = Conversation(
        messages=messages,
        tools=[_template_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=(choice or "auto") if isinstance(choice, str | None) else {"name": choice.name},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        thinking=thinking_of(body.reasoning.effort if body.reasoning else None, thinking),
        response_format=_response_format(body.text.format if body.text else None),
    )
    return conversation, places


def _add_item(messages: list[dict[str, Any]], item: Any, path: str) -> None:
    """Add an input item to messages as chat templates read them: what the model said in one turn is one message."""
    if isinstance(item, InputCallOutput):
        messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
    elif isinstance(item, InputMessage) and item.role != "assistant":
        messages.append({"role": item.role, "content": _text(item.content)})
    else:
        _add_to_turn(messages, item, path)


def _add_to_turn(messages: list[dict[str, Any]], item: InputMessage | InputReasoning | InputCall, path: str) -> None:
    """Add to the assistant's message at the end, or begin one: reasoning, then text, then calls."""
    turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if isinstance(item, InputReasoning):
        reasoning = "".join(part.text for part in item.content or ())
        messages.append({"role": "assistant", "reasoning_content": reasoning, "content": ""})
    elif isinstance(item, InputMessage):
        if turn is None or turn["content"] or "tool_calls" in turn:
            messages.append(turn := {"role": "assistant"})
        turn["content"] = _text(item.content)
    else:
        if turn is None:
            messages.append(turn := {"role": "assistant", "content": ""})
        turn.setdefault("tool_calls", []).append(template_call(item.call_id, item.name, item.arguments, path))


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _template_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type", "strict"}, exclude_none=True)}


def _response_format(format: TextFormat | None) -> dict[str, Any] | None:
    if format is None or format.type == "text":
        return None
    return {"type": format.type} | ({"schema": format.schema_} if format.type == "json_schema" else {})


# ---------------------------------------------------------------------------------------------------------------------
# What is answered


class Making:
    """A response that is being made. Its events, and what it is in the end, are made by the same steps."""

    def __init__(self, body: ResponseRequest, answers: Answers, text: Text):
        self._answers, self._text = answers, text
        self._output: list[dict[str, Any]] = []
        self._open: str | None = None  # the last item's type, while more of it may come
        self._pending: list[dict[str, Any]] = []  # log probabilities of tokens whose text is held back
        self._sent = 0
        self._response = _echo(body) | {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "output": self._output,
            "error": None,
            "incomplete_details": None,
            "usage": None,
        }

    async def whole(self) -> Response:
        async for piece in self._answers.pieces():
            for _ in self._take(piece):
                pass
        self._end()
        return Response(**self._response)

    async def events(self) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        async for piece in self._answers.pieces():
            for event in self._take(piece):
                yield event
        self._end()
        yield self._event(f"response.{self._response['status']}", response=self._response)

    def failed(self, message: str, status: int) -> bytes:
        """The last event of a response that is not completed."""
        code = "server_error" if status >= 500 else "invalid_prompt"  # of OpenAI's codes the one for a client's fault
        self._response |= {"status": "failed", "error": {"code": code, "message": message}}
        return self._event("response.failed", response=self._response)

    def _event(self, type: str, **values: Any) -> bytes:
        self._sent += 1
        return sse({"type": type, "sequence_number": self._sent - 1, **values}, type)

    def _end(self) -> None:
        answers = self._answers
        cut = answers.choices[0].finish_reason == "length"
        self._response["status"] = "incomplete" if cut else "completed"
        self._response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self._response["usage"] = {
            "input_tokens": answers.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answers.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answers.tokens,
            "output_tokens_details": {"reasoning_tokens": answers.reasoning_tokens},
            "total_tokens": answers.prompt_tokens + answers.tokens,
        }

    def _take(self, piece: Piece) -> Iterator[bytes]:
        self._pending += [entry.model_dump() for entry in token_logprobs(piece.token, self._text)]
        for event in piece.events:
            yield from self._take_event(event)
        if piece.token is None:
            yield from self._close("incomplete" if piece.choice.finish_reason == "length" else "completed")

    def _take_event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Reasoning):
            yield from self._add("reasoning", "reasoning_text", event.text)
        elif isinstance(event, Content):
            yield from self._add("message", "output_text", event.text)
        else:
            yield from self._close("completed")
            item = {"type": "function_call", "id": new_id("fc_"), "call_id": event.id, "name": event.name}
            item |= {"status": "in_progress", "arguments": ""}
            yield from self._begin(item)
            item["arguments"] = arguments(event)
            yield self._of_item("response.function_call_arguments.delta", delta=item["arguments"])
            yield self._of_item("response.function_call_arguments.done", arguments=item["arguments"])
            yield from self._close("completed")
        self._pending = []

    def _add(self, kind: str, part_type: str, text: str) -> Iterator[bytes]:
        """More of a message, or of reasoning."""
        if self._open != kind:
            yield from self._close("completed")
            yield from self._begin(_message() if kind == "message" else _reasoning())
            part = _part(part_type)
            yield self._of_item("response.content_part.added", content_index=0, part=part)
            self._output[-1]["content"] = [part]
        part = self._output[-1]["content"][0]
        part["text"] += text
        logprobs = {"logprobs": self._pending} if kind == "message" else {}
        if kind == "message":
            part["logprobs"] += self._pending
        yield self._of_item(f"response.{part_type}.delta", content_index=0, delta=text, **logprobs)

    def _begin(self, item: dict[str, Any]) -> Iterator[bytes]:
        self._output.append(item)
        self._open = item["type"]
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close(self, status: str) -> Iterator[bytes]:
        """No more of the item that is open, if one is."""
        if self._open is None:
            return
        self._open, item = None, self._output[-1]
        item["status"] = status
        for part in item.get("content", ()):
            logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._of_item(f"response.{part['type']}.done", content_index=0, text=part["text"], **logprobs)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _of_item(self, type: str, **values: Any) -> bytes:
        return self._event(type, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **values)


def _echo(body: ResponseRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    choice = body.tool_choice
    return {
        "model": body.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None},
        "store": False,
        "temperature": body.temperature,
        "text": (body.text.model_dump(exclude_unset=True, by_alias=True) if body.text else None)
        or {"format": {"type": "text"}},
        "tool_choice": (choice or "auto") if isinstance(choice, str | None) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
    }


def _message() -> dict[str, Any]:
    head = {"type": "message", "id": new_id("msg_"), "status": "in_progress"}
    return {**head, "role": "assistant", "content": []}


def _reasoning() -> dict[str, Any]:
    head = {"type": "reasoning", "id": new_id("rs_"), "status": "in_progress"}
    return {**head, "summary": [], "content": []}


def _part(type: str) -> dict[str, Any]:
    more: Mapping[str, Any] = {"annotations": [], "logprobs": []} if type == "output_text" else {}
    return {"type": type, "text": "", **more}
