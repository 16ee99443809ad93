"""`m3dist chat`: a conversation in the terminal, with a server that runs, or with one that it starts and ends. No MLX.

Without a terminal every line of standard input is a message, and only answers go to standard output.
"""

import json
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from m3dist.cluster.lifeline import LIFELINE
from m3dist.cluster.ssh import python_module
from m3dist.errors import M3Error
from m3dist.gateway.process import API_KEY
from m3dist.options import THINKING, ChatOptions
from m3dist.status import handed

LISTENING = re.compile(r"m3dist: listening on (\S+)")
LOOK = 0.2  # seconds between looks at a server that loads
LEAVE_LIMIT = 30.0  # seconds that our own server may take to end
PASTE = 0.05  # seconds between the lines of a pasted text, at most
# Without a word from the server; it sends a comment every ten seconds while it computes, and while ranks restart.
SILENCE = httpx.Timeout(60.0, connect=10.0)
BLOCK = '"""'
HELP = """\
  /clear            begin anew
  /system TEXT      what the model is told first; without TEXT, nothing
  /thinking MODE    whether it reasons first: enabled, adaptive or disabled
  /exit, Ctrl-D     leave;  Ctrl-C stops an answer
  A line that ends with \\ goes on in the next one; so does everything between two lines of \"\"\"."""
# A model's answer must not move the cursor, or change what the terminal shows elsewhere.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class AnswerError(M3Error):
    """The server refused a request, or broke an answer off; with the reason it gave."""


def main(options: ChatOptions, serve: Sequence[str]) -> int:
    """Chat until the end of the input. `serve`: the flags of the server to start where no `options.url` is given.

    Raises M3Error where there is no server, or it wants another key.
    """
    console = Console(highlight=False, soft_wrap=True)
    if options.url:
        return chat(options, console)
    with own_server(serve, console) as (url, key):
        return chat(replace(options, url=url, api_key=key, model=None), console)


def chat(options: ChatOptions, console: Console) -> int:
    """Chat with the server at `options.url`."""
    with Server(options) as server:
        talk = Conversation(server.first_model() if options.model is None else options.model, options)
        if sys.stdin.isatty():
            console.print(f"{talk.model} at {options.url}; /help shows what can be typed", style="dim")
        for message in messages(sys.stdin.isatty()):
            if message.startswith("/"):
                if not command(message, talk, console):
                    break
            else:
                exchange(message, talk, server, console)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What is typed


def messages(terminal: bool) -> Iterator[str]:
    """What the user says, until the end of the input; never empty. Ctrl-C throws away what is half typed."""
    if terminal:
        with suppress(ImportError):
            import readline  # which gives input() its keys and history

            readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            text = typed() if terminal else piped()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        if text.strip():
            yield text.strip()


def piped() -> str:
    """The next line of standard input. Raises EOFError at its end."""
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line


def typed() -> str:
    """A message from the terminal: a line, or as many as its ends, its quotes or a paste make it. Raises EOFError."""
    line = input("> ")
    if line.strip().startswith(BLOCK):
        return block(line.strip().removeprefix(BLOCK))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    while select.select([sys.stdin], [], [], PASTE)[0]:  # a terminal without bracketed paste gives it line by line
        lines.append(input())
    return "\n".join(lines)


def block(line: str) -> str:
    """The lines up to one that ends with quotes."""
    lines = [line]
    while not lines[-1].rstrip().endswith(BLOCK):
        lines.append(input(". "))
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines)


def command(text: str, talk: "Conversation", console: Console) -> bool:
    """Do what a line that begins with / says; false at the end of the chat."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return False
    if name == "/clear":
        talk.turns.clear()
    elif name == "/system":
        talk.system = rest
    elif name == "/thinking" and rest in THINKING:
        talk.thinking = rest
    elif name == "/help":
        console.print(HELP, style="dim", markup=False)
    else:
        wanted = f"/thinking {', '.join(THINKING)}" if name == "/thinking" else "/help shows what can be typed"
        complain(wanted)
    return True


def complain(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, style="red", markup=False)


# ---------------------------------------------------------------------------------------------------------------------
# The conversation


class Conversation:
    """What was said, and what the next request says beside it."""

    def __init__(self, model: str, options: ChatOptions):
        self.model, self.options = model, options
        self.system, self.thinking = options.system, options.thinking
        self.turns: list[dict[str, str]] = []

    def request(self) -> dict[str, Any]:
        """The body of a chat completion. What is None stays out: the server decides."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        wanted = {
            "max_tokens": self.options.max_tokens,
            "temperature": self.options.temperature,
            "chat_template_kwargs": self.thinking and {"thinking_mode": self.thinking},
        }
        body = {name: value for name, value in wanted.items() if value is not None}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, "messages": [*system, *self.turns], **stream, **body}


def exchange(message: str, talk: Conversation, server: "Server", console: Console) -> None:
    """One message and its answer. A message that got none is forgotten; one cut short by Ctrl-C is kept as far as it
    came."""
    talk.turns.append({"role": "user", "content": message})
    answer = Answer(console)
    try:
        for event in server.answer(talk.request()):
            answer.add(event)
        answer.end()
    except KeyboardInterrupt:
        answer.end("stopped")
    except AnswerError as error:
        answer.end()
        complain(str(error))
    if answer.content:
        talk.turns.append(answer.turn())
    else:
        talk.turns.pop()


