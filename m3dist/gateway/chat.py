"""A conversation as all APIs give it, the prompt it makes, and the grammar that its answer must follow. No MLX."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3dist.gateway import grammars
from m3dist.gateway.errors import BadRequest
from m3dist.gateway.parameters import Schema
from m3dist.text import Text, TextError

ROLES = ("root", "system", "developer", "user", "assistant", "tool")  # root replaces M3's built-in identity
INSTRUCTING = ("root", "system", "developer")
TOOL_NAME = re.compile(r"""[^\s"'<>]{1,256}""")  # what can stand in <invoke name="...">


@dataclass
class Conversation:
    """What a client said, in the chat template's form, and what it wants of the answer."""

    messages: list[dict[str, Any]]  # role, content (text or text parts), reasoning_content, tool_calls
    tools: list[dict[str, Any]] | None = None  # {"type": "function", "function": {name, description, parameters}}
    tool_choice: str | dict[str, Any] = "auto"  # none, auto, required, or {"name": the tool to call}
    parallel_tool_calls: bool = True
    thinking: str = "adaptive"  # one of options.THINKING
    response_format: dict[str, Any] | None = None  # {"type": "json_object"}, {"type": "json_schema", "schema": {...}}
    stop: tuple[str, ...] = ()

    @property
    def may_call(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def schemas(self) -> dict[str, Schema]:
        """Name of each tool -> JSON schema of its parameters."""
        functions = [tool["function"] for tool in self.tools or []]
        return {function["name"]: function.get("parameters") or {} for function in functions}


def prompt_of(conversation: Conversation, text: Text) -> str:
    """The conversation as the model reads it, up to where the answer begins. Raises BadRequest, naming the field.

    With tool_choice "none" the model is not shown the tools, so that it does not try to call them.
    """
    _check_tools(conversation)
    _check_messages(conversation.messages)
    messages = _results_in_order(_instructions_joined(conversation.messages))
    try:
        return text.render(messages, conversation.thinking, conversation.tools if conversation.may_call else None)
    except TextError as error:
        raise BadRequest(str(error), "messages") from None


def grammar_of(conversation: Conversation) -> str | None:
    """The grammar, in llguidance's Lark, that the answer must follow; None: any text. Raises BadRequest.

    It is needed for a response_format and where a tool must be called. With tools that may be called and a
    response_format, the answer is either tool calls or of that format.
    """
    _check_tools(conversation)
    choice = conversation.tool_choice
    forced = conversation.may_call and choice != "auto"
    if not forced and conversation.response_format is None:
        return None
    answers = []
    if conversation.may_call:
        named = choice["name"] if isinstance(choice, dict) else None
        schemas = {name: schema for name, schema in conversation.schemas().items() if named in (None, name)}
        answers.append(grammars.tool_calls(schemas, conversation.parallel_tool_calls))
    if not forced:
        answers.append(grammars.json_text(_format_schema(conversation.response_format or {})))
    param = "tools" if forced else "response_format"
    return grammars.checked(grammars.whole_answer(conversation.thinking, answers), param)


def _format_schema(response_format: Mapping[str, Any]) -> Schema | bool:
    """The JSON schema that the content must meet."""
    kind = response_format.get("type")
    if kind == "json_object":
        return {"type": "object"}
    schema = response_format.get("schema")
    if kind != "json_schema":
        raise BadRequest(f"response_format: no such type: {kind!r}", "response_format.type")
    if not isinstance(schema, Mapping | bool):
        raise BadRequest("response_format: its schema must be a JSON object", "response_format")
    return schema


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def _check_messages(messages: Sequence[Any]) -> None:
    if not messages:
        raise BadRequest("messages: must not be empty", "messages")
    calls: list[Any] | None = None  # of the assistant message that tool messages may answer
    opening = True  # no turn yet, only instructions
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise BadRequest(f"{place}: no such role: {role!r}; use one of {', '.join(ROLES)}", f"{place}.role")
        _check_place(role, index, opening, place)
        _check_content(message, place)
        if role == "assistant":
            calls = _check_calls(message, place)
        elif role == "tool":
            _check_result(message, calls, place)
        else:
            calls = None
        opening = opening and role in INSTRUCTING


def _check_place(role: str, index: int, opening: bool, place: str) -> None:
    """The template passes over a root or system message that it does not expect, in silence."""
    if role == "root" and index > 0:
        raise BadRequest(f"{place}: a root message can only be the first", f"{place}.role")
    if role in INSTRUCTING and not opening:
        raise BadRequest(
            f"{place}: M3 reads {role} messages only at the start of a conversation; put it there, or give it the "
            "role user",
            f"{place}.role",
        )


def _check_content(message: Mapping[str, Any], place: str) -> None:
    content = message.get("content")
    if content is None and message["role"] == "assistant" or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise BadRequest(f"{place}.content: must be text or a list of text parts", f"{place}.content")
    for number, part in enumerate(content):
        where = f"{place}.content[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise BadRequest(
                f"{where}: this server takes text only, no images, sound, video or files; it got {kind!r}", where
            )
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}.text: must be text", f"{where}.text")


