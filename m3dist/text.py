"""Text to tokens and back: the tokenizer, the chat template, stop strings, and reasoning apart from content. No MLX.

`tokenizers` and `jinja2` are used directly: importing transformers takes a second on every rank.
"""

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from m3dist.errors import M3Error
from m3dist.options import THINKING

THINK = "<mm:think>"
END_THINK = "</mm:think>"
TOOL = "]<]minimax[>["  # precedes every tag of a tool call

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class TextError(M3Error):
    """A tokenizer, chat template or conversation that cannot be used; names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and template


class Text:
    """The text side of one checkpoint directory."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int] = (),
        template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self._template_source = template
        self._special_tokens = dict(special_tokens or {})
        self._token_bytes: dict[int, bytes] = {}
        self._hidden = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    @classmethod
    def load(cls, directory: str | Path) -> "Text":
        """Read tokenizer.json and, where present, chat_template.jinja and the configs that name the stop tokens.

        Raises TextError, naming the file.
        """
        directory = Path(directory)
        configs = {
            name: _read_json(directory / name)
            for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        }
        tokenizer = _read_tokenizer(directory / "tokenizer.json")
        special_tokens = _special_tokens(configs["tokenizer_config.json"])
        stop_ids = _stop_ids(configs)
        if "eos_token" in special_tokens and (id := tokenizer.token_to_id(special_tokens["eos_token"])) is not None:
            stop_ids.add(id)
        return cls(tokenizer, stop_ids, _read_template(directory, configs["tokenizer_config.json"]), special_tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which special tokens are recognised; none is added.

        As a batch of one: only batches let other threads run meanwhile, and a megabyte takes a second.
        """
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, id: int) -> bytes:
        """The bytes token `id` adds to the text: none for a special token or one beyond the tokenizer's."""
        if id not in self._token_bytes:
            token = None if id in self._hidden else self.tokenizer.id_to_token(id)
            self._token_bytes[id] = _bytes_of(token or "")
        return self._token_bytes[id]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: str = "adaptive",
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as the model reads it. Raises TextError if there is no template or it refuses."""
        template = self._template
        try:
            return template.render(
                **self._special_tokens,
                messages=[_with_reasoning_content(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                thinking_mode=thinking,
            )
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise TextError(f"the chat template cannot render this conversation: {error}") from error

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: str = "adaptive",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of the conversation, up to where the model's answer begins."""
        return self.encode(self.render(messages, thinking, tools))

    @cached_property
    def _template(self) -> jinja2.Template:
        if self._template_source is None:
            raise TextError("this checkpoint has no chat_template.jinja; use --raw to give it the prompt as it is")
        try:
            return _template_environment().from_string(self._template_source)
        except jinja2.TemplateSyntaxError as error:
            raise TextError(f"chat template, line {error.lineno}: {error.message}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TextError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise TextError(f"{path}: must be a JSON object")
    return content


def _read_tokenizer(path: Path) -> Tokenizer:
    if not os.path.isfile(path):
        raise TextError(f"{path}: not found; copy it from the published checkpoint")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise TextError(f"{path}: not a tokenizer: {error}") from None
    # Only then are a token's bytes known without its neighbours, which streaming needs. All of MiniMax's are.
    if type(tokenizer.decoder).__name__ != "ByteLevel":
        raise TextError(f"{path}: decoder must be ByteLevel, not {type(tokenizer.decoder).__name__}")
    return tokenizer


def _read_template(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or what older checkpoints have: `chat_template` in tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: cannot be read: {error}") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise TextError(f"{directory / 'tokenizer_config.json'}: chat_template must be text, not {template!r}")
    return template


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """`eos_token` and its like, each stored as text or as an object with `content`."""
    found = {name: tokenizer_config.get(name) for name in SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in texts.items() if isinstance(token, str)}


def _stop_ids(configs: dict[str, dict[str, Any]]) -> set[int]:
    """The union of all `eos_token_id`, each a number or a list of them."""
    places = {
        "generation_config.json: eos_token_id": configs["generation_config.json"],
        "config.json: eos_token_id": configs["config.json"],
        "config.json: text_config.eos_token_id": configs["config.json"].get("text_config") or {},
    }
    ids = set()
    for place, config in places.items():
        value = config.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int and id >= 0 for id in listed):
            raise TextError(f"{place} must be a token id or a list of them, not {value!r}")
        ids.update(listed)
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# The template's world, as transformers makes it, so that a template renders the same text in both


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: marks the assistant's words for training; here just its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _template_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters, which the model never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _with_reasoning_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """Reasoning under the name that templates read, from whichever name the client used."""
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


# ---------------------------------------------------------------------------------------------------------------------
# Byte-level tokens: each byte is written as one printable character (GPT-2's table)


def _byte_of_character() -> dict[str, int]:
    """Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of(token: str) -> bytes:
    """The bytes of a token; an added token with a character outside the table is plain text."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


# ---------------------------------------------------------------------------------------------------------------------
# Streams: what may be shown now, and what must wait for more


def find_first(text: str, markers: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the marker that is complete first; of two that end together, the longer.

    Completion, not start, decides: the answer does not depend on how the text was cut into pieces.
    """
    found = [(at + len(marker), at) for marker in markers if (at := text.find(marker)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end


def held_back(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


class StopStrings:
    """Streamed text -> the text before the first stop string, see `find_first`."""

    def __init__(self, stop: Sequence[str]):
        self.found: str | None = None  # the stop string that came; the rest is ignored
        self._stop = tuple(stop)
        self._held = ""

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def feed(self, text: str, last: bool = False) -> str:
        """What is safe to show; a possible beginning of a stop string waits, unless no more text comes (`last`)."""
        if self.stopped:
            return ""
        pending = self._held + text
        if found := find_first(pending, self._stop):
            shown, end = found
            self.found = pending[shown:end]
        else:
            shown = len(pending) - (0 if last else held_back(pending, self._stop))
        self._held = pending[shown:]
        return pending[:shown]


class TextStream:
    """Tokens one by one -> text that is safe to show.

    The pieces of `feed` and `finish` join to `decode` of all the tokens, cut before the first stop string. Nothing
    shown is ever taken back: an incomplete character and a possible beginning of a stop string wait for more. The
    work for a token depends on its length and the stop strings', not on the text so far.
    """

    def __init__(self, text: Text, stop: Sequence[str] = ()):
        self._token_bytes = text.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(stop)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; the rest is ignored."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._pieces)

    def feed(self, id: int) -> str:
        """The text that token `id` makes safe to show; often empty."""
        return self._show(self._decoder.decode(self._token_bytes(id)), last=False)

    def finish(self) -> str:
        """No more tokens: the text that was held back."""
        return self._show(self._decoder.decode(b"", final=True), last=True)

    def _show(self, new: str, last: bool) -> str:
        self._pieces.append(self._stops.feed(new, last))
        return self._pieces[-1]


class ReasoningSplitter:
    """Streamed text -> (reasoning, content).

    enabled: the prompt opened the reasoning; all is reasoning until </mm:think>.
    adaptive: a leading </mm:think> is dropped and the rest is content; otherwise <mm:think>...</mm:think> is reasoning
    and what stands around it content.
    disabled: all is content, less a leading </mm:think>.

    A tool call also ends the reasoning: the model may begin one without closing the other.
    """

    def __init__(self, thinking: str):
        if thinking not in THINKING:
            raise ValueError(f"thinking must be one of {', '.join(THINKING)}, not {thinking!r}")
        self._after_start = "before" if thinking == "adaptive" else "content"
        self._state = "reasoning" if thinking == "enabled" else "start"
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """The (reasoning, content) that `text` makes certain; what may be part of a marker waits."""
        self._held += text
        return self._advance(last=False)

    def finish(self) -> tuple[str, str]:
        """No more text: the (reasoning, content) that was held back."""
        return self._advance(last=True)

    def _advance(self, last: bool) -> tuple[str, str]:
        reasoning = content = ""
        if self._state == "start":
            if not last and len(self._held) < len(END_THINK) and END_THINK.startswith(self._held):
                return "", ""
            self._state = "content" if self._held.startswith(END_THINK) else self._after_start
            self._held = self._held.removeprefix(END_THINK)
        if self._state == "before":
            content, marker = self._until((THINK,), last)
            if marker:
                self._state = "reasoning"
        if self._state == "reasoning":
            reasoning, marker = self._until((END_THINK, TOOL), last)
            if marker:
                self._state = "content"
            if marker == TOOL:
                self._held = TOOL + self._held
        if self._state == "content":
            content, self._held = content + self._held, ""
        return reasoning, content

    def _until(self, markers: Sequence[str], last: bool) -> tuple[str, str]:
        """Take the text before the first marker, and the marker; or, with none there, what cannot belong to one."""
        if found := find_first(self._held, markers):
            start, end = found
        else:
            start = end = len(self._held) - (0 if last else held_back(self._held, markers))
        text, marker, self._held = self._held[:start], self._held[start:end], self._held[end:]
        return text, marker


def split_reasoning(text: str, thinking: str) -> tuple[str, str]:
    """(reasoning, content) of a whole answer, by the rules of `ReasoningSplitter`."""
    splitter = ReasoningSplitter(thinking)
    pieces = [splitter.feed(text), splitter.finish()]
    return "".join(reasoning for reasoning, _ in pieces), "".join(content for _, content in pieces)
