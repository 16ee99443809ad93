"""Tool calls in an answer's text, read as the text arrives. No MLX.

M3 writes them so (NS is `]<]minimax[>[`; a tag without it is data; nothing is escaped):

    NS<tool_call>\\n
    NS<invoke name="f">NS<city>ParisNS</city>NS<days>NS<item>1NS</item>NS<item>2NS</item>NS</days>NS</invoke>\\n
    NS</tool_call>

A value's text alone does not say its type ("5" may be a number): the tool's JSON schema does.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m3dist.gateway.body import parse
from m3dist.gateway.errors import BadRequest
from m3dist.gateway.parameters import Parameters, Schema, allowed_values, child_of, choosing, knowing, spelled, types_of
from m3dist.text import TOOL, held_back

OPEN_BLOCK = f"{TOOL}<tool_call>"
MOST_DEPTH = 128  # elements in elements
LONGEST_TAG = 1024  # characters between < and >; a tag that does not end would be searched again and again

INVOKE = re.compile(r"""invoke\s+name\s*=\s*(?:"([^"]+)"|'([^']+)'|([^\s"']+))\s*""")
INTEGER = re.compile(r"-?[0-9]+")
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Call:
    """A complete tool call."""

    name: str
    arguments: dict[str, Any]


@dataclass
class Element:
    """An element that is open: an invoke, a parameter, or what stands in one."""

    name: str
    alternatives: list[dict[str, Any]]  # what the schema says of it, see `Parameters`
    texts: list[str] = field(default_factory=list)
    children: list[tuple[str, Any]] = field(default_factory=list)


class ToolParser:
    """Streamed content -> the text before the tool calls, and the calls.

    The outcome does not depend on how the text was cut into pieces. A call is given when its element is closed: what
    came of it before is not final (a second element of the same name makes a list of the first). The first malformed
    element, or the end of the tool block, ends it all: earlier calls stand, later text is dropped. An invoke that is
    not closed when the text ends is dropped too.
    """

    def __init__(self, tools: Mapping[str, Schema]):
        """`tools`: name of a tool -> JSON schema of its parameters. A tool not among them is read without one."""
        self.opened = False  # the tool block began: no content comes any more
        self.ended = False  # nothing comes any more
        self._tools = tools
        self._parameters: dict[str, Parameters] = {}
        self._of_invoke = Parameters({})  # of the invoke that is open
        self._stack: list[Element] = []  # open elements, an invoke first
        self._held = ""

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """The (content, calls) that `text` makes certain; what may be part of a tag waits."""
        if self.ended:
            return "", []
        self._held += text
        content = "" if self.opened else self._content(last=False)
        return content, self._read_block() if self.opened else []

    def finish(self) -> str:
        """No more text: the content that was held back."""
        return "" if self.opened or self.ended else self._content(last=True)

    def _content(self, last: bool) -> str:
        """Take the text before the block, and the tag that opens it."""
        start = self._held.find(OPEN_BLOCK)
        if start >= 0:
            self.opened = True
            content, self._held = self._held[:start], self._held[start + len(OPEN_BLOCK) :]
            return content
        shown = len(self._held) - (0 if last else held_back(self._held, (OPEN_BLOCK,)))
        content, self._held = self._held[:shown], self._held[shown:]
        return content

    def _read_block(self) -> list[Call]:
        """Take all that is certain out of the held text; an incomplete tag stays."""
        calls: list[Call] = []
        held, at = self._held, 0
        while not self.ended:
            marker = held.find(TOOL, at)
            if marker < 0:
                shown = len(held) - held_back(held[-len(TOOL) :], (TOOL,))
                self._text(held[at:shown])
                at = shown
                break
            self._text(held[at:marker])
            at, inside = marker, marker + len(TOOL)
            if inside == len(held):
                break
            if held[inside] != "<":  # a marker that marks no tag
                self._text(TOOL)
                at = inside
                continue
            latest = inside + 1 + LONGEST_TAG
            end = held.find(">", inside, latest + 1)
            if end < 0:
                self.ended = len(held) > latest
                break
            at = end + 1
            self._tag(held[inside + 1 : end], calls)
        self._held = "" if self.ended else held[at:]
        return calls

    def _text(self, text: str) -> None:
        """Text inside of an element; between the invokes it is dropped."""
        if self._stack and text:
            self._stack[-1].texts.append(text)

    def _tag(self, tag: str, calls: list[Call]) -> None:
        """One tag, without its marker and its angle brackets."""
        if tag.startswith("/"):
            self._close(tag[1:].strip(), calls)
        elif not self._stack:
            self._open_invoke(tag)
        elif (name := tag.strip()) and "<" not in name and len(self._stack) <= MOST_DEPTH:
            parent = self._stack[-1]
            parent.alternatives = knowing(parent.alternatives, name)
            schema = child_of(parent.alternatives, name, len(parent.children))
            self._stack.append(Element(name, self._of_invoke.alternatives(schema)))
        else:
            self.ended = True

    def _open_invoke(self, tag: str) -> None:
        matched = INVOKE.fullmatch(tag)
        if matched is None:
            self.ended = True
            return
        name = next(group for group in matched.groups() if group is not None)
        if name not in self._parameters:
            self._parameters[name] = Parameters(self._tools.get(name, {}))
        self._of_invoke = self._parameters[name]
        self._stack.append(Element(name, self._of_invoke.alternatives(self._of_invoke.schema)))

    def _close(self, name: str, calls: list[Call]) -> None:
        if not self._stack:
            self.ended = True  # </tool_call>, or what should not be there
        elif len(self._stack) > 1:
            if name != self._stack[-1].name:
                self.ended = True
                return
            value, parent = _value(self._stack.pop()), self._stack[-1]
            parent.children.append((name, value))
            if len(parent.alternatives) > 1:
                parent.alternatives = choosing(self._of_invoke, parent.alternatives, name, value)
        elif name == "invoke":
            element = self._stack.pop()
            calls.append(Call(element.name, _arguments(element)))
        else:
            self.ended = True


