"""m3dist.gateway.parameters: what a schema says of a value, and that no schema takes long."""

import time

import pytest

from m3dist.gateway.parameters import MOST_ALTERNATIVES, Parameters, allowed_values, child_of, types_of

STRING = {"type": "string"}
INTEGER = {"type": "integer"}


def plain(schema, root=None):
    return Parameters(schema if root is None else root).alternatives(schema)


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({}, set()),
        (STRING, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"type": "integer", "nullable": True}, {"integer", "null"}),
        ({"enum": ["a", 1, None, True, 0.5]}, {"string", "integer", "null", "boolean", "number"}),
        ({"const": "a"}, {"string"}),
        ({"properties": {}}, {"object"}),
        ({"required": ["a"]}, {"object"}),
        ({"items": {}}, {"array"}),
        ({"type": 7}, set()),
        ({"type": ["string", 7]}, {"string"}),
    ],
)
def test_types(schema, types):
    assert types_of(schema) == types


def test_unions_are_alternatives_with_what_stands_beside_them():
    assert plain({"title": "t", "anyOf": [STRING, INTEGER]}) == [{"title": "t", **STRING}, {"title": "t", **INTEGER}]
    assert plain({"oneOf": [STRING, {"anyOf": [INTEGER, {}]}]}) == [STRING, INTEGER, {}]


def test_all_of_joins_properties_and_required():
    one = {"properties": {"a": STRING}, "required": ["a"]}
    other = {"properties": {"b": INTEGER}, "required": ["b"]}
    assert plain({"allOf": [one, other]}) == [
        {"properties": {"a": STRING, "b": INTEGER}, "required": ["a", "b"]},
    ]


def test_references():
    root = {"$defs": {"a/b": {"$ref": "#/$defs/c"}, "c": INTEGER, "list": [STRING]}}
    assert plain({"$ref": "#/$defs/a~1b"}, root) == [INTEGER]
    assert plain({"$ref": "#/$defs/list/0", "title": "t"}, root) == [{"title": "t", **STRING}]
    assert plain({"$ref": "#"}, root) == [root]


@pytest.mark.parametrize(
    "reference",
    ["#/$defs/x", "#/$defs/list/9", "#/$defs/list/-1", "other.json", "other.json#/$defs/c", "", "x/$defs/c"],
)
def test_a_reference_that_leads_nowhere_says_nothing(reference):
    root = {"$defs": {"c": INTEGER, "list": [STRING]}}
    assert plain({"$ref": reference}, root) == [{}]


def test_a_reference_to_itself_says_nothing():
    assert plain({"$ref": "#/$defs/a"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}}) == [{}]
    assert plain({"$ref": "#/$defs/a"}, {"$defs": {"a": {"anyOf": [STRING, {"$ref": "#/$defs/a"}]}}}) == [STRING, {}]


@pytest.mark.parametrize("schema", [True, False, None, 7, "string", [], {"anyOf": 7}, {"allOf": [7]}, {"$ref": 7}])
def test_what_is_no_schema_allows_anything(schema):
    assert plain(schema) == [{}]


def test_values_that_are_arrays_and_objects_are_no_limit():
    assert allowed_values({"enum": ["a", [], {}, 1]}) == ["a", 1]
    assert allowed_values({"const": {}}) == []


def test_a_child_may_be_what_any_alternative_says():
    objects = [{"properties": {"a": STRING}}, {"properties": {"a": INTEGER}}, {"type": "array", "items": {}}]
    assert child_of(objects, "a", 0) == {"anyOf": [STRING, INTEGER]}
    assert child_of(objects, "b", 0) == {}
    assert child_of([{"prefixItems": [STRING], "items": INTEGER}], "item", 0) == STRING
    assert child_of([{"prefixItems": [STRING], "items": INTEGER}], "item", 1) == INTEGER
    assert child_of([{"additionalProperties": INTEGER}], "x", 0) == INTEGER
    assert child_of([{}], "x", 0) == {"anyOf": []}


def doubling(keyword):
    """Each definition names the next twice: 2**200 of the last."""
    schemas = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(200)}
    return {"$ref": "#/$defs/d0", "$defs": schemas}


@pytest.mark.parametrize(
    "schema",
    [
        doubling("anyOf"),
        doubling("allOf"),
        {"allOf": [{"anyOf": [STRING, INTEGER]}] * 200},
        {"anyOf": [{"anyOf": [STRING] * 300}] * 300},
        {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(20_000)}},
    ],
)
def test_a_hostile_schema_takes_no_time(schema):
    began = time.monotonic()
    assert 1 <= len(plain(schema)) <= MOST_ALTERNATIVES
    assert time.monotonic() - began < 2


def copying(parts):
    """Each part of allOf has every property copied, in each of the alternatives; such a body stopped a server."""
    properties = {f"p{i}": {} for i in range(4000)}
    return {"properties": properties, "allOf": [{"anyOf": [{}] * 64}] + [{"properties": {}}] * parts}


@pytest.mark.parametrize("schema", [copying(5000), {"enum": [1] * 300_000, "anyOf": [{}] * 64}])
def test_a_schema_whose_copies_are_too_many_says_nothing(schema):
    parameters = Parameters(schema)
    began = time.process_time()
    assert parameters.alternatives(schema) == [{}]
    assert time.process_time() - began < 0.5
    assert parameters.exhausted


def test_children_of_a_union_cost_once():
    """However many an answer has."""
    objects = [{"properties": {"a": {"enum": list(range(100))}}}, {"properties": {"a": INTEGER}}]
    parameters = Parameters({"anyOf": objects})
    for _ in range(1000):
        assert len(parameters.alternatives(child_of(parameters.alternatives(parameters.schema), "a", 0))) == 2
    assert not parameters.exhausted
