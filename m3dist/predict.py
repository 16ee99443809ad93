"""Seconds of a decode step and of a prefill on machines we may not have: a plan, a machine and a link, on paper.

Each product and each attention takes the longer of reading its operands at the machine's bandwidth and computing at its
FLOP/s; on machines that unpack weights first, both, or with few rows its reads once a row. Each kernel takes a launch
beyond that, each sum its link's time. None of these overlap: a layer waits for its sums. Python builds the next step
meanwhile, and is waited for where it takes longer. `m3dist plan --predict` prints it. No MLX.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m3dist.config import ModelConfig
from m3dist.errors import PlanError
from m3dist.layout import decode_fraction, kv_heads, query_heads
from m3dist.machines import Link, Machine
from m3dist.options import ATTENTION
from m3dist.plan import INDEX_BYTES, Plan, make_plan
from m3dist.tensors import BYTES, Inventory, Quantization, modules

# Kernels of a decode step on a GPU that trusts m3dist's own (model/gpu.py): of a layer with a dense MLP, of one with
# experts, what a sparse layer adds once it selects blocks, and of the embedding, the first norm, the head and sampling.
# Counted by reading model/; the bench counts as many operations, 98, in 3 dense layers and 3 with experts on CUDA. The
# sums' own are the link's.
KERNELS_DENSE_LAYER = 11
KERNELS_MOE_LAYER = 19
KERNELS_SELECTION = 7
KERNELS_TOKEN = 8
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
    """`count` tokens of one sequence computed together, after `before` others.

    `sampled`: they are one token that gives an answer. Of others nothing is wanted but what the caches keep.
    """

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
    unpacked_from: float  # rows of a product that its weights are unpacked for, on machines that do so first
    is_expert: bool
    is_beyond_caches: bool  # of interest for sampled tokens only


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
        tokens = Tokens(context - 1, 1, sampled=True)
        step = self.step(tokens, link)
        return step + Step(host=max(0.0, self._python(tokens) - step.seconds))

    def prefill(self, tokens: int, chunk: int, link: Link, before: int = 0) -> Step:
        """A prompt of `tokens` after `before` others, `chunk` at a time, up to the first token of its answer: its last
        token is a step by itself."""
        total, last = Step(), tokens - 1
        for start in range(0, last, chunk):
            total += self.step(Tokens(before + start, min(chunk, last - start), sampled=False), link)
        return total + self.step(Tokens(before + last, 1, sampled=True), link)

    def step(self, tokens: Tokens, link: Link) -> Step:
        """The slowest rank's products, the launches and the sums."""
        if tokens not in self._known:  # the same over every link
            ranks = (self._work(rank, tokens) for rank in range(self.plan.world))
            self._known[tokens] = max(ranks, key=lambda step: step.seconds)
        launch = self.machine.launch * self.kernels(tokens)
        return self._known[tokens] + Step(launch=launch, link=self._sums(tokens, link))

    def kernels(self, tokens: Tokens) -> int:
        """Kernels that one rank launches."""
        layers = self._layers(tokens)
        experts = sum(self.config.moe_layer_freq[:layers])
        layered = KERNELS_MOE_LAYER * experts + KERNELS_DENSE_LAYER * (layers - experts)
        return layered + KERNELS_SELECTION * self._selecting(tokens) + KERNELS_TOKEN

    def sums(self, tokens: Tokens) -> tuple[int, int]:
        """Sums of every token's hidden state, and of a few bytes."""
        a_layer = 1 if self.plan.attention == "replicated" else 2
        if self.plan.world == 1:
            return 0, 0
        return SUMS_EMBEDDING + a_layer * self._layers(tokens), SUMS_SAMPLING if tokens.sampled else 0

    @property
    def _budget(self) -> int:
        """Keys that a query of a sparse layer attends to."""
        return self.config.sparse_topk_blocks * self.config.sparse_block_size

    def _layers(self, tokens: Tokens) -> int:
        """Layers that attend: the last one only for an answer, its keys and values being all that others leave."""
        return self.config.num_hidden_layers - (not tokens.sampled)

    def _selecting(self, tokens: Tokens) -> int:
        """Layers that select blocks."""
        return sum(self.config.sparse_attention_freq[: self._layers(tokens)]) if tokens.end > self._budget else 0

    def _python(self, tokens: Tokens) -> float:
        """Seconds in which Python builds and submits a step."""
        m = self.machine
        return m.host * self.config.num_hidden_layers + m.host_selection * self._selecting(tokens)

    def _sums(self, tokens: Tokens, link: Link) -> float:
        """Seconds. A link's latency is that of one token's hidden state."""
        large, small = self.sums(tokens)
        further = (tokens.count - 1) * self.config.hidden_size * BYTES[self.plan.inventory.dtype]
        return large * link.seconds(self.plan.world, further) + small * link.latency(self.plan.world)

    def _work(self, rank: int, tokens: Tokens) -> Step:
        """The products of one rank."""
        share, c, total = self.plan.shares[rank], self.config, Step()
        for product, count in self._products[rank].items():
            if tokens.sampled or not product.is_beyond_caches:
                total += self._product(product, tokens.count) * count
        heads, kv = (stop - start for start, stop in (query_heads(share, c), kv_heads(share, c)))
        for sparse, count in Counter(c.sparse_attention_freq[: self._layers(tokens)]).items():
            attend = self._selected if sparse and tokens.end > self._budget else self._attention
            total += attend(heads, kv, tokens) * count
        return total

    def _product(self, product: Product, tokens: int) -> Step:
        """So many tokens times one matrix. An expert is read if any of them chose it, all equally likely."""
        m, rows = self.machine, product.used * tokens
        compute = 2 * product.values * rows / (m.expert_flops if product.is_expert else m.flops)
        nbytes = product.nbytes * (1 - (1 - product.used) ** tokens)
        if tokens == 1 or m.unpack_bandwidth is None:
            return _longer(nbytes / m.bandwidth, compute)
        if rows < product.unpacked_from:  # every row reads the weights for itself
            return _longer(product.nbytes * rows / m.bandwidth, compute)
        return Step(memory=nbytes / m.unpack_bandwidth, compute=compute)

    def _attention(self, heads: int, kv: int, tokens: Tokens) -> Step:
        """One layer's attention to every key."""
        c, m, size = self.config, self.machine, BYTES[self.plan.inventory.dtype]
        nbytes, flops = 2 * kv * c.head_dim * size * tokens.end, 4 * heads * c.head_dim * tokens.keys(tokens.end)
        return _longer(nbytes / m.attention_bandwidth, flops / m.attention_flops)

    def _selected(self, heads: int, kv: int, tokens: Tokens) -> Step:
        """One layer's choice of blocks, by the index K of all keys, and its attention to what each token chose."""
        c, m, size = self.config, self.machine, BYTES[self.plan.inventory.dtype]
        index, seen = c.sparse_index_dim * tokens.end, tokens.keys(self._budget)
        choice = _longer(index * INDEX_BYTES / m.attention_bandwidth, 2 * kv * index * tokens.count / m.index_flops)
        bandwidth = m.attention_bandwidth if tokens.count == 1 else m.selected_bandwidth
        nbytes, flops = 2 * kv * c.head_dim * size * seen, 4 * heads * c.head_dim * seen
        return choice + _longer(nbytes / bandwidth, flops / m.attention_flops)