# ---------------------------------------------------------------------------------------------------------------------
# Values of elements


def _arguments(invoke: Element) -> dict[str, Any]:
    """The children of an invoke; or, where there are none, the JSON object that its text is."""
    text = "".join(invoke.texts).strip()
    if not invoke.children and isinstance(whole := _from_json(text), dict):
        return whole
    return _object(invoke)


def _value(element: Element) -> Any:
    """What a closed element stands for."""
    if not element.children:
        return _leaf("".join(element.texts), element.alternatives)
    types = {name for plain in element.alternatives for name in types_of(plain)}
    all_items = all(name == "item" for name, _ in element.children)
    # Where the schema leaves it open, children called `item` are a list: that is how the template writes lists.
    if "array" in types and "object" not in types or all_items and ("array" in types or not types):
        return [value for _, value in element.children]
    return _object(element)


def _object(element: Element) -> dict[str, Any]:
    """Children by name, those of one name in a list; text beside them as "$text"."""
    named: dict[str, list[Any]] = {}
    for name, value in element.children:
        named.setdefault(name, []).append(value)
    if text := "".join(element.texts).strip():
        named.setdefault("$text", []).append(text)
    return {name: values[0] if len(values) == 1 else values for name, values in named.items()}


def _leaf(text: str, alternatives: list[dict[str, Any]]) -> Any:
    """The value of an element without children: of a type that the schema allows and the text can be, else the text.

    A string stays as it is, with its spaces and line breaks. Where other types are allowed too, they go first: the
    schema would not name them if they could never come.
    """
    stripped = text.strip()
    for value in (value for plain in alternatives for value in allowed_values(plain)):
        if spelled(value) == (text if isinstance(value, str) else stripped):
            return value
    types = {name for plain in alternatives for name in types_of(plain)}
    if "null" in types and stripped == "null":
        return None
    if "boolean" in types and stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    if types & {"integer", "number"} and (number := _number(stripped, "number" in types)) is not None:
        return number
    for name, kind in (("object", dict), ("array", list)):
        if name in types and isinstance(value := _from_json(stripped), kind):
            return value
    any_text = any("string" in types_of(plain) and not allowed_values(plain) for plain in alternatives)
    if not stripped and not any_text and types & {"array", "object"}:
        return [] if "array" in types else {}
    return text


def _number(text: str, fractions: bool) -> int | float | None:
    """The number that `text` is in JSON; None if it is none, has a fraction and may not, or fits no float."""
    try:
        if INTEGER.fullmatch(text):
            return int(text)
        if not NUMBER.fullmatch(text):
            return None
        number = float(text)
    except ValueError:  # int() takes some thousands of digits
        return None
    if not math.isfinite(number):
        return None
    return number if fractions else int(number) if number.is_integer() else None


def _from_json(text: str) -> Any:
    """The object or array that `text` is in JSON, as strictly as a client's own; None if it is none."""
    try:
        return parse(text) if text.startswith(("{", "[")) else None
    except BadRequest:
        return None
