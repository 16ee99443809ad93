"""Seconds of a decode step and of a prefill on machines we may not have: a plan, a machine and a link, on paper.

Each product and each attention takes the longer of reading its operands at the machine's bandwidth and computing at its
FLOP/s; each kernel takes a launch beyond that, each sum its link's time. None of these overlap: a layer waits for its
sums. Python builds the next step meanwhile, and is waited for where it takes longer. `m3dist plan --predict` prints it.
No MLX.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m3dist.errors import PlanError
from m3dist.layout import decode_fraction, kv_heads, query_heads
from m3dist.machines import Link, Machine
from m3dist.options import ATTENTION
from m3dist.plan import INDEX_BYTES, Plan, make_plan
from m3dist.tensors import BYTES, Inventory, modules

# Kernels of a decode step on a GPU, where what model/fusion.py joins is one: of a layer with a dense MLP, of one with
# experts, what a sparse layer adds once it selects blocks, and of the embedding, the last norm, the head and sampling.
# Counted by reading model/; the sums' own are the link's.
KERNELS_DENSE_LAYER = 18
KERNELS_MOE_LAYER = 29
KERNELS_SELECTION = 10
KERNELS_TOKEN = 30
# Sums beside the layers': the embedding's, and the gathering of a token's candidates.
SUMS_EMBEDDING, SUMS_SAMPLING = 1, 1


@dataclass(frozen=True)
class Step:
    """Seconds of a pass through the model, by what they are spent on."""

    memory: float = 0.0  # in products that wait for their operands
    compute: float = 0.0  # in products that wait for arithmetic
    launch: float = 0.0
    link: float = 0.0
    host: float = 0.0  # waiting for Python, beyond all else

    @property
    def seconds(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: "Step") -> "Step":
        return Step(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __mul__(self, times: int) -> "Step":
        return Step(*(times * a for a in vars(self).values()))


@dataclass(frozen=True)
class Tokens:
    """`count` tokens of one sequence computed together, after `before` others; `sampled`: the last gives an answer."""

    before: int
    count: int
    sampled: bool

    @property
    def end(self) -> int:
        return self.before + self.count

    def keys(self, most: int) -> int:
        """Keys that the tokens attend to, added up: each sees itself and what is before it, but `most` at most."""
        short = min(self.count, max(0, most - self.before))  # so many see fewer than `most`, or just as many
        return short * (2 * self.before + short + 1) // 2 + (self.count - short) * most


@dataclass(frozen=True)
class Product:
    """One module as a rank holds it."""

    nbytes: int
    values: int  # of the matrix, however stored; 0: a vector
    used: float  # the part that one token reads
    is_head: bool  # of interest for sampled tokens only


class Predictor:
    """What a plan's ranks spend, each on a `machine`."""

    def __init__(self, plan: Plan, machine: Machine):
        self.plan, self.machine, self.config = plan, machine, plan.inventory.config
        self._products = [products(plan, rank) for rank in range(plan.world)]
        self._known: dict[Tokens, Step] = {}

    @property
    def bytes_held(self) -> int:
        """Weights of the fullest rank."""
        return max(sum(p.nbytes * count for p, count in held.items()) for held in self._products)

    def decode(self, context: int, link: Link) -> Step:
        """One token, which sees `context` keys, its own included."""
        step = self.step(Tokens(context - 1, 1, sampled=True), link)
        python = self.machine.host * self.config.num_hidden_layers
        return step + Step(host=max(0.0, python - step.seconds))

    def prefill(self, tokens: int, chunk: int, link: Link, before: int = 0) -> Step:
        """A prompt of `tokens` after `before` others, `chunk` at a time, up to the first token of its answer."""
        total = Step()
        for start in range(0, tokens, chunk):
            end = min(start + chunk, tokens)
            total += self.step(Tokens(before + start, end - start, sampled=end == tokens), link)
        return total

    def step(self, tokens: Tokens, link: Link) -> Step:
        """The slowest rank's products, the launches and the sums."""
        if tokens not in self._known:  # the same over every link
            ranks = (self._work(rank, tokens) for rank in range(self.plan.world))
            self._known[tokens] = max(ranks, key=lambda step: step.seconds)
        launch = self.machine.launch * self.kernels(tokens)
        return self._known[tokens] + Step(launch=launch, link=self._sums(tokens, link))

    def kernels(self, tokens: Tokens) -> int:
        """Kernels that one rank launches."""
        experts, layers = sum(self.config.moe_layer_freq), self.config.num_hidden_layers
        selecting = sum(self.config.sparse_attention_freq) if tokens.end > self._budget else 0
        layered = KERNELS_MOE_LAYER * experts + KERNELS_DENSE_LAYER * (layers - experts)
        return layered + KERNELS_SELECTION * selecting + KERNELS_TOKEN

    def sums(self, tokens: Tokens) -> tuple[int, int]:
        """Sums of every token's hidden state, and of a few bytes."""
        a_layer = 1 if self.plan.attention == "replicated" else 2
        if self.plan.world == 1:
            return 0, 0
        return SUMS_EMBEDDING + a_layer * self.config.num_hidden_layers, SUMS_SAMPLING if tokens.sampled else 0

    @property
    def _budget(self) -> int:
        """Keys that a query of a sparse layer attends to."""
        return self.config.sparse_topk_blocks * self.config.sparse_block_size

    def _sums(self, tokens: Tokens, link: Link) -> float:
        """Seconds. A link's latency is that of one token's hidden state."""
        large, small = self.sums(tokens)
        further = (tokens.count - 1) * self.config.hidden_size * BYTES[self.plan.inventory.dtype]
        return large * link.seconds(self.plan.world, further) + small * link.latency(self.plan.world)

    def _work(self, rank: int, tokens: Tokens) -> Step:
        """The products of one rank."""
        share, c, m, total = self.plan.shares[rank], self.config, self.machine, Step()
        for product, count in self._products[rank].items():
            nbytes, flops = _weights(product, tokens)
            total += _longer(nbytes / m.bandwidth, flops / m.flops) * count
        heads, kv = (stop - start for start, stop in (query_heads(share, c), kv_heads(share, c)))
        for sparse, count in Counter(c.sparse_attention_freq).items():
            nbytes, flops = self._attention(heads, kv, sparse, tokens)
            total += _longer(nbytes / m.attention_bandwidth, flops / m.attention_flops) * count
        return total

    def _attention(self, heads: int, kv: int, sparse: bool, tokens: Tokens) -> tuple[float, float]:
        """Bytes and FLOP of one layer's attention: K and V of every key, or index K of all and the selected K and V."""
        c, size = self.config, BYTES[self.plan.inventory.dtype]
        a_key, flops = 2 * kv * c.head_dim * size, 4 * heads * c.head_dim
        if not sparse or tokens.end <= self._budget:
            return a_key * tokens.end, flops * tokens.keys(tokens.end)
        seen, index = tokens.keys(self._budget), c.sparse_index_dim * tokens.end
        return index * INDEX_BYTES + a_key * seen, 2 * kv * index * tokens.count + flops * seen


