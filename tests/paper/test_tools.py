"""m3dist.gateway.tools: what the template writes is read back, however it is cut; what is malformed ends it."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist import tiny
from m3dist.gateway.tools import LONGEST_TAG, MOST_DEPTH, Call, ToolParser
from m3dist.text import TOOL as NS
from m3dist.text import Text

TEXT = Text.load(tiny.PATH)


def read(text, tools=None, pieces=None):
    """(content, calls) of a text; `pieces`: how it is cut."""
    parser = ToolParser(tools or {})
    content, calls = "", []
    for piece in pieces or [text]:
        more, new = parser.feed(piece)
        content += more
        calls += new
    return content + parser.finish(), calls


def block(*invokes):
    return f"{NS}<tool_call>\n{''.join(invokes)}{NS}</tool_call>"


def invoke(body, name="f"):
    return f'{NS}<invoke name="{name}">{body}{NS}</invoke>\n'


def element(name, body=""):
    return f"{NS}<{name}>{body}{NS}</{name}>"


def arguments(body, schema=None):
    """The arguments of one call of a tool with this schema of its parameters."""
    content, calls = read(block(invoke(body)), {"f": schema or {}})
    assert content == ""
    assert [call.name for call in calls] == ["f"]
    return calls[0].arguments


def of_type(schema, body):
    """The value of a parameter with this schema, which is written as `body`."""
    return arguments(element("x", body), {"properties": {"x": schema}})["x"]


# ---------------------------------------------------------------------------------------------------------------------
# What the template writes

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda text: NS not in text)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,7}", fullmatch=True)
leaves = st.one_of(
    words.map(lambda value: ({"type": "string"}, value)),
    st.integers().map(lambda value: ({"type": "integer"}, value)),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda value: ({"type": "number"}, value)),
    st.booleans().map(lambda value: ({"type": "boolean"}, value)),
    st.sampled_from(["a", "", 5, True]).map(lambda value: ({"enum": ["a", "", 5, True]}, value)),
)


def object_of(members):
    """(schema, value) of an object from those of its members."""
    schemas = {name: schema for name, (schema, _) in members.items()}
    return {"type": "object", "properties": schemas}, {name: value for name, (_, value) in members.items()}


def array_of(items):
    schemas = [schema for schema, _ in items]
    return {"type": "array", "prefixItems": schemas}, [value for _, value in items]


values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(names, inner, max_size=3).map(object_of), st.lists(inner, max_size=3).map(array_of)
    ),
    max_leaves=8,
)
calls_with_schema = st.lists(
    st.tuples(names, st.dictionaries(names, values, max_size=4).map(object_of)),
    min_size=1,
    max_size=3,
    unique_by=lambda call: call[0],
)


@settings(max_examples=50)
@given(calls_with_schema, words.filter(lambda text: "mm:think" not in text))
def test_what_the_template_writes_is_read_back(calls, content):
    functions = [{"function": {"name": name, "arguments": value}} for name, (_, value) in calls]
    messages = [{"role": "assistant", "content": content, "tool_calls": functions}]
    rendered = TEXT.render(messages, add_generation_prompt=False)
    answer = rendered.split("</mm:think>", 1)[1].removesuffix("[e~[\n")
    shown, found = read(answer, {name: schema for name, (schema, _) in calls})
    assert shown == content
    assert [call.name for call in found] == [name for name, _ in calls]
    for call, (_, (_, value)) in zip(found, calls, strict=True):
        assert json.dumps(call.arguments) == json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces

fragments = st.lists(
    st.sampled_from(
        [
            NS,
            NS,
            NS,
            "<tool_call>",
            "</tool_call>",
            '<invoke name="f">',
            "</invoke>",
            "<a>",
            "</a>",
            "<item>",
            "</item>",
        ]
        + ["<", ">", "]<]minimax", "[>[", "]", "]<", "\n", "5", "text", '{"a": 1}', f"{NS}<tool_call>\n", f"{NS}</a>"]
        + [invoke(element("a", "1")), element("a", element("item", "2")), f'{NS}<invoke name="f">']
    ),
    max_size=20,
).map("".join)
SCHEMA = {"properties": {"a": {"type": ["integer", "array"], "items": {"type": "integer"}}}}


@given(st.data(), fragments, st.booleans())
def test_the_cut_into_pieces_does_not_matter(data, text, opened):
    text = f"{NS}<tool_call>\n{text}" if opened else text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    expected = read(text, {"f": SCHEMA})
    assert read(text, {"f": SCHEMA}, pieces) == expected
    assert read(text, {"f": SCHEMA}, list(text)) == expected


@given(fragments)
def test_text_without_a_block_is_content(text):
    if f"{NS}<tool_call>" not in text:
        assert read(text) == (text, [])


@given(st.data(), fragments)
def test_content_is_shown_as_soon_as_it_cannot_be_a_tag(data, text):
    parser = ToolParser({})
    shown = ""
    for end, character in enumerate(text, 1):
        shown += parser.feed(character)[0]
        if not parser.opened:
            assert text[len(shown) : end] in f"{NS}<tool_call>"


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def test_a_call_comes_when_its_element_is_closed():
    parser = ToolParser({})
    assert parser.feed("Well. " + f'{NS}<tool_call>\n{NS}<invoke name="f">{element("a", "1")}') == ("Well. ", [])
    assert parser.feed(f"{NS}</invoke") == ("", [])
    assert parser.feed(">") == ("", [Call("f", {"a": "1"})])
    assert parser.feed(invoke("", "g")) == ("", [Call("g", {})])
    assert not parser.ended
    assert parser.feed(f"{NS}</tool_call> more {block(invoke(''))}") == ("", [])
    assert parser.ended
    assert parser.finish() == ""


@pytest.mark.parametrize("quoted", ['"get_it"', "'get_it'", "get_it", ' = "get_it" '])
def test_names_in_any_quotes(quoted):
    tag = f"<invoke name{quoted}>" if "=" in quoted else f"<invoke name={quoted}>"
    assert read(f"{NS}<tool_call>{NS}{tag}{NS}</invoke>{NS}</tool_call>") == ("", [Call("get_it", {})])


@pytest.mark.parametrize(
    "malformed",
    [
        f"{NS}<invoke>{NS}</invoke>",
        f'{NS}<invoke name="">{NS}</invoke>',
        f'{NS}<call name="f">{NS}</call>',
        f'{NS}<invoke name="f">{NS}<a>1{NS}</b>{NS}</invoke>',
        f'{NS}<invoke name="f">{NS}<a>1{NS}</invoke>',
        f'{NS}<invoke name="f">{NS}<a>1{NS}</a>{NS}</tool_call>',
        f'{NS}<invoke name="f">{NS}<>1{NS}</>{NS}</invoke>',
        f'{NS}<invoke name="f">{NS}<a<b>1{NS}</a<b>{NS}</invoke>',
        f"{NS}</invoke>",
        f'{NS}<invoke name="f">{NS}<{"a" * (LONGEST_TAG + 1)}>{NS}</invoke>',
    ],
)
def test_the_first_malformed_element_ends_it_and_earlier_calls_stand(malformed):
    text = block(invoke(element("a", "1")), malformed, invoke(element("a", "2")))
    assert read(text) == read(text, pieces=list(text)) == ("", [Call("f", {"a": "1"})])


def test_a_call_that_is_not_closed_is_dropped():
    text = block(invoke(element("a", "1")), invoke(element("b", "2")))
    for end in range(len(text)):
        calls = read(text[:end])[1]
        assert calls == [Call("f", {"a": "1"}), Call("f", {"b": "2"})][: len(calls)]
        assert len(calls) == text[:end].count(f"{NS}</invoke>")


def test_plain_tags_are_data():
    value = "<tool_call><b>5 < 6</b></x></invoke> & <![CDATA["
    assert of_type({"type": "string"}, value) == value


def test_a_marker_that_marks_no_tag_is_data():
    assert of_type({"type": "string"}, f"a{NS}b{NS}") == f"a{NS}b{NS}"


def test_the_longest_tag_is_read():
    name = "a" * (LONGEST_TAG - 1)  # and a slash
    assert arguments(element(name, "1")) == {name: "1"}


def test_depth():
    def nested(depth):
        return f"{NS}<a>" * depth + f"{NS}</a>" * depth

    value = arguments(nested(MOST_DEPTH))
    for _ in range(MOST_DEPTH):
        value = value["a"]
    assert value == ""
    assert read(block(invoke(""), invoke(nested(MOST_DEPTH + 1)))) == ("", [Call("f", {})])


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_children_make_an_object():
    assert arguments(element("a", element("b", "1") + element("c", element("d")))) == {"a": {"b": "1", "c": {"d": ""}}}


def test_children_make_an_array_where_the_schema_says_so():
    body = element("item", "1") + element("other", "2")
    assert of_type({"type": "array", "items": {"type": "integer"}}, body) == [1, 2]
    assert of_type({"type": "object"}, body) == {"item": "1", "other": "2"}


def test_items_make_an_array_where_the_schema_says_nothing():
    assert of_type({}, element("item", "1")) == ["1"]
    assert of_type({"type": "object"}, element("item", "1")) == {"item": "1"}
    assert of_type({"type": ["object", "array"]}, element("item", "1")) == ["1"]
    assert of_type({"type": ["object", "array"]}, element("other", "1")) == {"other": "1"}


def test_siblings_of_one_name_make_a_list():
    assert arguments(element("a", "1") + element("b", "2") + element("a", "3")) == {"a": ["1", "3"], "b": "2"}


def test_text_beside_children():
    assert arguments(f" stray\n{element('a', '1')} text") == {"a": "1", "$text": "stray\n text"}
    assert arguments(f"\n {element('a', '1')}\n") == {"a": "1"}


def test_an_invoke_may_hold_its_arguments_as_json():
    assert arguments(' {"a": [1]}\n') == {"a": [1]}
    assert arguments("[1]") == {"$text": "[1]"}
    assert arguments("\n") == {}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BOOLEAN, NULL, OBJECT, ARRAY = {"type": "boolean"}, {"type": "null"}, {"type": "object"}, {"type": "array"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (STRING, "5", "5"),
        (STRING, " a\n", " a\n"),
        (STRING, "null", "null"),
        (STRING, '{"a": 1}', '{"a": 1}'),
        (STRING, "", ""),
        ({}, "5", "5"),
        ({}, "", ""),
        (INTEGER, "5", 5),
        (INTEGER, "\n-05 ", -5),
        (INTEGER, "5.0", 5),
        (INTEGER, "5.5", "5.5"),
        (INTEGER, "five", "five"),
        (INTEGER, "٥", "٥"),
        (INTEGER, "1_000", "1_000"),
        (INTEGER, "9" * 5000, "9" * 5000),
        (INTEGER, "", ""),
        (NUMBER, "5", 5),
        (NUMBER, "-5e-1", -0.5),
        (NUMBER, "5.0", 5.0),
        (NUMBER, "1e999", "1e999"),
        (NUMBER, "NaN", "NaN"),
        (NUMBER, "Infinity", "Infinity"),
        (BOOLEAN, "true", True),
        (BOOLEAN, " False\n", False),
        (BOOLEAN, "1", "1"),
        (NULL, "null", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5 apples ", "5 apples "),
        ({"anyOf": [INTEGER, BOOLEAN]}, "true", True),
        ({"oneOf": [INTEGER, NULL]}, "null", None),
        ({"allOf": [{"title": "t"}, INTEGER]}, "5", 5),
        ({"$ref": "#/$defs/n"}, "5", 5),
        ({"$ref": "#/$defs/none"}, "5", "5"),
        ({"enum": ["5", "6"]}, "5", "5"),
        ({"enum": [5, 6]}, "5", 5),
        ({"enum": ["a", None]}, "null", None),
        ({"type": ["string", "integer"], "enum": ["5", 6]}, "5", "5"),
        ({"enum": ["null", None]}, "null", "null"),
        ({"const": True}, "true", True),
        (OBJECT, "", {}),
        (ARRAY, " ", []),
        ({"type": ["array", "object"]}, "", []),
        ({"type": ["array", "string"]}, "", ""),
        ({"anyOf": [{"const": "x"}, OBJECT]}, "", {}),
        ({"anyOf": [{"const": ""}, OBJECT]}, "", ""),
        (OBJECT, ' {"a": [1.5, null]} ', {"a": [1.5, None]}),
        (ARRAY, "[1, 2]", [1, 2]),
        (ARRAY, '{"a": 1}', '{"a": 1}'),
        (OBJECT, "{a: 1}", "{a: 1}"),
        (OBJECT, '{"a": NaN}', '{"a": NaN}'),
        (OBJECT, '{"a": 1e999}', '{"a": 1e999}'),
        (OBJECT, r'{"a": "\ud800"}', r'{"a": "\ud800"}'),
        (ARRAY, "[" * 5000, "[" * 5000),
        (ARRAY, "[" * 500 + "]" * 500, "[" * 500 + "]" * 500),
    ],
)
def test_the_schema_gives_a_text_its_type(schema, text, value):
    root = {"properties": {"x": schema}, "$defs": {"n": INTEGER}}
    found = arguments(element("x", text), root)["x"]
    assert (found, type(found)) == (value, type(value))


UNION = {
    "anyOf": [
        {"properties": {"kind": {"const": "number"}, "value": INTEGER}},
        {"properties": {"kind": {"const": "text"}, "value": STRING}},
        {"properties": {"words": {"type": "array"}, "value": BOOLEAN}, "additionalProperties": False},
    ]
}


@pytest.mark.parametrize(("kind", "value"), [("number", 5), ("text", "5"), ("other", 5)])
def test_the_member_that_tells_a_union_apart_decides(kind, value):
    body = element("kind", kind) + element("value", "5")
    assert of_type(UNION, body) == arguments(body, UNION) == {"kind": kind, "value": value}


def test_a_member_that_an_alternative_cannot_have_rules_it_out():
    assert of_type(UNION, element("words", "[]") + element("value", "true")) == {"words": [], "value": True}
    assert of_type(UNION, element("kind", "text") + element("value", "true")) == {"kind": "text", "value": "true"}


def test_a_tool_that_is_not_known_is_read_without_a_schema():
    assert read(block(invoke(element("a", "5"), "other")), {"f": {"properties": {"a": INTEGER}}}) == (
        "",
        [Call("other", {"a": "5"})],
    )


@pytest.mark.parametrize(
    "schema", [None, True, 7, [], {"properties": 7}, {"properties": {"a": 7}}, {"type": "array"}, {"required": 7}]
)
def test_a_schema_that_is_none_does_no_harm(schema):
    assert read(block(invoke(element("a", "5"))), {"f": schema})[1] == [Call("f", {"a": "5"})]


# ---------------------------------------------------------------------------------------------------------------------
# Time

SIZE = 60_000
HOSTILE = {
    "text": "x" * SIZE,
    "markers": f"{NS}" * (SIZE // len(NS)),
    "almost markers": "]<" * (SIZE // 2),
    "elements": element("a") * (SIZE // 32),
    "a tag without an end": f"{NS}<" + "a" * SIZE,
    "tags of almost the longest": element("a" * (LONGEST_TAG - 1)) * (SIZE // (2 * LONGEST_TAG)),
    "texts between elements": f"x{element('a', 'y')}" * (SIZE // 32),
    "brackets": element("o", "[" * SIZE),
    "invokes": (invoke("") + "x") * (SIZE // 40),
    "depths": (f"{NS}<a>" * MOST_DEPTH + f"{NS}</a>" * MOST_DEPTH) * (SIZE // 4096),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("cut", [SIZE * 2, 3])
def test_a_hostile_text_takes_time_in_proportion(kind, cut):
    """Reading all anew for each piece would take minutes."""
    text = f'{NS}<tool_call>\n{NS}<invoke name="f">{HOSTILE[kind]}{NS}</invoke>{NS}</tool_call>'
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]
    began = time.monotonic()
    read(text, {"f": {"properties": {"o": {"type": "array"}}}}, pieces)
    assert time.monotonic() - began < 3