def _check_calls(message: Mapping[str, Any], place: str) -> list[Any] | None:
    """The tool calls of an assistant message; None if it has none."""
    calls = message.get("tool_calls")
    if calls is None:
        return None
    if not isinstance(calls, list):
        raise BadRequest(f"{place}.tool_calls: must be a list", f"{place}.tool_calls")
    for number, call in enumerate(calls):
        where = f"{place}.tool_calls[{number}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise BadRequest(f"{where}.function: must be an object", f"{where}.function")
        _check_name(function.get("name"), f"{where}.function.name")
        if not isinstance(function.get("arguments"), Mapping):
            field = f"{where}.function.arguments"
            raise BadRequest(f"{field}: must be a JSON object, for the template names its members", field)
    return calls or None


def _check_result(message: Mapping[str, Any], calls: list[Any] | None, place: str) -> None:
    if calls is None:
        raise BadRequest(f"{place}: a tool message must follow an assistant message with tool_calls", place)
    ids = [call["id"] for call in calls if call.get("id") is not None]
    id = message.get("tool_call_id")
    if id is not None and ids and id not in ids:
        field = f"{place}.tool_call_id"
        raise BadRequest(f"{field}: the assistant message before it has no call {id!r}", field)


def _instructions_joined(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with all system and developer messages as one: the template reads one and drops the others."""
    told = [message for message in messages if message["role"] in ("system", "developer")]
    if len(told) < 2:
        return list(messages)
    joined = {**told[0], "content": "\n\n".join(_plain(message["content"]) for message in told)}
    root = [message for message in messages if message["role"] == "root"]
    return [*root, joined, *messages[len(root) + len(told) :]]


def _plain(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _results_in_order(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, tool messages in the order of the calls that they answer: the template shows the model no ids."""
    keys: list[tuple[int, int]] = []  # (message that is not a tool's, number of the call)
    numbers: dict[Any, int] = {}
    for message in messages:
        if message["role"] == "tool":
            keys.append((keys[-1][0], 1 + numbers.get(message.get("tool_call_id"), len(numbers))))
        else:
            numbers = {call.get("id"): number for number, call in enumerate(message.get("tool_calls") or [])}
            keys.append((len(keys), 0))
    return [message for _, message in sorted(zip(keys, messages, strict=True), key=lambda pair: pair[0])]


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def _check_name(name: Any, field: str) -> None:
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise BadRequest(f"{field}: must be text of 1 to 256 characters, no spaces, quotes, < or >", field)


def _check_tools(conversation: Conversation) -> None:
    names = set()
    for index, tool in enumerate(conversation.tools or []):
        place = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise BadRequest(f'{place}: must be {{"type": "function", "function": {{...}}}}', place)
        _check_name(function.get("name"), f"{place}.function.name")
        if function["name"] in names:
            raise BadRequest(f"{place}: there is another tool {function['name']!r}", f"{place}.function.name")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise BadRequest(f"{place}: parameters must be a JSON schema", f"{place}.function.parameters")
        names.add(function["name"])
    _check_choice(conversation.tool_choice, names)


def _check_choice(choice: Any, names: set[str]) -> None:
    if isinstance(choice, Mapping):
        if choice.get("name") not in names:
            raise BadRequest(f"tool_choice: there is no tool {choice.get('name')!r}", "tool_choice")
    elif choice not in ("none", "auto", "required"):
        raise BadRequest('tool_choice: must be "none", "auto", "required" or the name of a tool', "tool_choice")
    elif choice == "required" and not names:
        raise BadRequest('tool_choice: "required" needs tools', "tool_choice")
