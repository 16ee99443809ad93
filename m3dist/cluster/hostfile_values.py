"""JSON and YAML read without surprises: every value has a name and a line, and is what it is asked to be. No MLX.

JSON is YAML, so one parser reads both. Of YAML's types none is trusted: a number is decimal digits, and what stands
without quotes is text only if no version of YAML takes it for anything else.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from m3dist.errors import M3Error


class HostfileError(M3Error):
    """A hostfile that cannot be read or used; names file, line and field, and what is allowed."""


def quoted(text: str) -> str:
    """`text` for a message: in quotes, printable, not too long."""
    return json.dumps(text if len(text) <= 60 else text[:57] + "...")


class _Loader(yaml.SafeLoader):
    """YAML without what can refer to other parts of the file, or ask for types."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors (&) and aliases (*) are not allowed here", problem_mark=mark)
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem="tags (!) are not allowed here", problem_mark=mark)
        return super().compose_node(parent, index)


def compose(path: str, text: str) -> "Value":
    """The whole of a JSON or YAML file, which is not empty. Raises HostfileError."""
    if _is_json(text):
        # YAML has no tabs between its tokens, where alone JSON has them, and in quotes not all that JSON has there.
        text = text.replace("\t", " ").replace("\x7f", "\\x7f").encode("ascii", "backslashreplace").decode()
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise HostfileError(f"{path} line {line}: holds control characters; it must be text") from None
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path} line {mark.line + 1}" if mark else path
        raise HostfileError(f"{where}: is neither JSON nor YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise HostfileError(f"{path} line {loader.line + 1}: is nested too deeply for a hostfile") from None
    except (ValueError, OverflowError) as error:  # an escape, such as "\U00110000", that is no character
        raise HostfileError(f"{path} line {loader.line + 1}: is neither JSON nor YAML: {error}") from None
    if root is None:
        raise HostfileError(f"{path}: is empty; it must list hosts (hostfiles/README.md)")
    return Value(path, "", root)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# Plain scalars that YAML 1.2 takes for numbers. What YAML 1.1 takes for anything but text, PyYAML knows.
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+")
TEXT_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Value:
    """A value of the file with its name, such as hosts[1].port. What is asked of it holds, or raises HostfileError."""

    path: str
    name: str
    node: yaml.Node

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line) + 1

    def error(self, problem: str) -> HostfileError:
        name = f"{self.name} " if self.name else ""
        return HostfileError(f"{self.path} line {self.line}: {name}{problem}")

    def must_be(self, allowed: str) -> HostfileError:
        return self.error(f"must be {allowed}, not {self._shown()}")

    def text(self, allowed: str = "text") -> str:
        """Text without NUL, which neither a path nor a variable can hold."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.must_be(allowed)
        if not self._is_text():
            without = ", which without quotes is no text" if self.node.value else ""
            raise self.error(f"must be {allowed}, not {self._shown()}{without}")
        try:  # JSON writes a character beyond 16 bits as two escapes, which YAML leaves apart
            text = self.node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self.must_be(allowed) from None
        if "\0" in text:
            raise self.must_be(allowed)
        return str(text)

    def whole(self, low: int, high: int) -> int:
        """A whole number, low <= number <= high < 10**9."""
        digits = isinstance(self.node, yaml.ScalarNode) and re.fullmatch("[0-9]{1,9}", self.node.value)
        number = int(self.node.value) if digits else low - 1
        if not low <= number <= high:
            raise self.must_be(f"a whole number from {low} to {high}")
        if self._is_text() or self.node.value != str(number):  # in quotes; or 022, which is 18 to YAML 1.1
            raise self.must_be(f"a whole number from {low} to {high}, written {number}")
        return number

    def items(self, allowed: str) -> list["Value"]:
        """The members of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.must_be(allowed)
        return [Value(self.path, f"{self.name}[{i}]", node) for i, node in enumerate(self.node.value)]

    def members(self, allowed: str) -> dict[str, "Value"]:
        """The values of a mapping by their keys, each of which stands there once."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.must_be(allowed)
        members: dict[str, Value] = {}
        for key, node in self.node.value:
            name = Value(self.path, f"a name in {self.name or 'the file'}", key).text()
            shown = name if name.isidentifier() else quoted(name)
            value = Value(self.path, f"{self.name}.{shown}" if self.name else shown, node)
            if name in members:
                raise value.error(f"is given twice, first in line {members[name].line}; one must go")
            members[name] = value
        return members

    def fields(self, what: str, known: Sequence[str]) -> dict[str, "Value"]:
        """The values of a mapping whose keys are all `known`; it is `what` messages call it."""
        fields = self.members(f"{what}, with the fields {', '.join(known)}")
        for name, value in fields.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise value.error(f"is unknown{hint}; the fields of {what} are {', '.join(known)}")
        return fields

    def _is_text(self) -> bool:
        """Whether it is in quotes, or a word that every YAML takes for text."""
        node = self.node
        if not isinstance(node, yaml.ScalarNode):
            return False
        return node.style is not None or (node.tag == TEXT_TAG and not NUMBER.fullmatch(node.value))

    def _shown(self) -> str:
        if isinstance(self.node, yaml.ScalarNode):
            return quoted(self.node.value) if self._is_text() else self.node.value[:60] or "empty"
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"