def _longer(memory: float, compute: float) -> Step:
    """Seconds of reading or of computing, whichever takes longer."""
    return Step(memory=memory) if memory > compute else Step(compute=compute)


def products(plan: Plan, rank: int) -> Counter[Product]:
    """The modules `rank` holds, and how many of each kind: a model's layers are alike."""
    held, inventory = plan.held_specs(rank), plan.inventory
    head = "embed_tokens" if inventory.config.tie_word_embeddings else "lm_head"
    found: Counter[Product] = Counter()
    for module in modules(inventory.config).values():
        quantization = inventory.quantization.get(module.name)
        leaves = module.tensors(inventory.dtype, quantization)
        weight, values = held[next(iter(leaves))].shape, 0
        if module.is_matrix:
            columns = weight[-1] * 32 // quantization.bits if quantization else weight[-1]
            values = math.prod(weight[:-1]) * columns
        nbytes = sum(held[name].nbytes for name in leaves)
        used = decode_fraction(module.name, inventory.config)
        found[Product(nbytes, values, used, module.name.endswith(head))] += 1
    return found


def _weights(product: Product, tokens: Tokens) -> tuple[float, float]:
    """Bytes and FLOP of the tokens times one matrix. An expert is read if any of them chose it, all equally likely."""
    rows = int(tokens.sampled) if product.is_head else tokens.count
    return product.nbytes * (1 - (1 - product.used) ** rows), 2 * product.values * product.used * rows


@dataclass(frozen=True)
class Prediction:
    """One plan over one link: the steps of decode, by context, and the prefill of a prompt of `prompt` tokens."""

    plan: Plan
    link: Link
    bytes_held: int  # of weights, by the fullest rank
    decode: Mapping[int, Step]
    prefill: Step
    prompt: int

    @property
    def score(self) -> float:
        """Seconds of one token at each context: what the faster plan is chosen by."""
        return sum(step.seconds for step in self.decode.values())


def predict(
    plans: Sequence[Plan],
    machine: Machine,
    links: Sequence[Link],
    contexts: Sequence[int],
    prompt: int,
    chunk: int,
) -> list[list[Prediction]]:
    """For each link, a prediction for each plan of one world."""
    predictors = [Predictor(plan, machine) for plan in plans]
    found = []
    for link in links:
        row = []
        for p in predictors:
            decode = {context: p.decode(context, link) for context in contexts}
            row.append(Prediction(p.plan, link, p.bytes_held, decode, p.prefill(prompt, chunk, link), prompt))
        found.append(row)
    return found


def possible_plans(inventory: Inventory, world: int, experts: str) -> list[Plan]:
    """The plans of `world` equal ranks: heads shared out, and attention replicated, as far as they can be made.

    Raises PlanError where none can.
    """
    if world == 1:
        return [make_plan(inventory, 1, experts)]
    found, problems = [], []
    for attention in ATTENTION:
        try:
            found.append(make_plan(inventory, world, experts, attention))
        except PlanError as problem:
            problems.append(problem)
    if not found:
        raise problems[0]
    return found
