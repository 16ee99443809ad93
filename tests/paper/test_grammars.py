"""m3dist.gateway.grammars, by the engine's own matcher: right texts pass, wrong ones do not, and whatever comes of a
walk under the masks is read back by the gateway and meets the schema."""

import itertools
import json
import random
import time

import jsonschema_rs
import pytest

from m3dist import tiny
from m3dist.engine.grammar import GrammarError, Grammars
from m3dist.gateway.answer import Answer, Content, Reasoning, ToolCall
from m3dist.gateway.chat import Conversation, grammar_of
from m3dist.gateway.errors import BadRequest
from m3dist.options import THINKING
from m3dist.text import END_THINK, THINK, Text
from m3dist.text import TOOL as NS
from m3dist.tiny.dialogues import held_out

TEXT = Text.load(tiny.PATH)
VOCABULARY = TEXT.tokenizer.get_vocab_size()
GRAMMARS = Grammars((tiny.PATH / "tokenizer.json").read_text(), TEXT.stop_ids, VOCABULARY)
BYTE_IDS = {TEXT.token_bytes(id): id for id in range(VOCABULARY) if len(TEXT.token_bytes(id)) == 1}

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["c", "celsius", "f"]},
        "days": {"type": "integer"},
        "hours": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
        "exact": {"type": "boolean"},
        "at": {
            "type": "object",
            "properties": {"lat": {"type": "number"}, "name": {"type": ["string", "null"]}},
            "required": ["lat"],
        },
    },
    "required": ["city", "unit"],
}
TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "label": {"anyOf": [{"type": "integer"}, {"enum": ["none", 7.5, None]}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["label"],
        }
    },
}
ODD = {
    "type": "object",
    "properties": {
        "any": {},
        "map": {"type": "object"},
        "list": {"type": "array"},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
        "empty": {"type": "object", "additionalProperties": False},
        "text or list": {"type": ["string", "array"], "items": {"type": "integer"}},
        "number or map": {"anyOf": [{"type": "number"}, {"type": "object", "properties": {"x": {"const": "é\n/"}}}]},
        "never": False,
    },
    "required": ["map", "list", "pair", "empty"],
}
SCHEMAS = {"place": PLACE, "tree": TREE, "odd": ODD, "nothing": {}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]

REASONING = {"enabled": f"Hm.{END_THINK}", "adaptive": f"{THINK}Hm.{END_THINK}", "disabled": ""}


def asking(**said):
    return Conversation(**{"messages": [], "thinking": "disabled", **said})


def calling(**said):
    return asking(**{"tools": TOOLS, "tool_choice": "required", **said})


def formatted(schema, **said):
    return asking(response_format={"type": "json_schema", "schema": schema}, **said)


def follows(conversation, text):
    """Whether `text` is a whole answer that the grammar allows; its cut into tokens does not matter."""
    found = {
        follows_in(conversation, ids) for ids in (TEXT.encode(text), [BYTE_IDS[bytes([b])] for b in text.encode()])
    }
    assert len(found) == 1
    return found.pop()


def follows_in(conversation, ids):
    matcher = GRAMMARS.compile(grammar_of(conversation))
    try:
        for id in [*ids, min(TEXT.stop_ids)]:
            matcher.took(id)
    except GrammarError:
        return False
    return True


def block(*invokes):
    return f"{NS}<tool_call>\n{''.join(invokes)}{NS}</tool_call>"


def invoke(name, body=""):
    return f'{NS}<invoke name="{name}">{body}{NS}</invoke>\n'


def element(name, body=""):
    return f"{NS}<{name}>{body}{NS}</{name}>"


