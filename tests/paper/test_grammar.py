"""m3dist.engine.grammar over the tiny checkpoint's tokens: what masks allow, replay, and grammars meant to do harm."""

import json
import time

import numpy as np
import pytest
from llguidance import LLMatcher

from m3dist import tiny
from m3dist.engine import grammar as module
from m3dist.engine.grammar import KEPT, LONGEST, GrammarError, Grammars, check
from m3dist.text import END_THINK, THINK, Text

TEXT = Text.load(tiny.PATH)
KNOWN = TEXT.tokenizer.get_vocab_size()
VOCABULARY = KNOWN + 21  # a model's is often padded, and not to whole words of a mask
STOPS = {2, 3}
TOKENIZER = (tiny.PATH / "tokenizer.json").read_text()
GRAMMARS = Grammars(TOKENIZER, STOPS, VOCABULARY)
SPECIAL = {0, 1, 2, 3}
THOUGHT = f"""start: thought? answer
thought: "{THINK}" reasoning
reasoning[suffix="{END_THINK}"]: /(?s:.*)/
"""


def of_json(schema) -> str:
    return f"start: %json {json.dumps(schema)}\n"


def allowed(matcher) -> set[int]:
    mask = matcher.mask()
    assert len(mask) == 4 * -(-VOCABULARY // 32)
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist())


def pieces(text: str) -> list[int]:
    """Every character by itself, so that no marker comes in one token."""
    return [id for character in text for id in TEXT.encode(character)]


def walk(grammar: str, ids: list[int]):
    """The matcher after `ids`, each of which its mask allowed."""
    matcher = GRAMMARS.compile(grammar)
    for id in ids:
        assert id in allowed(matcher), TEXT.decode([id])
        matcher.took(id)
    return matcher


# -- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_is_what_the_grammar_says_of_every_token():
    """Against Python's own regular expressions, by trying each token's bytes."""
    grammar, digits = "start: /[0-9]{1,3}x?/", set("0123456789")
    matcher = GRAMMARS.compile(grammar)
    for token in TEXT.encode("7"):
        matcher.took(token)
    texts = {id: TEXT.token_bytes(id).decode("utf-8", "replace") for id in range(KNOWN)}
    fit = {id for id, t in texts.items() if t and len(t.rstrip("x")) <= 2 and len(t) - len(t.rstrip("x")) <= 1}
    fit = {id for id in fit if set(texts[id].rstrip("x")) <= digits}
    assert allowed(matcher) == fit | STOPS


def test_free_text_allows_all_but_special_tokens_and_padding():
    ids = allowed(GRAMMARS.compile("start: /(?s:.*)/"))
    assert ids & SPECIAL == STOPS and max(ids) < KNOWN
    assert {TEXT.tokenizer.token_to_id(THINK), TEXT.tokenizer.token_to_id(END_THINK)} <= ids


def test_only_a_stop_token_follows_the_end():
    matcher = walk(of_json({"const": {"a": 1}}), TEXT.encode('{"a":1}'))
    assert allowed(matcher) == STOPS
    matcher.took(3)
    assert allowed(matcher) == STOPS


def test_no_stop_before_the_end():
    for end in range(6):
        assert not STOPS & allowed(walk(of_json({"type": "object"}), pieces('{"a":1')[:end]))


@pytest.mark.parametrize(
    "answer",
    ['{"city": "Oslo", "days": 3}', '{\n  "city": "é\\n",\n  "days": -12\n}', '{"city":"","days":0}'],
)
def test_a_schema_s_texts_after_reasoning_or_without(answer):
    """In the tokenizer's own tokens, which the masks allow, and in pieces, as a model may spell them."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    grammar = THOUGHT + f"answer: %json {json.dumps(schema)}\n"
    for text in (answer, f'{THINK}a < b, {{"}} and </mm:{END_THINK}{answer}'):
        assert STOPS <= allowed(walk(grammar, TEXT.encode(text)))
        assert STOPS <= allowed(GRAMMARS.compile(grammar, pieces(text)))


def test_text_without_a_choice_comes_in_the_tokenizer_s_tokens():
    assert allowed(GRAMMARS.compile(f'start: "{THINK}" "a"')) == {TEXT.tokenizer.token_to_id(THINK)}


def test_text_that_spells_a_special_token_is_text():
    """Forced text is cut by the tokenizer, which must not make the turn's end of it."""
    turn_end = TEXT.tokenizer.id_to_token(2)
    assert allowed(walk(of_json({"const": f"a{turn_end}b"}), pieces(f'"a{turn_end}b"'))) == STOPS
    first = allowed(GRAMMARS.compile(f'start: "{turn_end}"'))
    assert first and not first & SPECIAL


# -- kept grammars -----------------------------------------------------------------------------------------------------