def _longer(memory: float, compute: float) -> Step:
    """Seconds of reading or of computing, whichever takes longer."""
    return Step(memory=memory) if memory > compute else Step(compute=compute)


def products(plan: Plan, rank: int) -> Counter[Product]:
    """The modules `rank` holds, and how many of each kind: a model's layers are alike."""
    held, inventory = plan.held_specs(rank), plan.inventory
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
        beyond = is_beyond_caches(module.name, inventory.config)
        rows = unpacked_from(quantization) if module.is_matrix and not module.exact else math.inf
        found[Product(nbytes, values, used, rows, ".switch_mlp." in module.name, beyond)] += 1
    return found


def unpacked_from(q: Quantization | None) -> int:
    """Rows from which the CPU dequantises a matrix before it multiplies: model/products.pays, for those without MLX."""
    return 24 if q and (q.bits in (3, 5, 6) or q.mode in ("mxfp4", "nvfp4")) else 8


def is_beyond_caches(module: str, config: ModelConfig) -> bool:
    """Whether a module comes after the last layer's keys and values: a prompt's tokens need it for the answer alone."""
    if module.endswith("embed_tokens"):
        return config.tie_word_embeddings
    inside, _, of_layer = module.partition(f".layers.{config.num_hidden_layers - 1}.")
    if not of_layer:
        return ".layers." not in inside
    return of_layer != "input_layernorm" and (not of_layer.startswith("self_attn.") or of_layer.endswith("o_proj"))


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
