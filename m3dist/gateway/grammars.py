"""Grammars, in llguidance's Lark, of answers that must be JSON or must call tools. No MLX.

A grammar describes the whole text of the answer, its reasoning included; the engine masks what it does not allow.
Markers and tags are text here, not token ids: the model may spell them from several pieces.

The lexer is greedy and never goes back, so what ends a value is part of the value's own terminal, up to and with its
closing tag: no other reading of the same characters can then take its place.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3dist.engine.grammar import LONGEST, GrammarError, check
from m3dist.gateway.errors import BadRequest
from m3dist.gateway.parameters import (
    TYPE_NAMES,
    Parameters,
    Schema,
    allowed_values,
    count_of,
    item_of,
    properties_of,
    required_of,
    spelled,
    types_of,
)
from m3dist.gateway.tools import MOST_DEPTH
from m3dist.text import END_THINK, THINK, TOOL

LINE = "\n"
TAG_NAME = re.compile(r"(?![/\s])[^<>]{1,256}(?<!\s)")  # a property's name that can be a tag's

# Free text: NONE has a marker of a tag, ONE has it once. Both end at what they are followed by ([lazy] in the rules).
MARKER = r"\]<\]minimax\[>\["
NO_MARKER = f"~/(?s:.*){MARKER}(?s:.*)/"
ONE_MARKER = f"~/(?s:.*){MARKER}(?s:.*){MARKER}(?s:.*)/"

# At most so much space between the parts of JSON: a model can go on with spaces until its answer is full.
SPACE = r"[\x20\x0A\x0D\x09]{1,80}"

# An object of which the schema names no properties, as JSON text (a closing tag would have to repeat a free name).
FREE_OBJECT = rf"""
json_object: "{{" (json_pair (JSON_COMMA json_pair)*)? "}}"
json_array: "[" (json_value (JSON_COMMA json_value)*)? "]"
json_pair: JSON_STRING JSON_COLON json_value
json_value: json_object | json_array | JSON_STRING | JSON_NUMBER | "true" | "false" | "null"
JSON_COMMA: /, ?/
JSON_COLON: /: ?/
JSON_STRING: /"([^"\\\x00-\x1f\x7f]|\\["\\\/bfnrt])*"/ & {NO_MARKER}
JSON_NUMBER: /-?(0|[1-9][0-9]{{0,14}})(\.[0-9]{{1,15}})?/
"""
INTEGER = "/-?(0|[1-9][0-9]{0,14})/"  # of a size that a float holds exactly
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/"


def whole_answer(thinking: str, answers: Sequence[str]) -> str:
    """Lark of an answer that is one of `answers` (Lark whose start rules are answer_...), after its reasoning.

    enabled: the prompt opened the reasoning. adaptive: the answer opens it, or says at once that there is none.
    disabled: no reasoning.
    """
    thought = rf"""
reasoning[lazy]: REASONING
REASONING: /(?s:.*)<\/mm:think>/ & {NO_MARKER}
"""
    before = {
        "enabled": ("reasoning", thought),
        "adaptive": (f"({_quoted(THINK)} reasoning | {_quoted(END_THINK)})", thought),
        "disabled": ("", ""),
    }
    first, rules = before[thinking]
    names = [text.partition(":")[0].strip() for text in answers]
    return f"start: {first} ({' | '.join(names)})\n{rules}\n" + "\n".join(answers)


def json_text(schema: Schema | bool) -> str:
    """Lark of a JSON text that meets `schema`."""
    if schema is not False:
        schema = {**(schema if isinstance(schema, Mapping) else {}), "x-guidance": {"whitespace_pattern": SPACE}}
    try:
        return f"answer_json: %json {json.dumps(schema, allow_nan=False)}\n"
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"response_format: the schema cannot be used: {error}", "response_format") from None


def tool_calls(schemas: Mapping[str, Schema], parallel: bool) -> str:
    """Lark of a tool block with a call, or with `parallel` some calls, of the tools in `schemas`. Raises BadRequest.

    Kept of a tool's schema: names of properties (in the schema's order) and which are required, types, enum and
    const, minItems and maxItems, unions, references. Not kept: bounds of numbers, lengths and patterns of strings, and
    what is said of properties that are not named.
    """
    tools: list[_Tool] = []
    for name, schema in schemas.items():
        tools.append(_Tool(len(tools), name, schema, LONGEST - sum(tool.length for tool in tools)))
    calls = f"({' | '.join(tool.start for tool in tools)}){'+' if parallel else ''}"
    block = f"answer_calls: {_quoted(f'{TOOL}<tool_call>{LINE}')} {calls} {_quoted(f'{TOOL}</tool_call>')}"
    return "\n".join([block, *(rule for tool in tools for rule in tool.rules), FREE_OBJECT])


def checked(lark: str, param: str) -> str:
    """`lark`, if llguidance takes it. Raises BadRequest, naming `param`, with what it says otherwise."""
    try:
        check(lark)
    except GrammarError as error:
        raise BadRequest(f"{param}: no grammar can be made of the schema: {error}", param) from None
    return lark


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Tools


class _Tool:
    """The rules of calls of one tool; `e0_1` and so on are elements, with their tags, `L0_1` what ends in a tag."""

    def __init__(self, number: int, name: str, schema: Schema, most: int):
        """`most`: characters that the rules may have; those of all tools may be LONGEST. Raises BadRequest."""
        self.start = f"invoke_{number}"
        self.rules: list[str] = []
        self.length = 0  # characters of the rules
        self._name, self._most = name, most
        self._number = number
        self._parameters = Parameters(schema)
        self._elements: dict[tuple[int, str], tuple[str, Any]] = {}
        self._depth = 0  # elements around the one whose rule is being made
        bodies = [self._members(plain) for plain in self._parameters.alternatives(schema)]
        if self._parameters.exhausted:
            raise self._too_large()
        opening, closing = _quoted(f'{TOOL}<invoke name="{name}">'), _quoted(f"{TOOL}</invoke>{LINE}")
        self._add(f"{self.start}: {opening} ({' | '.join(bodies)}) {closing}")

    def _too_large(self) -> BadRequest:
        return BadRequest(
            f"tools: no grammar can be made of the schema of {self._name!r}, it is too large: simplify it", "tools"
        )

    def _add(self, rule: str) -> None:
        """Raises BadRequest as soon as all rules are longer than a grammar may be."""
        self.length += len(rule)
        if self.length > self._most:
            raise self._too_large()
        self.rules.append(rule)

    def _element(self, name: str, schema: Any) -> str:
        """The rule of an element `name` whose value meets `schema`; one that holds itself refers to its own rule."""
        key = id(schema), name
        if key not in self._elements:
            rule = f"e{self._number}_{len(self._elements)}"
            self._elements[key] = rule, schema  # the schema is kept too, so that no other gets its id
            self._depth += 1
            if self._depth > MOST_DEPTH:
                raise BadRequest(f"tools: the schema of {self._name!r} is nested too deeply", "tools")
            values = self._values(name, self._parameters.alternatives(schema), rule)
            self._add(f"{rule}: {_quoted(f'{TOOL}<{name}>')} ({' | '.join(values)})")
            self._depth -= 1
        return self._elements[key][0]

    def _values(self, name: str, alternatives: Sequence[Schema], rule: str) -> Iterator[str]:
        """Lark of each kind of value, each with the closing tag."""
        closing = _quoted(f"{TOOL}</{name}>")
        leaves = [leaf for plain in alternatives for leaf in _leaves(plain)]
        terminal = f"L{rule[1:]}"
        if None in leaves:  # any text, of which all others are
            self._add(f"{rule}_text[lazy]: {terminal}")
            self._add(f"{terminal}: (/(?s:.*)/ {closing}) & {ONE_MARKER}")
            yield f"{rule}_text"
        elif leaves:
            self._add(f"{terminal}: ({' | '.join(leaf for leaf in leaves if leaf)}) {closing}")
            yield terminal
        for plain in alternatives:
            types = types_of(plain)
            if "array" in types:
                yield f"{self._items(plain)} {closing}"
            if "object" in types and (properties_of(plain) or plain.get("additionalProperties") is False):
                yield f"{self._members(plain)} {closing}"
            elif "object" in types and None not in leaves:
                yield f"json_object {closing}"

    def _members(self, plain: Schema) -> str:
        """Lark of an object's members, in the order of the schema."""
        required = dict.fromkeys(required_of(plain))
        properties = {**dict.fromkeys(required, {}), **properties_of(plain)}
        members = []
        for name in [*properties_of(plain), *(name for name in properties if name not in properties_of(plain))]:
            if not TAG_NAME.fullmatch(name) or properties[name] is False:
                if name in required:
                    raise BadRequest(f"tools: no call can have the required property {name!r}", "tools")
                continue
            members.append(self._element(name, properties[name]) + ("" if name in required else "?"))
        return " ".join(members) or '""'

    def _items(self, plain: Schema) -> str:
        """Lark of an array's items: those of prefixItems all, then others as many as it may have."""
        most = count_of(plain, "maxItems")
        leading = plain["prefixItems"][:most] if isinstance(plain.get("prefixItems"), list) else []
        items = [self._element("item", schema) for schema in leading]
        other = item_of(plain, len(leading))
        least = max(0, (count_of(plain, "minItems") or 0) - len(leading))
        if other is not False and (most is None or most > len(leading)):
            items.append(f"{self._element('item', other)}{{{least},{'' if most is None else most - len(leading)}}}")
        return " ".join(items) or '""'


def _leaves(plain: Schema) -> Iterator[str | None]:
    """Lark of each kind of text between tags that `plain` allows; None for any text."""
    types = types_of(plain)
    if values := allowed_values(plain):
        yield from (_quoted(spelled(value)) for value in values if _is_of(value, types) and TOOL not in spelled(value))
        return
    if not types or "string" in types:
        yield None
    if "null" in types:
        yield '"null"'
    if "boolean" in types:
        yield '"true" | "false"'
    if "number" in types:
        yield NUMBER
    elif "integer" in types:
        yield INTEGER


def _is_of(value: Any, types: frozenset[str]) -> bool:
    name = TYPE_NAMES[type(value)]
    return name in types or (name == "integer" and "number" in types)
