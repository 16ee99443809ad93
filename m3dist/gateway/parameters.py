"""What a JSON schema says of one value: its alternatives without $ref, allOf, anyOf and oneOf. No MLX.

Only what deciding a type, finding a child's schema and writing a grammar need; it does not validate.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

Schema = Mapping[str, Any]

MOST_ALTERNATIVES = 64  # of one value; a product of unions could have any number
# Keywords, properties, names and so on that the expansion of all of a schema may copy: some 10 ms of work, which the
# gateway's event loop does. People's schemas take hundreds.
MOST_COPIED = 2**16
COMBINED = ("$ref", "allOf", "anyOf", "oneOf")
COPIED = ("properties", "required", "enum", "prefixItems")  # what has lists that are copied, or read in every copy
TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


class Parameters:
    """The schema of a tool's parameters, against which its `$ref`s are looked up.

    `exhausted`: it took more than MOST_COPIED, and what was asked of it from then on got the answer that it says
    nothing.
    """

    def __init__(self, schema: Any):
        self.schema = schema
        self._left = MOST_COPIED
        self._known: dict[Any, tuple[Any, list[dict[str, Any]]]] = {}
        self._references: dict[str, list[dict[str, Any]]] = {}

    @property
    def exhausted(self) -> bool:
        return self._left < 0

    def alternatives(self, schema: Any) -> list[dict[str, Any]]:
        """The plain schemas of which a value of `schema` meets one; at most MOST_ALTERNATIVES.

        Keywords beside a combination hold for each of its members. What is no schema allows anything, and so does one
        that is nested too deeply to follow, or comes after MOST_COPIED.
        """
        if not isinstance(schema, Mapping) or not schema:
            return [{}]
        key = _key(schema)
        if key not in self._known:
            try:
                plain = self._expand(schema)
            except (RecursionError, _TooMuch):
                plain = [{}]
            self._known[key] = schema, plain  # the schema is kept too, so that no other gets its id
        return self._known[key][1]

    def _expand(self, schema: Any) -> list[dict[str, Any]]:
        if not isinstance(schema, Mapping):
            return [{}]
        self._count(schema)
        found = [{key: value for key, value in schema.items() if key not in COMBINED}]
        if isinstance(reference := schema.get("$ref"), str):
            found = self._each_with_each(found, self._referred(reference))
        for part in _listed(schema, "allOf"):
            found = self._each_with_each(found, self._expand(part))
        for name in ("anyOf", "oneOf"):
            if parts := _listed(schema, name)[:MOST_ALTERNATIVES]:
                found = self._each_with_each(found, [plain for part in parts for plain in self._expand(part)])
        return found

    def _each_with_each(self, left: list[dict[str, Any]], right: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pairs = ((one, other) for one in left for other in right)
        return [self._both(one, other) for one, other in islice(pairs, MOST_ALTERNATIVES)]

    def _both(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """A schema that says what both say; of a keyword that cannot be joined, the later one's."""
        self._count(one)
        self._count(other)
        joined = {**one, **other}
        if isinstance(one.get("properties"), Mapping) and isinstance(other.get("properties"), Mapping):
            joined["properties"] = {**one["properties"], **other["properties"]}
        if isinstance(one.get("required"), list) and isinstance(other.get("required"), list):
            joined["required"] = [*one["required"], *other["required"]]
        return joined

    def _count(self, schema: Schema) -> None:
        """`schema` is about to be copied: properties, names and values that it lists too, for whoever reads the copies
        looks through all of them. Raises _TooMuch."""
        listed = sum(len(value) for key, value in schema.items() if key in COPIED and isinstance(value, Mapping | list))
        self._left -= 1 + len(schema) + listed
        if self.exhausted:
            raise _TooMuch

    def _referred(self, reference: str) -> list[dict[str, Any]]:
        """Alternatives of what `reference` leads to, found once; one that leads back to itself says nothing."""
        if reference not in self._references:
            self._references[reference] = [{}]
            self._references[reference] = self._expand(self._find(reference))
        return self._references[reference]

    def _find(self, reference: str) -> Any:
        """What `#/$defs/name` or another JSON pointer into the schema leads to; {} if it leads nowhere."""
        place = self.schema
        for step in reference.removeprefix("#").split("/")[1:] if reference.startswith("#") else ["elsewhere"]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and step.isdecimal() and int(step) < len(place):
                place = place[int(step)]
            elif isinstance(place, Mapping) and step in place:
                place = place[step]
            else:
                return {}
        return place


