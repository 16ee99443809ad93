"""m3dist.gateway.chat: what conversations the template is given, and which are refused, by the name of the field."""

import pytest

from m3dist import tiny
from m3dist.gateway.chat import Conversation, grammar_of, prompt_of
from m3dist.gateway.errors import BadRequest
from m3dist.text import TOOL as NS
from m3dist.text import Text

TEXT = Text.load(tiny.PATH)
USER = {"role": "user", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ADD = {"type": "function", "function": {"name": "add"}}


def called(*calls, **more):
    """An assistant message that calls tools, each given as (id, arguments)."""
    listed = [{"id": id, "type": "function", "function": {"name": "add", "arguments": a}} for id, a in calls]
    return {"role": "assistant", "content": None, "tool_calls": listed, **more}


def result(text, id=None):
    return {"role": "tool", "content": text} | ({} if id is None else {"tool_call_id": id})


def prompt(*messages, **said):
    """The prompt as text, special tokens and all."""
    ids = TEXT.encode(prompt_of(Conversation(list(messages), **said), TEXT))
    return TEXT.tokenizer.decode(ids, skip_special_tokens=False)


def refused(function, conversation, *arguments):
    with pytest.raises(BadRequest) as caught:
        function(conversation, *arguments)
    assert (caught.value.param or "").split(".")[0] in str(caught.value)
    return caught.value.param


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize(
    ("thinking", "prefix"), [("enabled", "<mm:think>"), ("adaptive", ""), ("disabled", "</mm:think>")]
)
def test_a_prompt_ends_where_the_answer_begins(thinking, prefix):
    assert prompt(SYSTEM, USER, thinking=thinking) == (
        f"]~!b[]~b]developer\nBe brief.[e~[\n]~b]user\nHello.[e~[\n]~b]ai\n{prefix}"
    )


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    assert prompt({"role": "user", "content": parts}) == prompt(USER)


def test_instructions_are_one():
    """The template reads one, and passes over the next in silence."""
    other = {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]}
    assert "developer\nBe brief.\n\nBe kind.[e~[\n]~b]user\nHello." in prompt(SYSTEM, other, USER)


def test_the_conversation_is_left_as_it_was():
    messages = [SYSTEM, SYSTEM, USER]
    prompt_of(Conversation(messages), TEXT)
    assert messages == [SYSTEM, SYSTEM, USER]


def test_tool_calls_and_results():
    text = prompt(USER, called(("1", {"a": 1, "b": [True]})), result("2", "1"), tools=[ADD])
    assert f'{NS}<invoke name="add">{NS}<a>1{NS}</a>{NS}<b>{NS}<item>true{NS}</item>{NS}</b>{NS}</invoke>' in text
    assert "]~b]tool\n<response>2</response>[e~[" in text
    assert '<tool>{"name": "add"}</tool>' in text


def test_results_come_in_the_order_of_their_calls():
    calls = called(("1", {}), ("2", {}), ("3", {}))
    text = prompt(USER, calls, result("c", "3"), result("a", "1"), result("b", "2"), USER, calls, result("d", "2"))
    assert "<response>a</response>\n<response>b</response>\n<response>c</response>[e~[\n]~b]user" in text
    assert "<response>d</response>" in text


def test_results_without_ids_stay_as_they_are():
    text = prompt(USER, called((None, {}), (None, {})), result("b"), result("a"))
    assert "<response>b</response>\n<response>a</response>" in text


