"""An answer's token ids -> what a client reads: reasoning, content and tool calls, as they come. No MLX."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m3dist.gateway.chat import Conversation
from m3dist.gateway.tools import Call, ToolParser
from m3dist.text import ReasoningSplitter, StopStrings, Text, TextStream


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thoughts before the answer."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete tool call; `index` counts them from 0."""

    index: int
    id: str
    name: str
    arguments: dict[str, Any]


Event = Reasoning | Content | ToolCall


class Answer:
    """One answer as it comes. The events do not depend on how its text was cut into tokens, but for their pieces.

    Stop strings are looked for in the content alone: a client that stops at a blank line does not mean the thoughts,
    which it may never see, nor a tool's arguments, which are of no use cut off. (vLLM looks everywhere.)
    Tool calls are read where the conversation has tools and its tool_choice is not "none"; otherwise they are text.
    Without parallel_tool_calls the first call ends the answer.
    """

    def __init__(self, text: Text, conversation: Conversation | None = None, stop: Sequence[str] | None = None):
        """`conversation`: what is answered; None: a prompt that is none, and all of the answer is content as it is.

        `stop`: the stop strings; None: the conversation's.
        """
        self._splitter = None if conversation is None else ReasoningSplitter(conversation.thinking)
        conversation = conversation or Conversation(messages=[])
        self._stream = TextStream(text)
        self._tools = ToolParser(conversation.schemas()) if conversation.may_call else None
        self._parallel = conversation.parallel_tool_calls
        self._stops = StopStrings(conversation.stop if stop is None else stop)
        self._calls = 0

    @property
    def stopped(self) -> bool:
        """Nothing that comes can be shown any more: after a stop string, or the end of the tool calls."""
        return self._stops.stopped or (self._tools is not None and self._tools.ended) or self._called_once

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.found

    @property
    def _called_once(self) -> bool:
        return self._calls > 0 and not self._parallel

    def feed(self, token: int) -> list[Event]:
        """What token `token` makes certain; often nothing."""
        return [] if self.stopped else self._events(self._stream.feed(token))

    def finish(self) -> list[Event]:
        """No more tokens: what was held back. A tool call that is not complete is dropped."""
        return [] if self.stopped else self._events(self._stream.finish(), last=True)

    def finish_reason(self, engine: str) -> str:
        """ "stop", "length" or "tool_calls"; `engine` is the reason for which the engine ended the answer.

        An answer cut off in its tool calls ends for "length", though it may have complete ones.
        """
        if self._stops.stopped:
            return "stop"
        if engine == "length" and not self.stopped:
            return "length"
        return "tool_calls" if self._calls else "stop"

    def _events(self, text: str, last: bool = False) -> list[Event]:
        reasoning, content = "", text
        if self._splitter is not None:
            reasoning, content = self._splitter.feed(text)
            if last:
                more, rest = self._splitter.finish()
                reasoning, content = reasoning + more, content + rest
        calls: list[Call] = []
        if self._tools is not None:
            content, calls = self._tools.feed(content)
            content += self._tools.finish() if last else ""
        events: list[Event] = [Reasoning(reasoning)] if reasoning else []
        if content := self._stops.feed(content, last=last or (self._tools is not None and self._tools.opened)):
            events.append(Content(content))
        for call in calls:
            if not self._stops.stopped and not self._called_once:
                events.append(ToolCall(self._calls, f"call_{uuid.uuid4().hex[:24]}", call.name, call.arguments))
                self._calls += 1
        return events