class Answer:
    """An answer while it comes: thinking dimmed, and on a terminal only."""

    def __init__(self, console: Console):
        self.console = console
        self.content = self.reasoning = ""
        self.usage: dict[str, Any] = {}
        self.began = time.monotonic()
        self.first: float | None = None

    def add(self, event: dict[str, Any]) -> None:
        """One chunk of the stream."""
        self.usage = event.get("usage") or self.usage
        delta = event["choices"][0]["delta"] if event.get("choices") else {}
        reasoning, content = delta.get("reasoning_content") or "", delta.get("content") or ""
        if self.first is None and (reasoning or content):
            self.first = time.monotonic()
        if reasoning:
            self.reasoning += reasoning
            if self.console.is_terminal:
                self._show(reasoning, "dim")
        if content:
            if self.reasoning and not self.content and self.console.is_terminal:
                self.console.print()
            self.content += content
            self._show(content, "")

    def _show(self, text: str, style: str) -> None:
        self.console.print(Text(CONTROL.sub("", text), style), end="")

    def end(self, how: str = "") -> None:
        """Below the answer, on a terminal, what it took."""
        if self.first is not None:
            self.console.print()
        if self.console.is_terminal:
            self.console.print(", ".join(filter(None, [how, *self._costs()])), style="dim")

    def _costs(self) -> Iterator[str]:
        if self.usage:
            cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            yield f"prompt {self.usage['prompt_tokens']} tokens" + (f" ({cached} of them cached)" if cached else "")
            yield f"answer {self.usage['completion_tokens']}"
        if self.first is not None:
            yield f"the first after {self.first - self.began:.2f} s"
            count, seconds = self.usage.get("completion_tokens", 0), time.monotonic() - self.first
            if count > 1 and seconds > 0:
                yield f"then {(count - 1) / seconds:.1f} tokens/s"

    def turn(self) -> dict[str, str]:
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"role": "assistant", "content": self.content} | reasoning


# ---------------------------------------------------------------------------------------------------------------------
# The server


class Server:
    """A server that speaks OpenAI's API, at `options.url`, with or without the /v1 at its end."""

    def __init__(self, options: ChatOptions):
        self.url = (options.url or "").rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=SILENCE)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def first_model(self) -> str:
        """Raises AnswerError."""
        try:
            response = self._client.get("/v1/models")
            check(response)
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise AnswerError(f"--url {self.url}: no server that lists its models there: {error}") from None

    def answer(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The stream's events. Raises AnswerError."""
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=request) as response:
                check(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if data != line:
                        event = json.loads(data)
                        if "error" in event:
                            raise AnswerError(str(event["error"].get("message")))
                        yield event
        except (httpx.HTTPError, ValueError) as error:
            raise AnswerError(f"{self.url}: {type(error).__name__}: {error}") from None
        raise AnswerError(f"{self.url}: the answer broke off")


def check(response: httpx.Response) -> None:
    """Raises AnswerError, with the server's own words, unless it went well."""
    if response.is_success:
        return
    response.read()
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        reason = response.text[:200] or response.reason_phrase
    again = response.headers.get("retry-after")
    advice = {401: f"; give --api-key-file or {API_KEY}"}.get(
        response.status_code, f"; again in {again} s" * bool(again)
    )
    raise AnswerError(f"{reason} ({response.status_code}){advice}")


@contextmanager
def own_server(flags: Sequence[str], console: Console) -> Iterator[tuple[str, str]]:
    """Start `m3dist serve` for us alone: its address and key, once it is ready. It ends with us, however we do.

    Raises M3Error with what it said, where it fails.
    """
    key, (lifeline, held) = secrets.token_urlsafe(24), os.pipe()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, *python_module("m3dist"), "serve", *flags, "--port", "0", "--drain", "0"],
            env=os.environ | {API_KEY: key, LIFELINE: handed(lifeline)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            pass_fds=[lifeline],
            start_new_session=True,  # Ctrl-C is for us
        )
        os.close(lifeline)
        try:
            url = wait_until_ready(process, key, console)
            if url is None:
                process.wait(LEAVE_LIMIT)
                said.seek(0)
                raise M3Error("the server did not start:\n" + said.read().decode(errors="replace").rstrip())
            yield url, key
        finally:
            end(process)
            os.close(held)


def wait_until_ready(process: "subprocess.Popen[str]", key: str, console: Console) -> str | None:
    """The server's address, once it takes requests; None where it ends instead."""
    assert process.stdout
    with console.status("starting") if console.is_terminal else nullcontext() as shown:
        found = LISTENING.match(process.stdout.readline())
        while found and process.poll() is None:
            with suppress(httpx.HTTPError, ValueError):
                health = httpx.get(f"{found[1]}/health", headers={"Authorization": f"Bearer {key}"}, timeout=SILENCE)
                state = health.json()
                if state["phase"] == "ready":
                    return found[1]
                if shown:
                    fraction = state.get("fraction")
                    shown.update(state["phase"] + (f" {fraction:.0%}" if fraction else ""))
            time.sleep(LOOK)
    return None


def end(process: "subprocess.Popen[str]") -> None:
    """The server and all that it started."""
    for signal_it in (process.terminate, process.terminate, process.kill):  # the second time it does not finish first
        with suppress(subprocess.TimeoutExpired):
            signal_it()
            process.wait(LEAVE_LIMIT / 2)
            return
    process.wait()