def test_reasoning_is_kept():
    text = prompt(USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Why not?"}, USER)
    assert "<mm:think>Why not?</mm:think>Yes." in text


def test_a_tool_choice_of_none_hides_the_tools():
    assert prompt(USER, tools=[ADD], tool_choice="none") == prompt(USER)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["text"], "messages[0].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([USER, {"role": "function", "content": "a"}], "messages[1].role"),
        ([USER, SYSTEM], "messages[1].role"),
        ([SYSTEM, USER, {"role": "developer", "content": "a"}], "messages[2].role"),
        ([SYSTEM, {"role": "root", "content": "a"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        (
            [USER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[1].content[0]",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}], "messages[0].content[1]"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0].text"),
        ([SYSTEM, {"role": "system", "content": [{"type": "image"}]}], "messages[1].content[0]"),
        ([USER, result("1")], "messages[1]"),
        ([USER, {"role": "assistant", "content": "a"}, result("1")], "messages[2]"),
        ([USER, called(("1", {})), result("1", "1"), USER, result("1", "1")], "messages[4]"),
        ([USER, called(("1", {})), result("1", "2")], "messages[2].tool_call_id"),
        ([USER, called(("1", '{"a": 1}'))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, called(("1", {}), ("2", None))], "messages[1].tool_calls[1].function.arguments"),
        ([USER, called(("1", [1]))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, {"role": "assistant", "tool_calls": {}}], "messages[1].tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": ["add"]}], "messages[1].tool_calls[0].function"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}],
            "messages[1].tool_calls[0].function.name",
        ),
    ],
)
def test_messages_that_are_refused(messages, param):
    assert refused(prompt_of, Conversation(messages), TEXT) == param


def test_images_are_refused_in_plain_words():
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(BadRequest, match=r"messages\[0\]\.content\[0\]: this server takes text only, no images"):
        prompt_of(Conversation([message]), TEXT)


def test_a_conversation_that_the_template_refuses():
    text = Text(TEXT.tokenizer, template="{{ raise_exception('not today') }}")
    with pytest.raises(BadRequest, match="not today"):
        prompt_of(Conversation([USER]), text)


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"tools": ["add"]}, "tools[0]"),
        ({"tools": [ADD, {"type": "function"}]}, "tools[1]"),
        ({"tools": [{"type": "web_search", "function": {"name": "a"}}]}, "tools[0]"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": 'a"b'}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [ADD, WEATHER, ADD]}, "tools[2].function.name"),
        ({"tools": [{"function": {"name": "a", "parameters": [7]}}]}, "tools[0].function.parameters"),
        ({"tools": [ADD], "tool_choice": {"name": "weather"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": 7}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"name": "add"}}, "tool_choice"),
    ],
)
def test_tools_that_are_refused(said, param):
    conversation = Conversation([USER], **said)
    assert refused(prompt_of, conversation, TEXT) == param
    assert refused(grammar_of, conversation) == param


# ---------------------------------------------------------------------------------------------------------------------
# Grammars (what they allow: test_grammars.py)


@pytest.mark.parametrize(
    "said", [{}, {"tools": [ADD]}, {"tools": [ADD], "tool_choice": "none"}, {"tools": [], "tool_choice": "none"}]
)
def test_where_any_text_will_do_there_is_no_grammar(said):
    assert grammar_of(Conversation([USER], **said)) is None


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "json_schema", "schema": "text"}, "response_format"),
        ({"type": "json_schema", "schema": False}, "response_format"),
        ({"type": "json_schema", "schema": {"not": {}}}, "response_format"),
        ({"type": "json_schema", "schema": {"type": "string", "format": "nonsense"}}, "response_format"),
        ({"type": "json_schema", "schema": {"type": "string", "pattern": "("}}, "response_format"),
        ({"type": "json_schema", "schema": {"$ref": "https://example.org/schema"}}, "response_format"),
        ({"type": "json_schema", "schema": {"minimum": float("nan"), "type": "number"}}, "response_format"),
    ],
)
def test_formats_that_are_refused(response_format, param):
    assert refused(grammar_of, Conversation([USER], response_format=response_format)) == param


def test_a_schema_that_nests_too_deeply_is_refused():
    schema = {}
    for _ in range(5000):
        schema = {"properties": {"a": schema}, "required": ["a"]}
    tool = {"function": {"name": "add", "parameters": schema}}
    refused(grammar_of, Conversation([USER], response_format={"type": "json_schema", "schema": schema}))
    assert refused(grammar_of, Conversation([USER], tools=[tool], tool_choice="required")) == "tools"


def test_a_required_property_that_no_tag_can_name_is_refused():
    def tool(required):
        parameters = {"properties": {"a<b": {}, "c": {}}, "required": required}
        return {"function": {"name": "add", "parameters": parameters}}

    assert refused(grammar_of, Conversation([USER], tools=[tool(["a<b"])], tool_choice="required")) == "tools"
    assert "a<b" not in grammar_of(Conversation([USER], tools=[tool(["c"])], tool_choice="required"))