def test_answers_of_one_grammar_compile_it_once_and_go_their_own_ways(monkeypatch):
    compiled = []
    monkeypatch.setattr(module, "LLMatcher", lambda *rest, **more: compiled.append(rest[1]) or LLMatcher(*rest, **more))
    grammars, asked = Grammars(TOKENIZER, STOPS, VOCABULARY), 'start: "a" "b" | "c" "d"'
    begun = grammars.compile(asked, pieces("a"))
    assert allowed(begun) == set(pieces("b"))
    assert allowed(grammars.compile(asked, pieces("c"))) == set(pieces("d"))
    assert allowed(grammars.compile(asked)) >= set(pieces("ac"))
    begun.took(*pieces("b"))
    assert allowed(begun) == STOPS and compiled == [asked]
    for number in range(KEPT):
        grammars.compile(f'start: "{number}"')
    grammars.compile(asked)
    assert compiled.count(asked) == 2


# -- replay and errors ------------------------------------------------------------------------------------------------


def test_a_replay_goes_on_where_the_answer_was():
    grammar, ids = of_json({"type": "object"}), TEXT.encode('{"a": [1, "b"]}')
    for end in range(len(ids) + 1):
        assert allowed(GRAMMARS.compile(grammar, ids[:end])) == allowed(walk(grammar, ids[:end]))


def test_what_does_not_follow_is_an_error():
    ids = TEXT.encode("[1]")
    with pytest.raises(GrammarError, match=f"token {ids[0]} does not follow the grammar"):
        GRAMMARS.compile(of_json({"type": "object"}), ids)
    for token in (0, VOCABULARY - 1):  # special, padding
        with pytest.raises(GrammarError, match=f"token {token} does not follow"):
            GRAMMARS.compile("start: /(?s:.*)/").took(token)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: missing", 'unknown name: "missing"'),
        ("%%%", "lexer error"),
        (of_json({"type": "strin"}), "Invalid type: strin"),
        (of_json({"type": "string", "minLength": 5, "maxLength": 2}), "minLength"),
        (of_json({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ."uniqueItems"'),
        (of_json(False), "Unsatisfiable schema"),
    ],
)
def test_errors_say_what_is_wrong(grammar, message):
    for attempt in (GRAMMARS.compile, check):
        with pytest.raises(GrammarError, match=message) as caught:
            attempt(grammar)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_without_a_stop_token_there_are_no_grammars():
    with pytest.raises(GrammarError, match="eos_token_id"):
        Grammars(TOKENIZER, (), VOCABULARY).compile("start: /a*/")


# -- grammars meant to do harm ----------------------------------------------------------------------------------------


def chain(length: int, link) -> str:
    """A schema of definitions, each of which holds the next."""
    links = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return of_json({"$defs": {**links, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"})


def nested(depth: int, inner):
    for _ in range(depth):
        inner = {"items": inner}
    return inner


def lines(count: int, rule: str) -> str:
    return "start: r0\n" + "".join(rule.format(i, i + 1) + "\n" for i in range(count)) + f'r{count}: "a"\n'


HARM = {
    "nested": 'start: %json {"items":' + '{"items":' * 20_000 + "{}" + "}" * 20_001,
    "brackets": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "references": chain(15_000, lambda ref: ref),
    "arrays": chain(10_000, lambda ref: {"items": ref}),
    "deep arrays": chain(1_100, lambda ref: nested(40, ref)),
    "objects": chain(4_000, lambda ref: {"type": "object", "properties": {"a": ref, "b": ref}, "required": ["a"]}),
    "alternatives": chain(7_000, lambda ref: {"anyOf": [ref, {"type": "null"}]}),
    "rules": lines(24_000, 'r{}: "a" r{}'),
    "doubled rules": lines(300, "r{0}: r{1} r{1}"),
    "short rules": lines(30_000, "r{}: r{}"),
    "itself": of_json({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "multiples": of_json({"multipleOf": 1_234_567, "type": "integer"}),
    "many multiples": of_json({"properties": {f"p{i}": {"type": "number", "multipleOf": 900 + i} for i in range(99)}}),
    "a multiple of 1e400": 'start: %json {"type": "number", "multipleOf": 1e400}',
    "repeated": of_json({"type": "string", "pattern": "^(((a|b){0,999}){0,999}){0,999}$"}),
    "long": of_json({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "pattern": of_json({"type": "string", "pattern": "^(.*a.{25}|.*b.{26}){3}$"}),
    "properties": of_json({"type": "object", "properties": {f"f{i}": {"type": "string"} for i in range(2_000)}}),
    "too long": of_json({"enum": ["a" * 30] * (LONGEST // 30)}),
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_bounded(name):
    """Compiled or refused within seconds, in this process, which goes on; and so is every step of an answer."""
    began = time.monotonic()
    try:
        check(HARM[name])
        matcher = GRAMMARS.compile(HARM[name])
        for _ in range(20):
            token = max(allowed(matcher))
            if token in STOPS:
                break
            matcher.took(token)
    except GrammarError as error:
        assert len(str(error)) < 400
    assert time.monotonic() - began < 12  # a second alone on a core


def test_multiples_that_people_ask_for():
    numbers = (5, 100, 0.01, 0.25, 1000)
    schema = {"type": "object", "properties": {f"p{n}": {"type": "number", "multipleOf": n} for n in numbers}}
    check(of_json(schema))
    assert STOPS <= allowed(walk(of_json(schema), TEXT.encode('{"p5": 35, "p0.25": 1.75}')))
