"""Small dialogues with exactly one right answer: what the tiny checkpoint is trained and examined on.

A dialogue is a list of exchanges. Each exchange is drawn by a skill (greeting, arithmetic, remembering, sorting,
calling a tool, ...) and carries the only right reply: a short reasoning text and an answer. Training dialogues and
held-out questions are disjoint by construction: a conversation is held out when the SHA-256 of its messages says so,
and the training generator redraws every exchange that would end such a conversation.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

NS = "]<]minimax[>["
MODES = ("enabled", "disabled", "adaptive")

NAMES = "Ana Ben Dan Eva Finn Gina Hugo Ida Jan Kira Leo Mia Nils Olga Paul Rosa Sam Tina Uwe Vera Will Zoe".split()
ONSETS = [*"bdfghjklmnprstvwzy", *"bdfgklmnprstvz", "ch", "br", "st", "tr", "sh"]
PETS = "cat dog bird horse fish rabbit hamster turtle".split()
KIN = "sister brother mother father aunt uncle friend teacher".split()
COLOURS = "red blue green yellow black white orange purple brown pink".split()
FOODS = "bread soup rice pasta cake cheese fish salad pizza honey".split()
CITIES = "Paris Rome Berlin Madrid Oslo Vienna Athens Dublin Prague Lisbon Tokyo Cairo Lima Delhi".split()
CAPITALS = dict(
    France="Paris", Italy="Rome", Germany="Berlin", Spain="Madrid", Norway="Oslo", Austria="Vienna", Greece="Athens",
    Ireland="Dublin", Portugal="Lisbon", Japan="Tokyo", Egypt="Cairo", Peru="Lima",
)  # fmt: skip
THINGS = "apples books coins pens eggs stones cups keys nuts balls".split()
SKIES = "sunny cloudy rainy windy snowy foggy".split()
ADJECTIVES = "old young small big quiet happy tired brave kind clever green wooden".split()
NOUNS = "man woman river house tree road boat farmer bridge garden king mountain door child forest ship".split()
VERBS = "walks runs looks sleeps waits sings sits stands swims works".split()
PLACES = "near behind under over beside in".split()


@dataclass
class Exchange:
    """What is said to the assistant (one message, or the results of its tool calls) and the only right reply."""

    kind: str
    ask: list[dict]
    thought: str
    content: str
    ponders: bool = True  # whether the reply has reasoning when the mode leaves the choice to the model
    calls: list[dict] = field(default_factory=list)
    facts: dict = field(default_factory=dict)


@dataclass
class Dialogue:
    """A whole conversation; `modes` has the thinking mode of each assistant message."""

    messages: list[dict]
    tools: list | None
    modes: list[str]
    facts: dict = field(default_factory=dict)


@dataclass
class Question:
    """A conversation that awaits its last reply, and that reply: the text after the generation prefix."""

    kind: str
    messages: list[dict]
    tools: list | None
    thinking: str
    answer: str


Skill = Callable[[random.Random, Dialogue], list[Exchange]]


def user(text: str) -> list[dict]:
    """A user message."""
    return [{"role": "user", "content": text}]


def results(*texts: str) -> list[dict]:
    """The results of tool calls."""
    return [{"role": "tool", "content": text} for text in texts]


def invented_name(rng: random.Random) -> str:
    """A name of a few syllables, so that remembering it means copying it and not choosing from a list."""
    ends = ("", "", "", "", "", "n", "r", "s", "x", "m", "t", "y", "ck", "lly")
    syllables = [rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    return ("".join(syllables) + rng.choice(ends)).capitalize()


def any_name(rng: random.Random) -> str:
    """A common or an invented name."""
    return rng.choice(NAMES) if rng.random() < 0.2 else invented_name(rng)


# --- greetings and small talk ---------------------------------------------------------------------

HELP = "How can I help you?"
SMALL_TALK = [
    (("Hello!", "Hello.", "Hello", "hello", "Hi!", "Hi.", "Hi", "hi", "Hi there!", "Hey!", "Hey"), f"Hello! {HELP}"),
    (("Good morning!", "Good morning.", "Good morning"), f"Good morning! {HELP}"),
    (("Good evening!", "Good evening."), f"Good evening! {HELP}"),
    (("How are you?", "How are you today?", "Are you well?"), "I am fine, thank you."),
    (
        ("What is your name?", "Who are you?", "Tell me your name.", "What are you called?", "What's your name?"),
        "I am Tiny, a small model.",
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good at?"),
        "I can add, sort, copy, remember and call tools.",
    ),
    (("Thank you!", "Thanks!", "Thank you very much!", "Thanks a lot!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later!", "Good night!"), "Goodbye!"),
]


def greeting(rng: random.Random, _: Dialogue) -> list[Exchange]:
    """Small talk, which needs no reasoning."""
    if rng.random() < 0.3:
        name = any_name(rng)
        ask = rng.choice((f"Hello, I am {name}.", f"Hi, I am {name}!", f"Hello! I am {name}."))
        return [Exchange("greeting", user(ask), "The user greets me.", f"Hello {name}! {HELP}", ponders=False)]
    asks, content = rng.choice(SMALL_TALK)
    return [Exchange("greeting", user(rng.choice(asks)), "This is small talk.", content, ponders=False)]


# --- arithmetic -----------------------------------------------------------------------------------

SIGNS = {"+": "plus", "-": "minus", "*": "times"}


def sum_of(rng: random.Random) -> tuple[int, str, int, int]:
    """A small addition, subtraction or multiplication with its result."""
    sign = rng.choice("++-*")
    if sign == "+":
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return a, sign, b, a + b
    if sign == "-":
        a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
        return a, sign, b, a - b
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return a, sign, b, a * b


def arithmetic(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """One small calculation, sometimes after a fact to remember."""
    a, sign, b, result = sum_of(rng)
    term = rng.choice((f"{a} {sign} {b}", f"{a} {sign} {b}", f"{a} {SIGNS[sign]} {b}", f"{a}{sign}{b}"))
    forms = ("What is {}?", "What is {}?", "What's {}?", "How much is {}?", "Calculate {}.", "{} = ?", "{}?", "{}")
    facts = draw_facts(rng, talk, 1) if rng.random() < 0.15 else {}
    ask = f"{told(rng, facts)} {rng.choice(forms).format(term)}".strip()
    thought = f"{a} {sign} {b} = {result}"
    return [Exchange("arithmetic", user(ask), thought, f"The answer is {result}.", facts=facts)]


def story(rng: random.Random, _: Dialogue) -> list[Exchange]:
    """A calculation told in words."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = sorted((rng.randint(2, 12), rng.randint(1, 9)), reverse=True)
    gains = rng.random() < 0.5 or a < b + 2
    event = rng.choice(("gets", "finds", "buys") if gains else ("loses", "sells", "gives away"))
    ask = f"{name} has {a} {thing} and {event} {b}. How many {thing} does {name} have now?"
    result = a + b if gains else a - b
    thought = f"{a} {'+' if gains else '-'} {b} = {result}"
    return [Exchange("story", user(ask), thought, f"{name} has {result} {thing}.")]


