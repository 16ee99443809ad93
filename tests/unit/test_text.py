"""m3dist.text against naive oracles that see the whole text at once, and against transformers' chat template."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3dist import tiny
from m3dist.options import THINKING
from m3dist.text import END_THINK, THINK, TOOL, ReasoningSplitter, Text, TextError, TextStream, split_reasoning

TEXT = Text.load(tiny.PATH)
VOCABULARY = TEXT.tokenizer.get_vocab_size()
BYTE_IDS = {TEXT.token_bytes(id): id for id in range(VOCABULARY) if len(TEXT.token_bytes(id)) == 1}

any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def as_byte_tokens(text: str) -> list[int]:
    """One token a byte: every character is split as far as it goes."""
    return [BYTE_IDS[bytes([byte])] for byte in text.encode()]


# Whole words, characters in pieces, bytes that fit nothing, special tokens, ids beyond the tokenizer.
tokens = st.lists(
    st.one_of(
        any_text.map(TEXT.encode),
        any_text.map(as_byte_tokens),
        st.sampled_from(sorted(BYTE_IDS.values())).map(lambda id: [id]),
        st.integers(0, VOCABULARY + 20).map(lambda id: [id]),
    ),
    max_size=12,
).map(lambda parts: [id for part in parts for id in part])


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read character by character; end at the first moment a stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@st.composite
def stops_for(draw, text: str) -> list[str]:
    """Stop strings of which some occur in `text`, some only begin there, some overlap."""
    stops = draw(st.lists(st.text("aб]~e", min_size=1, max_size=4), max_size=3))
    if text:
        for _ in range(draw(st.integers(0, 2))):
            start = draw(st.integers(0, len(text) - 1))
            found = text[start : start + draw(st.integers(1, 8))]
            stops.append(found + draw(st.sampled_from(["", "x"])))
    return stops


def test_there_is_a_token_for_every_byte():
    assert len(BYTE_IDS) == 256


@given(tokens)
def test_token_bytes_join_to_decode(ids):
    assert b"".join(map(TEXT.token_bytes, ids)).decode(errors="replace") == TEXT.decode(ids)


@given(st.data(), tokens)
def test_stream_is_decode_cut_at_the_first_stop(data, ids):
    whole = TEXT.decode(ids)
    stops = data.draw(stops_for(whole))
    expected, stopped = cut_at_first_stop(whole, stops)
    stream = TextStream(TEXT, stops)
    shown = ""
    for id in ids:
        shown += stream.feed(id)
        assert expected.startswith(shown)  # nothing is ever taken back
    shown += stream.finish()
    assert (shown, stream.stopped, stream.text) == (expected, stopped, expected)


@given(any_text)
def test_stream_shows_a_character_as_soon_as_it_is_whole(text):
    stream = TextStream(TEXT)
    for character in text:
        pieces = [stream.feed(id) for id in as_byte_tokens(character)]
        assert pieces == [""] * (len(pieces) - 1) + [character]


def test_a_byte_that_can_never_be_completed_is_shown_at_once():
    stream = TextStream(TEXT)
    assert stream.feed(BYTE_IDS[b"\xff"]) == "\ufffd"
    assert stream.feed(BYTE_IDS[b"\xe2"]) == ""
    assert stream.feed(BYTE_IDS[b"a"]) == "\ufffda"
    assert stream.feed(BYTE_IDS[b"\xe2"]) == ""
    assert stream.finish() == "\ufffd"


def test_after_a_stop_nothing_more_is_shown():
    stream = TextStream(TEXT, ["b"])
    assert [stream.feed(id) for id in as_byte_tokens("abc")] == ["a", "", ""]
    assert stream.finish() == ""
    assert stream.stopped


def test_a_long_answer_costs_the_same_for_every_token():
    """20,000 tokens; decoding the whole text for each would take minutes."""
    stream = TextStream(TEXT, ["never this"])
    began = time.monotonic()
    for id in as_byte_tokens("never that, " * 1667):
        stream.feed(id)
    assert time.monotonic() - began < 5


@given(any_text)
def test_encode_decode_round_trip(text):
    assert TEXT.decode(TEXT.encode(text)) == text


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning

answers = st.lists(
    st.sampled_from([THINK, END_THINK, TOOL, "<mm:", "</mm:thin", "]<", "hm", "so", "<", "\n"]), max_size=8
).map("".join)


def split_whole(text: str, thinking: str) -> tuple[str, str]:
    """The rules of docs 7.3 with str.partition, and a tool call as an end of reasoning."""
    before = ""
    if thinking != "enabled":
        if text.startswith(END_THINK) or thinking == "disabled":
            return "", text.removeprefix(END_THINK)
        before, opened, text = text.partition(THINK)
        if not opened:
            return "", before
    ends = [at for at in (text.find(END_THINK), text.find(TOOL)) if at >= 0]
    if not ends:
        return text, before
    return text[: min(ends)], before + text[min(ends) :].removeprefix(END_THINK)


@given(answers, st.sampled_from(THINKING))
def test_split_reasoning(text, thinking):
    assert split_reasoning(text, thinking) == split_whole(text, thinking)


@given(st.data(), answers, st.sampled_from(THINKING))
def test_split_reasoning_in_pieces(data, text, thinking):
    expected = split_whole(text, thinking)
    splitter = ReasoningSplitter(thinking)
    reasoning = content = ""
    while text:
        size = data.draw(st.integers(1, len(text)))
        piece, text = text[:size], text[size:]
        more_reasoning, more_content = splitter.feed(piece)
        reasoning, content = reasoning + more_reasoning, content + more_content
        assert expected[0].startswith(reasoning) and expected[1].startswith(content)
    more_reasoning, more_content = splitter.finish()
    assert (reasoning + more_reasoning, content + more_content) == expected


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        ("enabled", "so</mm:think>yes", ("so", "yes")),
        ("enabled", "never closed", ("never closed", "")),
        ("enabled", f"so{TOOL}<tool_call>", ("so", f"{TOOL}<tool_call>")),
        ("adaptive", "</mm:think>yes<mm:think>", ("", "yes<mm:think>")),
        ("adaptive", "<mm:think>so</mm:think>yes", ("so", "yes")),
        ("adaptive", "yes", ("", "yes")),
        ("disabled", "</mm:think>yes</mm:think>", ("", "yes</mm:think>")),
    ],
)
def test_reasoning_examples(thinking, text, expected):
    assert split_reasoning(text, thinking) == expected


def test_unknown_thinking_is_refused():
    with pytest.raises(ValueError, match="thinking must be one of enabled, adaptive, disabled"):
        ReasoningSplitter("sometimes")


# ---------------------------------------------------------------------------------------------------------------------
# Template

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <b>Grüße</b> & weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
CONVERSATIONS = {
    "user": [{"role": "user", "content": "Hi & <b>"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning": "greet back"},
        {"role": "user", "content": "你好 👋"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
    ],
}


@pytest.mark.transformers
@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_render_and_ids_are_transformers(name, tools, thinking):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(tiny.PATH)
    messages = CONVERSATIONS[name]
    for prompt in (True, False):
        expected = reference.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, thinking_mode=thinking
        )
        assert TEXT.render(messages, thinking, tools, add_generation_prompt=prompt) == expected
    ids = reference.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, thinking_mode=thinking, return_dict=False
    )
    assert TEXT.prompt_ids(messages, thinking, tools) == ids


TEMPLATE_CASES = {
    "whitespace": "  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\nend",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}",
    "generation": "{% generation %}a{{ messages[0].content }}{% endgeneration %}b",
    "reasoning": "{{ messages[1].reasoning_content }}|{{ messages[1].thinking }}",
    "date": "{{ strftime_now('%Y') }}",
    "undefined": "{{ nothing }}{% if documents %}d{% endif %}{% if tools %}t{% endif %}",
}


@pytest.mark.transformers
@pytest.mark.parametrize("case", TEMPLATE_CASES)
def test_template_features_are_transformers(case):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(tiny.PATH)
    source, messages = TEMPLATE_CASES[case], CONVERSATIONS["turns"]
    special = {"bos_token": reference.bos_token, "eos_token": reference.eos_token}
    ours = Text(TEXT.tokenizer, template=source, special_tokens=special)
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, thinking_mode="adaptive")
    assert ours.render(messages, add_generation_prompt=False) == expected


def test_a_template_that_refuses_is_a_text_error():
    text = Text(TEXT.tokenizer, template="{{ raise_exception('no tool call before this') }}")
    with pytest.raises(TextError, match="cannot render this conversation: no tool call before this"):
        text.render([])


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[0].nothing.more }}", "{{ 'a' + 1 }}"])
def test_a_template_that_fails_is_a_text_error(source):
    with pytest.raises(TextError, match="cannot render this conversation"):
        Text(TEXT.tokenizer, template=source).render([{"role": "user", "content": "hi"}])


def test_a_template_may_not_reach_out_of_the_sandbox():
    text = Text(TEXT.tokenizer, template="{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(TextError):
        text.render([{"role": "user", "content": "hi"}])


def test_a_broken_template_names_the_line():
    with pytest.raises(TextError, match="chat template, line 2"):
        Text(TEXT.tokenizer, template="\n{% if %}").render([])


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tiny.PATH / "tokenizer.json").read_bytes())
    return tmp_path


def test_no_tokenizer(tmp_path):
    with pytest.raises(TextError, match="tokenizer.json: not found"):
        Text.load(tmp_path)


def test_a_tokenizer_that_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match="tokenizer.json: not a tokenizer"):
        Text.load(tmp_path)


def test_another_kind_of_tokenizer(directory):
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(content | {"decoder": {"type": "Fuse"}}))
    with pytest.raises(TextError, match="decoder must be ByteLevel, not Fuse"):
        Text.load(directory)


def test_no_template_says_raw(directory):
    text = Text.load(directory)
    with pytest.raises(TextError, match="no chat_template.jinja; use --raw"):
        text.render([{"role": "user", "content": "hi"}])


def test_template_in_tokenizer_config(directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ thinking_mode }}"}))
    assert Text.load(directory).render([], "disabled") == "disabled"


@pytest.mark.parametrize("template", [7, {"default": "x"}, [{"name": "default", "template": 7}]])
def test_a_template_that_is_no_text(directory, template):
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(TextError, match="tokenizer_config.json: chat_template must be text"):
        Text.load(directory)


def test_a_list_of_templates(directory):
    named = [7, {"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Text.load(directory).render([]) == "yes"


def test_a_template_in_another_encoding(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TextError, match="chat_template.jinja: cannot be read"):
        Text.load(directory)


def test_damaged_config_names_the_file(directory):
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(TextError, match="generation_config.json: cannot be read"):
        Text.load(directory)


def test_stop_ids_are_the_union(directory):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 9, "text_config": {"eos_token_id": 10}}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[e~["}}))
    assert Text.load(directory).stop_ids == {7, 8, 9, 10, TEXT.tokenizer.token_to_id("[e~[")}


@pytest.mark.parametrize("value", ["2", -1, True, [2, None]])
def test_a_bad_stop_id_names_the_field(directory, value):
    (directory / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": value}}))
    with pytest.raises(TextError, match="config.json: text_config.eos_token_id must be a token id"):
        Text.load(directory)


def test_the_tiny_checkpoint_stops_at_the_end_of_a_turn():
    assert TEXT.stop_ids == {TEXT.tokenizer.token_to_id("[e~[")}
