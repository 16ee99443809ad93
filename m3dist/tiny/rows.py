"""Dialogues as rows of tokens: rendering by the chat template, and which tokens the model has to answer."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from m3dist.tiny import files
from m3dist.tiny.dialogues import Dialogue, Question, train_dialogues

# Length and number of rows of a batch. Short ones fit the sparse budget, so their attention is plain.
BUCKETS = ((128, 256), (320, 80), (768, 32))


def fail(message: str) -> None:
    """The template's way to refuse a conversation."""
    raise ValueError(message)


class Encoder:
    """The chat template and the tokenizer of a checkpoint folder."""

    def __init__(self, folder: Path):
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = fail
        self.template = environment.from_string((folder / files.TEMPLATE).read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.turn = self.tokenizer.encode("]~b]ai\n", add_special_tokens=False).ids
        self.end = self.tokenizer.token_to_id(files.END)

    def encode(self, text: str) -> list[int]:
        """The tokens of a rendered text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def question(self, question: Question) -> tuple[list[int], list[int]]:
        """The tokens of a question's prompt and of its right answer, turn end included."""
        prompt = self.template.render(
            messages=question.messages,
            tools=question.tools,
            thinking_mode=question.thinking,
            add_generation_prompt=True,
        )
        return self.encode(prompt), self.encode(question.answer + files.END)

    def dialogue(self, talk: Dialogue) -> tuple[list[int], list[bool]]:
        """A dialogue's tokens, and which of them the model has to produce itself."""
        tokens = self.encode(self.template.render(messages=talk.messages, tools=talk.tools))
        wanted, width = [False] * len(tokens), len(self.turn)
        starts = [i + width for i in range(len(tokens) - width) if tokens[i : i + width] == self.turn]
        for start, mode in zip(starts, talk.modes, strict=True):
            # The generation prefix gives the first marker unless the mode leaves the choice to the model.
            first = start if mode == "adaptive" else start + 1
            end = tokens.index(self.end, start) + 1
            wanted[first:end] = [True] * (end - first)
        return tokens, wanted


def pack(rows: list[tuple[list[int], list[bool]]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens, and the mask of wanted tokens."""
    tokens = np.full((len(rows), length), files.SPECIAL.index(files.PAD), dtype=np.int16)
    wanted = np.zeros((len(rows), length), dtype=bool)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, : len(ids)], wanted[i, : len(ids)] = ids, mask
    return tokens, wanted


def batches(folder: Path, seed: int, share: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless training batches of about equal size, `share` of the full one."""
    encoder = Encoder(folder)
    waiting: dict[int, list] = {length: [] for length, _ in BUCKETS}
    for talk in train_dialogues(seed):
        row = encoder.dialogue(talk)
        for length, count in BUCKETS:
            if len(row[0]) <= length:
                waiting[length].append(row)
                if len(waiting[length]) >= max(1, int(count * share)):
                    yield pack(waiting[length], length)
                    waiting[length] = []
                break


def produce(queue: multiprocessing.Queue, folder: Path, seed: int, share: float) -> None:
    """A process that fills the queue."""
    for batch in batches(folder, seed, share):
        queue.put(batch)


def parallel_batches(folder: Path, workers: int, share: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches made by several processes, which end with this one."""
    queue: multiprocessing.Queue = multiprocessing.Queue(maxsize=8 * workers)
    for seed in range(workers):
        multiprocessing.Process(target=produce, args=(queue, folder, seed + 1, share), daemon=True).start()
    while True:
        yield queue.get()