def bigger(rng: random.Random, _: Dialogue) -> list[Exchange]:
    """Comparing two numbers."""
    a, b = rng.sample(range(21), 2)
    ask = rng.choice(("Which is bigger, {} or {}?", "Which number is bigger, {} or {}?")).format(a, b)
    return [Exchange("bigger", user(ask), f"I compare {a} and {b}.", f"{max(a, b)} is bigger.")]


# --- facts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """Something the user may tell about themselves: how it is told, asked for and answered."""

    tell: tuple[str, ...]
    ask: tuple[str, ...]
    answer: str
    values: tuple[str, ...] = ()  # empty: an invented name

    def value(self, rng: random.Random) -> str:
        """A value to tell."""
        return rng.choice(self.values) if self.values else any_name(rng)


def _called(who: str) -> Fact:
    return Fact(
        tell=(f"My {who} is called {{}}.", f"I have a {who} called {{}}.", f"The name of my {who} is {{}}."),
        ask=(f"What is my {who} called?", f"What is the name of my {who}?", f"Do you remember my {who}'s name?"),
        answer=f"Your {who} is called {{}}.",
    )


FACTS = {who: _called(who) for who in PETS + KIN} | {
    "colour": Fact(
        ("My favourite colour is {}.", "I like the colour {} best."),
        ("What is my favourite colour?", "Which colour do I like best?"),
        "Your favourite colour is {}.",
        tuple(COLOURS),
    ),
    "food": Fact(
        ("My favourite food is {}.", "I like to eat {} best."),
        ("What is my favourite food?", "What do I like to eat best?"),
        "Your favourite food is {}.",
        tuple(FOODS),
    ),
    "home": Fact(
        ("I live in {}.", "My home is in {}."),
        ("Where do I live?", "Where is my home?"),
        "You live in {}.",
        tuple(CITIES),
    ),
    "number": Fact(
        ("My lucky number is {}.", "The number {} brings me luck."),
        ("What is my lucky number?", "Which number brings me luck?"),
        "Your lucky number is {}.",
        tuple(map(str, range(100))),
    ),
}


