"""m3dist.gateway.answer: from token ids to reasoning, content and tool calls, for every way of cutting the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3dist import tiny
from m3dist.gateway.answer import Answer, Content, Reasoning, ToolCall
from m3dist.gateway.chat import Conversation
from m3dist.options import THINKING
from m3dist.text import END_THINK, THINK, StopStrings, Text, split_reasoning
from m3dist.text import TOOL as NS
from m3dist.tiny.dialogues import call_text, held_out

TEXT = Text.load(tiny.PATH)
VOCABULARY = TEXT.tokenizer.get_vocab_size()
BYTE_IDS = {TEXT.token_bytes(id): id for id in range(VOCABULARY) if len(TEXT.token_bytes(id)) == 1}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
BLOCK = call_text(
    [{"name": "weather", "arguments": {"city": "Rome", "days": 2}}, {"name": "weather", "arguments": {"city": "Oslo"}}]
)


def conversation(**said):
    return Conversation(**{"messages": [], "tools": [WEATHER], "thinking": "disabled", **said})


def as_byte_tokens(text):
    """One token a byte: every character and marker is split as far as it goes."""
    return [BYTE_IDS[bytes([byte])] for byte in text.encode()]


def read(ids, *arguments):
    """(reasoning, content, [(name, arguments) of each call]) of an answer, and the answer."""
    answer = Answer(TEXT, *arguments)
    events = [event for id in ids for event in answer.feed(id)] + answer.finish()
    return joined(events), answer


def joined(events):
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    content = "".join(event.text for event in events if isinstance(event, Content))
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    assert all(event.text for event in events if not isinstance(event, ToolCall))
    return reasoning, content, [(call.name, call.arguments) for call in calls]


def read_text(text, *arguments):
    """The same, of a text; its cut into tokens does not matter."""
    found, answer = read(TEXT.encode(text), *arguments)
    again, other = read(as_byte_tokens(text), *arguments)
    assert again == found
    assert [other.finish_reason(reason) for reason in ("stop", "length")] == [
        answer.finish_reason(reason) for reason in ("stop", "length")
    ]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning, content, tool calls


@pytest.mark.parametrize(
    ("thinking", "text"),
    [
        ("enabled", f"Hm.{END_THINK}Well.{BLOCK}"),
        ("adaptive", f"{THINK}Hm.{END_THINK}Well.{BLOCK}"),
    ],
)
def test_reasoning_content_and_calls(thinking, text):
    expected = ("Hm.", "Well.", [("weather", {"city": "Rome", "days": 2}), ("weather", {"city": "Oslo"})])
    assert read_text(text, conversation(thinking=thinking)) == expected


def test_a_tool_call_ends_the_reasoning():
    assert read_text(f"Hm.{BLOCK}", conversation(thinking="enabled"))[0] == "Hm."
    assert len(read_text(f"Hm.{BLOCK}", conversation(thinking="enabled"))[2]) == 2


def test_reasoning_that_does_not_end():
    assert read_text(f"Hm. {END_THINK[:-1]}", conversation(thinking="enabled")) == (f"Hm. {END_THINK[:-1]}", "", [])


@pytest.mark.parametrize("said", [{"tool_choice": "none"}, {"tools": None}, {"tools": []}])
def test_without_tools_their_syntax_is_text(said):
    assert read_text(f"{END_THINK}Well.{BLOCK} more", conversation(**said)) == ("", f"Well.{BLOCK} more", [])


def test_without_a_conversation_all_is_content():
    text = f"{THINK}Hm.{END_THINK}Well.{BLOCK} more"
    assert read_text(text) == ("", text, [])


def test_text_after_the_calls_is_dropped_and_ends_the_answer():
    found, answer = read(TEXT.encode(f"{BLOCK} more"), conversation())
    assert found[1] == ""
    assert answer.stopped


def test_without_parallel_calls_the_first_ends_the_answer():
    ids = TEXT.encode(BLOCK)
    answer = Answer(TEXT, conversation(parallel_tool_calls=False))
    fed = 0
    events = []
    while not answer.stopped:
        events += answer.feed(ids[fed])
        fed += 1
    assert TEXT.decode(ids[:fed]) == BLOCK[: BLOCK.index("</invoke>") + len("</invoke>")]
    assert joined(events + answer.finish())[2] == [("weather", {"city": "Rome", "days": 2})]
    assert answer.finish_reason("stop") == "tool_calls"


def test_calls_of_one_token_are_one_when_they_are_not_parallel():
    """A token may close two calls: the second is none."""
    answer = Answer(TEXT, conversation(parallel_tool_calls=False))
    assert joined(answer._events(BLOCK))[2] == [("weather", {"city": "Rome", "days": 2})]


answers = st.lists(
    st.sampled_from([THINK, END_THINK, NS, BLOCK, "<mm:", "</mm:thin", "]<", "hm", "so", "<tool_call>", "é", "STOP"]),
    max_size=8,
).map("".join)


@given(answers, st.sampled_from(THINKING), st.booleans(), st.sampled_from([(), ("STOP",), ("so", "mh")]))
def test_the_cut_into_tokens_does_not_matter(text, thinking, tools, stop):
    read_text(text, conversation(thinking=thinking, tools=[WEATHER] if tools else None, stop=stop))


@given(answers, st.sampled_from(THINKING))
def test_reasoning_and_content_are_split_as_everywhere(text, thinking):
    assert read_text(text, conversation(thinking=thinking, tools=None))[:2] == split_reasoning(text, thinking)


@given(st.lists(st.integers(0, VOCABULARY + 20), max_size=20))
def test_any_tokens(ids):
    assert read(ids)[0] == ("", TEXT.decode(ids), [])


def test_what_the_tiny_model_learnt():
    questions = [question for question in held_out() if question.kind == "tool_call"]
    assert len(questions) == 12
    for question in questions:
        reasoning, content, calls = read_text(
            question.answer, Conversation(question.messages, question.tools, thinking=question.thinking)
        )
        written = [{"name": name, "arguments": arguments} for name, arguments in calls]
        assert question.answer.endswith(content + call_text(written))
        assert question.answer.split(END_THINK)[0].removeprefix(THINK) in (reasoning, question.answer)
        for name, arguments in calls:
            schema = conversation(tools=question.tools).schemas()[name]
            kinds = {"string": str, "integer": int}
            assert {key: kinds[value["type"]] for key, value in schema["properties"].items()} == {
                key: type(value) for key, value in arguments.items()
            }


# ---------------------------------------------------------------------------------------------------------------------
# Stop strings


def test_a_stop_string_ends_the_content_and_is_not_shown():
    found, answer = read(TEXT.encode("One. STOP two."), conversation(stop=("STOP",)))
    assert found == ("", "One. ", [])
    assert answer.stopped
    assert answer.finish_reason("length") == "stop"


def test_a_stop_string_in_the_reasoning_does_not_end_the_answer():
    said = conversation(thinking="enabled", stop=("STOP",))
    assert read_text(f"I STOP here.{END_THINK}Well. STOP", said) == ("I STOP here.", "Well. ", [])


def test_a_stop_string_does_not_cut_a_call():
    assert len(read_text(f"Well.{BLOCK}", conversation(stop=("Rome", "</invoke>")))[2]) == 2


def test_a_stop_string_before_a_call_leaves_it_out():
    assert read_text(f"Well. STOP{BLOCK}", conversation(stop=("STOP",))) == ("", "Well. ", [])


def test_the_beginning_of_a_stop_string_before_a_call_is_shown():
    expected = ("", "Well. STO", [("weather", {"city": "Rome", "days": 2}), ("weather", {"city": "Oslo"})])
    assert read_text(f"Well. STO{BLOCK}", conversation(stop=("STOP",))) == expected
    assert read_text(f"Well. STO{NS}<tool_call>{NS}</bad>", conversation(stop=("STOP",)))[1] == "Well. STO"


def test_given_stop_strings_go_before_the_conversation_s():
    assert read_text("a b c", conversation(stop=("b",)), ("c",)) == ("", "a b ", [])
    assert read_text("a b c", None, ("b",)) == ("", "a ", [])


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings(text, stop, data):
    """Read character by character, the first stop string that is complete ends the text."""
    ends = [(end, s) for end in range(len(text) + 1) for s in stop if text[:end].endswith(s)]
    first = min(ends, key=lambda found: (found[0], -len(found[1])), default=None)
    expected = text if first is None else text[: first[0] - len(first[1])]
    stops = StopStrings(stop)
    shown = ""
    at = 0
    while at < len(text):
        end = data.draw(st.integers(at + 1, len(text)))
        shown += stops.feed(text[at:end])
        assert expected.startswith(shown)
        at = end
    assert shown + stops.feed("", last=True) == expected
    assert stops.stopped == (first is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Why it ended


@pytest.mark.parametrize(
    ("text", "engine", "reason"),
    [
        ("Well.", "stop", "stop"),
        ("Well.", "length", "length"),
        (BLOCK, "stop", "tool_calls"),
        (BLOCK, "length", "tool_calls"),
        (BLOCK[:-1], "stop", "tool_calls"),
        (BLOCK[:-1], "length", "length"),
        (BLOCK[:40], "stop", "stop"),
        (f"{NS}<tool_call>{NS}</bad>", "stop", "stop"),
        ("Well. STOP", "length", "stop"),
    ],
)
def test_finish_reason(text, engine, reason):
    answer = read(TEXT.encode(text), conversation(stop=("STOP",)))[1]
    assert answer.finish_reason(engine) == reason