# ---------------------------------------------------------------------------------------------------------------------
# Right texts and wrong ones: JSON

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "number": {"type": "integer"}},
    "required": ["street"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("thinking", THINKING)
def test_reasoning_comes_before_json(thinking):
    conversation = formatted(ADDRESS, thinking=thinking)
    text = '{"street": "a", "number": 5}'
    assert follows(conversation, REASONING[thinking] + text)
    assert not follows(conversation, f"{REASONING[thinking]}{text} ")
    assert not follows(conversation, f"{REASONING[thinking]} {text}")
    assert not follows(conversation, f"{REASONING[thinking]}Here: {text}")


@pytest.mark.parametrize(
    ("thinking", "text", "allowed"),
    [
        ("enabled", f"{END_THINK}{{}}", True),
        ("enabled", "{}", False),
        ("enabled", f"a{NS}b{END_THINK}{{}}", False),  # would end the reasoning
        ("enabled", f"a]<]mini{END_THINK}{{}}", True),
        ("enabled", f"a{END_THINK}b{END_THINK}{{}}", False),
        ("adaptive", f"{END_THINK}{{}}", True),
        ("adaptive", f"{THINK}{END_THINK}{{}}", True),
        ("adaptive", "{}", False),
        ("adaptive", f"{THINK}{{}}", False),
        ("disabled", f"{END_THINK}{{}}", False),
        ("disabled", f"{THINK}Hm.{END_THINK}{{}}", False),
    ],
)
def test_reasoning_as_the_mode_allows(thinking, text, allowed):
    assert follows(asking(response_format={"type": "json_object"}, thinking=thinking), text) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("{}", True),
        ('{"a": [1, {"b": null}], "ü": "x\\n"}', True),
        ('{\n  "a": 1\n}', True),
        ('{"a":' + " " * 100 + "1}", False),
        ("[]", False),
        ("5", False),
        ('{"a": 1', False),
        ('{"a": x}', False),
    ],
)
def test_json_object(text, allowed):
    assert follows(asking(response_format={"type": "json_object"}), text) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('{"street":"a"}', True),
        ('{"street": "a", "number": -5}', True),
        ('{"number": 5}', False),
        ('{"street": 5}', False),
        ('{"street": "a", "number": 5.5}', False),
        ('{"street": "a", "more": 5}', False),
    ],
)
def test_json_schema(text, allowed):
    assert follows(formatted(ADDRESS), text) == allowed


def test_a_client_cannot_set_llguidance_s_options():
    assert follows(formatted({**ADDRESS, "x-guidance": {"key_separator": "="}}), '{"street": "a"}')
    assert follows(formatted({"x-guidance": 7}), "5")
    assert follows(formatted(True), '"a"')


def test_with_tools_the_answer_is_calls_or_json():
    conversation = formatted(ADDRESS, tools=TOOLS)
    assert follows(conversation, '{"street": "a"}')
    assert follows(conversation, block(invoke("nothing")))
    assert not follows(conversation, "neither")
    assert not follows(formatted(ADDRESS, tools=TOOLS, tool_choice="none"), block(invoke("nothing")))
    assert not follows(formatted(ADDRESS, tools=TOOLS, tool_choice="required"), '{"street": "a"}')


# ---------------------------------------------------------------------------------------------------------------------
# Right texts and wrong ones: tool calls


@pytest.mark.parametrize("thinking", THINKING)
def test_reasoning_comes_before_a_call(thinking):
    assert follows(calling(thinking=thinking), REASONING[thinking] + block(invoke("nothing")))
    assert not follows(calling(thinking=thinking), REASONING[thinking] + "Well." + block(invoke("nothing")))
    assert not follows(calling(thinking=thinking), REASONING[thinking])
    assert not follows(calling(thinking=thinking), REASONING[thinking] + block(invoke("nothing")) + "\n")


def test_some_call_is_required():
    assert not follows(calling(), block())
    assert not follows(calling(), "")
    assert not follows(calling(), block(invoke("unknown")))


def test_parallel_calls():
    two = block(invoke("nothing"), invoke("nothing"))
    assert follows(calling(), two)
    assert not follows(calling(parallel_tool_calls=False), two)
    assert follows(calling(parallel_tool_calls=False), block(invoke("nothing")))


def test_a_named_tool():
    conversation = calling(tool_choice={"name": "nothing"})
    assert follows(conversation, block(invoke("nothing"), invoke("nothing")))
    assert not follows(conversation, block(invoke("place", element("city", "a") + element("unit", "c"))))


NEEDED = element("city", "Paris") + element("unit", "c")


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        (NEEDED, True),
        (element("city", "") + element("unit", "celsius"), True),
        (element("city", "<b>]<] é\n</city>]<]minimax[>") + element("unit", "f"), True),
        (element("city", f"a{NS}b") + element("unit", "f"), False),
        (element("city", "a"), False),
        (element("unit", "c") + element("city", "a"), False),  # the schema's order
        (element("city", "a") + element("unit", "k"), False),
        (element("city", "a") + element("unit", "cel"), False),
        (NEEDED + element("unit", "c"), False),
        (NEEDED + element("other", "c"), False),
        (NEEDED + "text", False),
        (NEEDED + element("days", "-12"), True),
        (NEEDED + element("days", "5.5"), False),
        (NEEDED + element("days", "five"), False),
        (NEEDED + element("days", ""), False),
        (NEEDED + element("hours", element("item", "1") + element("item", "2.5")), True),
        (NEEDED + element("hours", ""), False),
        (NEEDED + element("hours", element("item", "1") * 4), False),
        (NEEDED + element("hours", element("hour", "1")), False),
        (NEEDED + element("exact", "true"), True),
        (NEEDED + element("exact", "True"), False),
        (NEEDED + element("at", element("lat", "1")), True),
        (NEEDED + element("at", element("lat", "1") + element("name", "null")), True),
        (NEEDED + element("at", element("name", "n")), False),
        (NEEDED + f"{NS}<days>5{NS}</hours>", False),
        (NEEDED + "<days>5</days>", False),
    ],
)
def test_arguments(body, allowed):
    assert follows(calling(), block(invoke("place", body))) == allowed