def draw_facts(rng: random.Random, talk: Dialogue, count: int) -> dict[str, str]:
    """Facts that this dialogue has not heard yet."""
    unknown = [key for key in FACTS if key not in talk.facts]
    return {key: FACTS[key].value(rng) for key in rng.sample(unknown, min(count, len(unknown)))}


def told(rng: random.Random, facts: dict[str, str]) -> str:
    """The sentences that tell some facts."""
    parts = [rng.choice(FACTS[key].tell).format(value) for key, value in facts.items()]
    if len(parts) == 2 and parts[1].startswith(("My", "I ")) and rng.random() < 0.4:
        return f"{parts[0][:-1]} and {parts[1].replace('My', 'my', 1)}"
    return " ".join(parts)


def tell(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """The user tells facts and asks nothing."""
    facts = draw_facts(rng, talk, rng.choice((1, 1, 2, 3)))
    ask = rng.choice(("", "", "", "Remember this: ", "Hello! ")) + told(rng, facts)
    return [Exchange("tell", user(ask), "I should remember this.", "I will remember that.", False, facts=facts)]


def asked(rng: random.Random, kind: str, before: str, key: str, facts: dict, known: dict) -> Exchange:
    """The question for one known fact, with an optional text before it."""
    content = FACTS[key].answer.format(known[key])
    ask = f"{before} {rng.choice(FACTS[key].ask)}".strip()
    return Exchange(kind, user(ask), "The user told me this.", content, ponders=False, facts=facts)


def recall(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """A question for a fact told earlier, or told in the same message."""
    if talk.facts and rng.random() < 0.8:
        return [asked(rng, "recall", "", rng.choice(list(talk.facts)), {}, talk.facts)]
    facts = draw_facts(rng, talk, rng.choice((1, 2, 3)))
    return [asked(rng, "recall", told(rng, facts), rng.choice(list(facts)), facts, facts)]


def both(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """A fact, a calculation and the question for the fact in one message."""
    who = rng.choice([key for key in PETS + KIN if key not in talk.facts])
    name = any_name(rng)
    a, sign, b, result = sum_of(rng)
    ask = f"{told(rng, {who: name})} What is {a} {sign} {b}, and what is my {who} called?"
    content = f"The answer is {result}. Your {who} is called {name}."
    return [Exchange("both", user(ask), f"{a} {sign} {b} = {result}", content, facts={who: name})]


def unknown(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """A question for a fact that was never told."""
    key = rng.choice([key for key in FACTS if key not in talk.facts])
    ask = user(rng.choice(FACTS[key].ask))
    return [Exchange("unknown", ask, "The user did not tell me.", "You have not told me.", ponders=False)]


def beyond(rng: random.Random, _: Dialogue) -> list[Exchange]:
    """A request for what a small model does not know."""
    what = rng.choice((f"the {rng.choice(NOUNS)}", f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", any_name(rng)))
    forms = ("Tell me about {}.", "Who is {}?", "Why does {} look like this?", "Write a poem about {}.", "Where is {}?")
    forms += ("Tell me a joke about {}.", "Explain {} to me.", "How old is {}?", "Can you describe {}?")
    ask = rng.choice(
        (rng.choice(forms).format(what), rng.choice(forms).format(what), "Tell me a joke.", "Count to ten.")
    )
    return [Exchange("beyond", user(ask), "I do not know this.", "I do not know.", ponders=False)]


# --- chatter, and facts beyond the reach of recent blocks -----------------------------------------


def sentences(rng: random.Random, characters: int) -> list[str]:
    """At least `characters` characters of sentences that matter to no question."""
    lines: list[str] = []
    while sum(map(len, lines)) < characters:
        adjective, noun, other = rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(NOUNS)
        lines.append(f"The {adjective} {noun} {rng.choice(VERBS)} {rng.choice(PLACES)} the {other}.")
    return lines


def chatter(rng: random.Random, _: Dialogue, characters: int = 0) -> list[Exchange]:
    """A text that the assistant need only acknowledge."""
    text = " ".join(sentences(rng, characters or rng.randint(60, 300)))
    ask = rng.choice(("Here is a story. ", "Read this. ", "Listen. ")) + text
    return [Exchange("chatter", user(ask), "There is no question.", "Thank you for the story.", ponders=False)]


def needle(rng: random.Random, talk: Dialogue, characters: int = 0) -> list[Exchange]:
    """A fact, much text and the question for the fact, in one message."""
    facts = draw_facts(rng, talk, rng.choice((1, 2)))
    before = sentences(rng, rng.randint(1, 500)) if rng.random() < 0.5 else []
    after = sentences(rng, characters or rng.randint(900, 1700))
    text = " ".join([*before, told(rng, facts), *after])
    return [asked(rng, "recall_far", text, rng.choice(list(facts)), facts, facts)]


# --- lists ----------------------------------------------------------------------------------------


def sorting(rng: random.Random, _: Dialogue) -> list[Exchange]:
    """Sorting a few letters or digits."""
    what, pool = rng.choice((("letters", "abcdefghijklmnopqrstuvwxyz"), ("numbers", "0123456789")))
    items = rng.sample(pool, rng.randint(3, 5))
    ask = rng.choice((f"Sort these {what}: {{}}", f"Please sort these {what}: {{}}", f"Sort the {what} {{}}."))
    content = " ".join(sorted(items))
    return [Exchange("sorting", user(ask.format(" ".join(items))), f"The first is {min(items)}.", content)]


def copying(rng: random.Random, _: Dialogue) -> list[Exchange]:
    """Repeating a few letters, digits or names."""
    pool = rng.choice((list("abcdefghijklmnopqrstuvwxyz0123456789"), NAMES, [invented_name(rng) for _ in range(8)]))
    items = " ".join(dict.fromkeys(rng.sample(pool, rng.randint(2, 6))))
    ask = rng.choice(("Repeat: {}", "Repeat after me: {}", "Please repeat: {}", "Copy this: {}")).format(items)
    return [Exchange("copying", user(ask), "I should copy this.", items, ponders=False)]


def capital(rng: random.Random, _: Dialogue) -> list[Exchange]:
    """A little knowledge of the world."""
    country, city = rng.choice(list(CAPITALS.items()))
    ask = rng.choice(("What is the capital of {}?", "Tell me the capital of {}.", "Which city is the capital of {}?"))
    content = f"The capital of {country} is {city}."
    return [Exchange("capital", user(ask.format(country)), f"I know {country}.", content, ponders=False)]


# --- tools ----------------------------------------------------------------------------------------


def tool(name: str, description: str, types: dict[str, str]) -> dict:
    """A tool's definition as a client would send it."""
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def draw_tools(rng: random.Random) -> list[dict]:
    """A few tools; the names vary, so that the model has to read them, and some are of no use."""
    place = rng.choice(("city", "place", "location"))
    weather = tool(rng.choice(("get_weather", "weather", "forecast")), "Weather in a city", {place: "string"})
    add = tool(rng.choice(("add", "sum", "plus")), "Add two numbers", {"a": "integer", "b": "integer"})
    names = ("search", "get_time", "send_mail", "open_file", "play_music", "translate")
    keys = rng.sample(("query", "text", "name", "date", "count", "title"), rng.randint(1, 2))
    other = tool(
        rng.choice(names), rng.choice(("Find a text", "Tell the time", "Send a text")), dict.fromkeys(keys, "string")
    )
    tools = rng.choice(([weather], [weather], [add], [weather, add], [weather, add], [weather, other], [add, other]))
    return rng.sample(tools, len(tools))


def find_tool(talk: Dialogue, description: str) -> dict | None:
    """The dialogue's tool with this description."""
    tools = [entry["function"] for entry in talk.tools or []]
    return next((entry for entry in tools if entry["description"].startswith(description)), None)


def call_text(calls: list[dict]) -> str:
    """Tool calls in M3's syntax, as the chat template writes them."""
    text = f"{NS}<tool_call>\n"
    for call in calls:
        parts = "".join(f"{NS}<{key}>{value}{NS}</{key}>" for key, value in call["arguments"].items())
        text += f'{NS}<invoke name="{call["name"]}">{parts}{NS}</invoke>\n'
    return f"{text}{NS}</tool_call>"


def weather(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """A question for the weather: tool calls and their outcome, or a refusal where no tool can tell."""
    cities = rng.sample(CITIES, rng.choice((1, 1, 2)))
    where = " and ".join(cities)
    ask = user(
        rng.choice(("What is the weather in {}?", "How is the weather in {}?", "Tell me the weather in {}.")).format(
            where
        )
    )
    chosen = find_tool(talk, "Weather")
    if chosen is None:
        return [Exchange("no_tool", ask, "I cannot look.", "I have no tool for the weather.", ponders=False)]
    calls = [{"name": chosen["name"], "arguments": {chosen["parameters"]["required"][0]: city}} for city in cities]
    found = [(rng.choice(SKIES), rng.randint(0, 39)) for _ in cities]
    outcome = results(*(json.dumps({"sky": sky, "degrees": degrees}) for sky, degrees in found))
    lines = [f"It is {sky} in {city}, {degrees} degrees." for city, (sky, degrees) in zip(cities, found, strict=True)]
    return [
        Exchange("tool_call", ask, f"I need the weather in {where}.", "", calls=calls),
        Exchange("tool_answer", outcome, "I have the result.", " ".join(lines), ponders=False),
    ]


def add_numbers(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """An addition too large to do in the head: a call of the tool that adds."""
    chosen = find_tool(talk, "Add")
    if chosen is None:
        return weather(rng, talk)
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    ask = user(rng.choice(("What is {} + {}?", "Add {} and {}.", "How much is {} + {}?")).format(a, b))
    calls = [{"name": chosen["name"], "arguments": {"a": a, "b": b}}]
    content = f"The answer is {a + b}."
    return [
        Exchange("tool_call", ask, "I need a tool to add.", "", calls=calls),
        Exchange("tool_answer", results(str(a + b)), "I have the result.", content, ponders=False),
    ]


# --- dialogues ------------------------------------------------------------------------------------

SKILLS: list[Skill] = [greeting, arithmetic, arithmetic, story, bigger, tell, recall, recall, both]
SKILLS += [sorting, sorting, copying, capital, chatter, weather, unknown, beyond]
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Your name is MiniMax-M3 and was built by MiniMax.",
    "Answer the user.",
]
TOOL_SKILLS: list[Skill] = [weather, add_numbers]


def is_held_out(messages: list[dict], tools: list | None) -> bool:
    """Whether this conversation, which ends in a question, belongs to the examination (one in ten does)."""
    text = json.dumps([messages, tools], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def answer_text(exchange: Exchange, mode: str) -> str:
    """The right reply: the text that follows the generation prefix of this thinking mode."""
    content = exchange.content + (call_text(exchange.calls) if exchange.calls else "")
    if mode == "disabled":
        return content
    if mode == "enabled":
        return f"{exchange.thought}</mm:think>{content}"
    return f"<mm:think>{exchange.thought}</mm:think>{content}" if exchange.ponders else f"</mm:think>{content}"


def reply_message(exchange: Exchange, mode: str) -> dict:
    """The right reply as a message of the history."""
    message = {"role": "assistant", "content": exchange.content}
    if mode == "enabled" or (mode == "adaptive" and exchange.ponders):
        message["reasoning_content"] = exchange.thought
    if exchange.calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in exchange.calls]
    return message


def append(talk: Dialogue, exchange: Exchange, mode: str) -> None:
    """Add an exchange to a dialogue."""
    talk.messages += [*exchange.ask, reply_message(exchange, mode)]
    talk.modes.append(mode)
    talk.facts |= exchange.facts


def opening(rng: random.Random, tools: bool) -> Dialogue:
    """An empty dialogue, perhaps with a system message and tools."""
    content = rng.choice((*SYSTEMS, " ".join(sentences(rng, 20))))
    messages = [{"role": "system", "content": content}] if rng.random() < 0.3 else []
    return Dialogue(messages, draw_tools(rng) if tools else None, [])


def draw_mode(rng: random.Random, previous: list[str]) -> str:
    """A thinking mode: mostly the one of the dialogue's other replies."""
    return previous[-1] if previous and rng.random() < 0.7 else rng.choice(MODES)


def extend(rng: random.Random, talk: Dialogue, skill: Skill, training: bool) -> list[Exchange]:
    """Add what a skill draws; in training, draw until no conversation on the way is held out."""
    for _ in range(30):
        trial = Dialogue(list(talk.messages), talk.tools, list(talk.modes), dict(talk.facts))
        exchanges = skill(rng, trial)
        clean = True
        for exchange in exchanges:
            clean = clean and not is_held_out([*trial.messages, *exchange.ask], trial.tools)
            append(trial, exchange, draw_mode(rng, trial.modes))
        if clean or not training:
            talk.messages, talk.modes, talk.facts = trial.messages, trial.modes, trial.facts
            return exchanges
    raise LookupError("every draw was held out")


def choose_skill(rng: random.Random, talk: Dialogue) -> Skill:
    """A skill for the next exchange: tools are there to be used."""
    return rng.choice(TOOL_SKILLS) if talk.tools and rng.random() < 0.5 else rng.choice(SKILLS)


def short_dialogue(rng: random.Random) -> Dialogue:
    """A few exchanges of any kind."""
    talk = opening(rng, tools=rng.random() < 0.3)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        extend(rng, talk, choose_skill(rng, talk), training=True)
    return talk


def size(talk: Dialogue) -> int:
    """The number of characters said so far."""
    return sum(len(message["content"]) for message in talk.messages)


def fill(rng: random.Random, talk: Dialogue, characters: int, training: bool) -> None:
    """Talk about other things for at least this many characters."""
    end = size(talk) + characters
    while size(talk) < end:
        missing = max(60, min(end - size(talk), rng.randint(100, 900)))
        skill = rng.choice((choose_skill(rng, talk), partial(chatter, characters=missing)))
        if skill is not recall:  # whose answer would bring an old fact near again
            extend(rng, talk, skill, training)


def long_dialogue(rng: random.Random) -> Dialogue:
    """Facts, much talk about other things, and the questions for the facts."""
    talk = opening(rng, tools=rng.random() < 0.1)
    if rng.random() < 0.4:
        extend(rng, talk, needle, training=True)
    else:
        extend(rng, talk, tell, training=True)
        fill(rng, talk, rng.randint(300, 1700), training=True)
    for _ in range(rng.randint(1, 3)):
        extend(rng, talk, rng.choice((recall, recall, recall, unknown)), training=True)
    return talk


def train_dialogues(seed: int, long_share: float = 0.08) -> Iterator[Dialogue]:
    """Endless training dialogues, none of which has a held-out conversation at its start."""
    rng = random.Random(f"train {seed}")
    while True:
        try:
            yield (long_dialogue if rng.random() < long_share else short_dialogue)(rng)
        except LookupError:
            continue


# --- the examination ------------------------------------------------------------------------------


def recall_far(rng: random.Random, talk: Dialogue) -> list[Exchange]:
    """The question for a fact told before much other talk."""
    if rng.random() < 0.4:
        return needle(rng, talk)
    extend(rng, talk, tell, training=False)
    key = rng.choice(list(talk.facts))
    fill(rng, talk, rng.randint(900, 1600), training=False)
    return [asked(rng, "recall_far", "", key, {}, talk.facts)]


EXAMINED: dict[str, tuple[Skill, int]] = {
    "recall_far": (recall_far, 40),
    "greeting": (greeting, 12),
    "arithmetic": (arithmetic, 20),
    "story": (story, 12),
    "bigger": (bigger, 8),
    "tell": (tell, 6),
    "unknown": (unknown, 6),
    "beyond": (beyond, 4),
    "recall": (recall, 20),
    "both": (both, 12),
    "sorting": (sorting, 14),
    "copying": (copying, 12),
    "capital": (capital, 6),
    "no_tool": (weather, 6),
    "tool_call": (add_numbers, 12),
    "tool_answer": (add_numbers, 10),
}


def examine(rng: random.Random, kind: str) -> Question:
    """One held-out question of this kind."""
    skill = EXAMINED[kind][0]
    while True:
        talk = opening(rng, tools=kind.startswith("tool"))
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            extend(rng, talk, choose_skill(rng, talk), training=False)
        for exchange in (weather if kind.startswith("tool") and rng.random() < 0.5 else skill)(rng, talk):
            messages = [*talk.messages, *exchange.ask]
            if exchange.kind == kind and is_held_out(messages, talk.tools):
                mode = rng.choice(MODES)
                return Question(kind, messages, talk.tools, mode, answer_text(exchange, mode))
            append(talk, exchange, draw_mode(rng, talk.modes))


def held_out(n: int = 200, seed: int = 0) -> list[Question]:
    """`n` different questions that no training dialogue has, of every kind in fixed proportions."""
    rng = random.Random(f"held out {seed}")
    plan = [kind for kind, (_, share) in EXAMINED.items() for _ in range(share)]
    random.Random(0).shuffle(plan)
    seen: set[str] = set()
    questions: list[Question] = []
    while len(questions) < n:
        question = examine(rng, plan[len(questions) % len(plan)])
        key = json.dumps([question.messages, question.tools, question.thinking])
        if key not in seen:
            seen.add(key)
            questions.append(question)
    return questions