def _listed(schema: Schema, name: str) -> list[Any]:
    parts = schema.get(name)
    return parts if isinstance(parts, list) else []


class _TooMuch(Exception):
    """The work that MOST_COPIED allows is done."""


def _key(schema: Schema) -> Any:
    """What a schema is known by: itself; or a union its members, for `child_of` makes it anew for every child."""
    if schema.keys() == {"anyOf"}:
        return tuple(id(part) for part in _listed(schema, "anyOf")[:MOST_ALTERNATIVES])
    return id(schema)


# ---------------------------------------------------------------------------------------------------------------------
# One plain schema


def types_of(plain: Schema) -> frozenset[str]:
    """The JSON types that `plain` allows, by `type` or else by what only one type has; none: anything."""
    named = plain.get("type")
    types = {named} if isinstance(named, str) else set()
    if isinstance(named, list):
        types = {name for name in named if isinstance(name, str)}
    if not types:
        types = {TYPE_NAMES[type(value)] for value in allowed_values(plain)}
    if not types and any(key in plain for key in ("properties", "required", "additionalProperties")):
        types = {"object"}
    if not types and any(key in plain for key in ("items", "prefixItems")):
        types = {"array"}
    if types and plain.get("nullable") is True:  # OpenAPI 3.0
        types.add("null")
    return frozenset(types)


def allowed_values(plain: Schema) -> list[Any]:
    """The numbers, texts and so on that `const` or `enum` names, no arrays and objects; none: no such limit."""
    values = [plain["const"]] if "const" in plain else _listed(plain, "enum")
    return [value for value in values if type(value) in TYPE_NAMES]


def spelled(value: Any) -> str:
    """A number, text, boolean or null as M3 writes it between tags."""
    return value if isinstance(value, str) else json.dumps(value)


def properties_of(plain: Schema) -> Mapping[str, Any]:
    """Schemas of the named properties."""
    properties = plain.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def required_of(plain: Schema) -> Iterator[str]:
    """Names of the properties that must be there."""
    return (name for name in _listed(plain, "required") if isinstance(name, str))


def count_of(plain: Schema, name: str) -> int | None:
    """The number that `minItems` or `maxItems` gives; None: no such limit."""
    value = plain.get(name)
    return value if type(value) is int and value >= 0 else None


def item_of(plain: Schema, index: int) -> Any:
    """Schema of the item at `index` of an array; {} where it says nothing."""
    leading = _listed(plain, "prefixItems")
    return leading[index] if index < len(leading) else plain.get("items", {})


def child_of(alternatives: Iterable[Schema], name: str, index: int) -> Any:
    """Schema of the child called `name`, the `index`-th of its parent; {} where no alternative says anything."""
    alternatives = list(alternatives)
    found = [properties_of(plain)[name] for plain in alternatives if name in properties_of(plain)]
    found = found or [item_of(plain, index) for plain in alternatives if "array" in types_of(plain)]
    found = found or [plain["additionalProperties"] for plain in alternatives if "additionalProperties" in plain]
    return found[0] if len(found) == 1 else {"anyOf": found}


def knowing(alternatives: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Those of the alternatives that can have a child called `name`; all, if none can."""
    open_ones = [p for p in alternatives if name in properties_of(p) or p.get("additionalProperties") is not False]
    return open_ones or alternatives


def choosing(parameters: Parameters, alternatives: list[dict[str, Any]], name: str, value: Any) -> list[dict[str, Any]]:
    """Those of the alternatives in which the child called `name` can have this value, by const and enum; all, if none.

    So the member that tells the alternatives of a union apart decides what the members after it are.
    """

    def allowed(plain: Schema) -> bool:
        members = parameters.alternatives(properties_of(plain).get(name))
        values = [allowed_values(member) for member in members]
        return not all(values) or any(same(value, each) for listed in values for each in listed)

    return [plain for plain in alternatives if allowed(plain)] or alternatives


def same(value: Any, other: Any) -> bool:
    """Whether two values are the same in JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