@pytest.mark.parametrize(
    ("label", "allowed"), [("5", True), ("none", True), ("7.5", True), ("null", True), ("7.6", False), ("", False)]
)
def test_unions_and_recursion(label, allowed):
    leaf = element("item", element("label", label))
    assert (
        follows(calling(), block(invoke("tree", element("root", element("label", "1") + element("children", leaf)))))
        == allowed
    )


def test_what_the_tiny_model_learnt():
    questions = [question for question in held_out() if question.kind == "tool_call"]
    assert len(questions) == 12
    for question in questions:
        for parallel in (True, False):
            conversation = Conversation(
                [], question.tools, "required", parallel_tool_calls=parallel, thinking=question.thinking
            )
            assert follows(conversation, question.answer) == (parallel or question.answer.count("<invoke") == 1)


# ---------------------------------------------------------------------------------------------------------------------
# Walks: what the masks allow is read back and meets the schema

ENDS = [TEXT.tokenizer.token_to_id(marker) for marker in (NS, END_THINK)] + [BYTE_IDS[c.encode()] for c in '"}]']
STOPS = sorted(TEXT.stop_ids)


def allowed_tokens(mask):
    bits = int.from_bytes(mask, "little")
    return [id for id in range(VOCABULARY) if bits >> id & 1]


def walk(rng, grammar, most=600):
    """Tokens of a random answer under the masks; it inclines to what ends a text. None: not done after `most`."""
    matcher = GRAMMARS.compile(grammar)
    ids = []
    while len(ids) < most:
        allowed = allowed_tokens(matcher.mask())
        ends = [id for id in (*STOPS, *ENDS) if id in allowed]
        token = rng.choice(ends if ends and rng.random() < 0.3 else allowed)
        if token in STOPS:
            return ids
        ids.append(token)
        matcher.took(token)
    return None


def walks(conversation, count):
    """The (reasoning, content, calls) of `count` random answers."""
    rng = random.Random(f"walks {conversation.thinking}")
    grammar = grammar_of(conversation)
    for ids in itertools.islice(filter(None, (walk(rng, grammar) for _ in range(count * 2))), count):
        answer = Answer(TEXT, conversation)
        events = [event for id in ids for event in answer.feed(id)] + answer.finish()
        texts = ["".join(e.text for e in events if isinstance(e, kind)) for kind in (Reasoning, Content)]
        yield *texts, [event for event in events if isinstance(event, ToolCall)], TEXT.decode(ids)


@pytest.mark.parametrize("thinking", THINKING)
def test_whatever_calls_the_masks_allow_meet_their_schemas(thinking):
    found = list(walks(calling(thinking=thinking), 25))
    assert len(found) == 25
    for reasoning, content, calls, text in found:
        assert reasoning == "" or thinking != "disabled"
        assert content == ""
        assert len(calls) == text.count(f"{NS}</invoke>\n") >= 1
        for call in calls:
            jsonschema_rs.validate(SCHEMAS[call.name], json.loads(json.dumps(call.arguments)))
    assert {call.name for *_, calls, _ in found for call in calls} == set(SCHEMAS)


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("schema", [ADDRESS, PLACE, {"type": "object"}])
def test_whatever_json_the_masks_allow_meets_the_schema(thinking, schema):
    found = list(walks(formatted(schema, thinking=thinking), 8))
    assert len(found) == 8
    for _, content, calls, _ in found:
        assert calls == []
        jsonschema_rs.validate(schema, json.loads(content))


LARGE = {
    "many properties": {"properties": {f"{'p' * 200}{i}": {"type": "integer"} for i in range(20_000)}},
    "many copies": {"properties": {f"p{i}": {} for i in range(3000)}, "anyOf": [{}] * 64},
    "many names": {"required": [f"p{i}" for i in range(30_000)], "properties": {f"q{i}": {} for i in range(30_000)}},
}


@pytest.mark.parametrize("schema", LARGE.values(), ids=LARGE)
def test_a_schema_that_is_too_large_is_refused_before_all_is_made_of_it(schema):
    tool = {"type": "function", "function": {"name": "large", "parameters": schema}}
    began = time.process_time()
    with pytest.raises(BadRequest, match="tools.*'large'.*too large") as caught:
        grammar_of(asking(tools=[tool], tool_choice="required"))
    assert caught.value.param == "tools"
    assert time.process_time() - began < 0.3
