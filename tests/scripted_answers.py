"""What scripted ranks answer, given as text; and what they were asked, as text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripted_ranks import ScriptedRanks

import m3dist.tiny
from m3dist.engine.request import Request
from m3dist.text import TOOL, Text

TEXT = Text.load(Path(m3dist.tiny.__file__).parent / "checkpoint")
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


class Script:
    """`script.says(text)`: from here on each answer is `text`, and then ends. `script.asked()`: the last request."""

    def __init__(self, ranks: ScriptedRanks):
        self.ranks = ranks

    def says(self, text: str) -> None:
        self.ranks.submitted.clear()
        answer = TEXT.encode(text)

        def rule(prefix: Sequence[int]) -> int | None:
            prompts = [asked.prompt for asked in self.ranks.submitted]
            prompt = next(prompt for prompt in prompts if prompt == tuple(prefix[: len(prompt)]))
            done = len(prefix) - len(prompt)
            return answer[done] if done < len(answer) else None

        self.ranks.rule = rule

    def asked(self) -> Request:
        return self.ranks.submitted[-1]

    def prompt(self) -> str:
        """The last request's, with the special tokens."""
        return TEXT.tokenizer.decode(list(self.asked().prompt), skip_special_tokens=False)


def calls(*arguments: dict[str, Any], name: str = "weather") -> str:
    """The markup of calls of one tool, their arguments strings and numbers."""
    values = ["".join(f"{TOOL}<{key}>{value}{TOOL}</{key}>" for key, value in one.items()) for one in arguments]
    invokes = "".join(f'{TOOL}<invoke name="{name}">{value}{TOOL}</invoke>\n' for value in values)
    return f"{TOOL}<tool_call>\n{invokes}{TOOL}</tool_call>"


THOUGHT_AND_CALLS = "<mm:think>hm, ü</mm:think>Let me see." + calls({"city": "Paris", "days": 3}, {"city": "Rome"})
