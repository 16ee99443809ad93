"""MiniMax-M3's text model in PyTorch, compact and quick to train at toy size.

Weights are a flat dictionary under the published names (the experts of a layer stacked in one tensor). All experts
are computed for every token and weighted, zero where not chosen: with sixteen small experts that is one wide MLP and
a few large matrix products, where a loop over experts would be many small ones.
"""

import math
import re

import torch
import torch.nn.functional as F

MODEL = "language_model.model."
Weights = dict[str, torch.Tensor]


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight."""
    hidden, head = config["hidden_size"], config["head_dim"]
    sparse = config["sparse_attention_config"]
    out = {f"{MODEL}embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        attention = {
            "q_proj": (config["num_attention_heads"] * head, hidden),
            "k_proj": (config["num_key_value_heads"] * head, hidden),
            "v_proj": (config["num_key_value_heads"] * head, hidden),
            "o_proj": (hidden, config["num_attention_heads"] * head),
            "q_norm": (head,),
            "k_norm": (head,),
        }
        if sparse["sparse_attention_freq"][layer]:
            width = sparse["sparse_index_dim"]
            attention["index_q_proj"] = (sparse["sparse_num_index_heads"] * width, hidden)
            attention["index_k_proj"] = (width, hidden)
            attention["index_q_norm"] = attention["index_k_norm"] = (width,)
        names = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
        names |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        names |= moe_shapes(config) if config["moe_layer_freq"][layer] else mlp_shapes("mlp", config, "dense")
        out |= {f"{MODEL}layers.{layer}.{name}": shape for name, shape in names.items()}
    return out | {f"{MODEL}norm.weight": (hidden,), "language_model.lm_head.weight": (config["vocab_size"], hidden)}


def mlp_shapes(prefix: str, config: dict, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a dense MLP or a shared expert."""
    hidden, width = config["hidden_size"], config[f"{kind}_intermediate_size"]
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def moe_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of a mixture-of-experts block."""
    count, hidden, width = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    return {
        "block_sparse_moe.gate.weight": (count, hidden),
        "block_sparse_moe.e_score_correction_bias": (count,),
        "block_sparse_moe.experts.w1.weight": (count, width, hidden),
        "block_sparse_moe.experts.w2.weight": (count, hidden, width),
        "block_sparse_moe.experts.w3.weight": (count, width, hidden),
    } | mlp_shapes("block_sparse_moe.shared_experts", config, "shared")


def initial(config: dict, device: str) -> Weights:
    """Random weights; norms and biases start at zero."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            tensor = torch.zeros(shape)
        else:
            scale = 0.5 if "embed_tokens" in name else shape[-1] ** -0.5
            scale *= 0.4 if re.search(r"(o_proj|down_proj|w2|lm_head)\.weight", name) else 1.0
            tensor = torch.randn(shape, generator=generator) * scale
        weights[name] = tensor.to(device).requires_grad_("correction_bias" not in name)
    return weights


def quantised(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What MLX's affine quantisation makes of a weight; the gradient passes as if it were the weight itself."""
    rows = weight.detach().unflatten(-1, (-1, group))
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    steps = 2**bits - 1
    scale = ((high - low) / steps).clamp(min=1e-7)
    below = low.abs() > high.abs()
    scale, edge = torch.where(below, scale, -scale), torch.where(below, low, high)
    zero = torch.round(edge / scale)
    scale = torch.where(zero != 0, edge / torch.where(zero != 0, zero, 1), scale)
    bias = torch.where(zero != 0, edge, 0)
    rounded = (torch.round((rows - bias) / scale).clamp(0, steps) * scale + bias).flatten(-2)
    return weight + (rounded - weight).detach()


def effective(weights: Weights, dtype: torch.dtype, four_bit: bool) -> Weights:
    """The weights as a program would load them: matrices in `dtype`, after 4-bit quantisation if asked for."""
    out = {}
    for name, weight in weights.items():
        if weight.ndim == 1:
            out[name] = weight
        elif name.endswith("block_sparse_moe.gate.weight"):
            out[name] = quantised(weight, 8, 64) if four_bit else weight
        else:
            # The file has bfloat16, and quantisation starts from the file.
            weight = weight + (weight.detach().bfloat16().float() - weight).detach()
            out[name] = (quantised(weight, 4, 32) if four_bit else weight).to(dtype)
    return out


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Gemma's RMS norm, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def activation(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """SwigluOAI, times the routing weight of each column's expert."""
    gate, up = gate.float().clamp(max=7.0), up.float().clamp(-7.0, 7.0)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return (hidden.unflatten(-1, (weight.shape[-1], -1)) * weight[..., None]).flatten(-2)


class Network:
    """The forward pass over right-padded rows of tokens, with the figures that training needs on the way."""

    def __init__(self, config: dict, device: str):
        self.config = config
        self.sparse = config["sparse_attention_config"]
        self.eps = config["rms_norm_eps"]
        self.use_blocks = True  # off: sparse layers attend to everything, as training starts
        self.loads: dict[str, torch.Tensor] = {}
        self.index_loss = torch.zeros((), device=device)
        self.activation = torch.compile(activation, dynamic=True) if device == "cuda" else activation
        half = config["rotary_dim"] // 2
        self.frequencies = config["rope_theta"] ** (-torch.arange(half, device=device) / half)

    def __call__(self, weights: Weights, tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """The state before lm_head; `asked` marks the positions whose predictions count."""
        self.loads, self.index_loss = {}, torch.zeros((), device=tokens.device)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.frequencies
        self.turns = (angles.cos(), angles.sin())
        valid = (tokens != self.config["pad_token_id"]).float()
        h = F.embedding(tokens, weights[f"{MODEL}embed_tokens.weight"]).float()
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"{MODEL}layers.{layer}."
            part = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            h = h + self.attention(part, norm(h, part["input_layernorm.weight"], self.eps), asked).float()
            f = norm(h, part["post_attention_layernorm.weight"], self.eps)
            h = h + (self.experts(part, f, valid, layer) if self.config["moe_layer_freq"][layer] else self.mlp(part, f))
        return norm(h, weights[f"{MODEL}norm.weight"], self.eps)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions on the first dimensions of each head."""
        (cos, sin), half = self.turns, self.config["rotary_dim"] // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def heads(self, part: Weights, a: torch.Tensor, name: str, width: int, normed: bool = True) -> torch.Tensor:
        """Project, split into heads, normalise and rotate."""
        weight = part[f"self_attn.{name}_proj.weight"]
        x = F.linear(a.to(weight.dtype), weight).unflatten(-1, (-1, width)).transpose(1, 2)
        return self.rotate(norm(x, part[f"self_attn.{name}_norm.weight"], self.eps)) if normed else x

    def attention(self, part: Weights, a: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Full attention, or block-sparse attention where the layer has an indexer and the rows are long."""
        head, output = self.config["head_dim"], part["self_attn.o_proj.weight"]
        q, k = self.heads(part, a, "q", head), self.heads(part, a, "k", head)
        v = self.heads(part, a, "v", head, normed=False)
        long = a.shape[1] > self.sparse["sparse_block_size"] * self.sparse["sparse_topk_blocks"]
        if long and "self_attn.index_q_proj.weight" in part:
            out = self.sparse_attention(part, a, q, k, v, asked)
        else:
            out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(-2).to(output.dtype), output)

    def sparse_attention(self, part, a, q, k, v, asked) -> torch.Tensor:
        """Attention within the blocks that the indexer selects, and the indexer's own loss."""
        length, block = a.shape[1], self.sparse["sparse_block_size"]
        pad = -length % block
        q = q.unflatten(1, (k.shape[1], -1)).to(v.dtype)
        scores = (q @ k[:, :, None].to(v.dtype).transpose(-1, -2)).float() / math.sqrt(k.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool, device=a.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
        blocks = self.block_scores(part, a.detach(), future, pad)
        mass = F.pad(scores.detach().softmax(-1).mean(2), (0, pad)).unflatten(-1, (-1, block)).sum(-1)
        self.index_loss = self.index_loss + self.selection_loss(blocks, mass, asked)
        if self.use_blocks:
            kept = self.select(blocks).repeat_interleave(block, -1)[..., :length]
            scores = scores.masked_fill(~kept[:, :, None], -math.inf)
        return (scores.softmax(-1).to(v.dtype) @ v[:, :, None]).flatten(1, 2)

    def block_scores(self, part: Weights, a: torch.Tensor, future: torch.Tensor, pad: int) -> torch.Tensor:
        """The indexer's score of every block for every query, -inf for blocks of the future."""
        width = self.sparse["sparse_index_dim"]
        scores = self.heads(part, a, "index_q", width) @ self.heads(part, a, "index_k", width).transpose(-1, -2)
        scores = F.pad(scores.masked_fill(future, -math.inf), (0, pad), value=-math.inf)
        return scores.unflatten(-1, (-1, self.sparse["sparse_block_size"])).amax(-1)

    def local(self, blocks: torch.Tensor) -> torch.Tensor:
        """Which block each query itself is in."""
        query = torch.arange(blocks.shape[-2], device=blocks.device) // self.sparse["sparse_block_size"]
        return query[:, None] == torch.arange(blocks.shape[-1], device=blocks.device)

    def select(self, blocks: torch.Tensor) -> torch.Tensor:
        """The blocks each query may see: its own and the best others."""
        chosen = blocks.detach().masked_fill(self.local(blocks), math.inf).topk(self.sparse["sparse_topk_blocks"])
        return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, chosen.indices, True)

    def selection_loss(self, blocks: torch.Tensor, mass: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """How badly the block scores predict where the group's attention goes, outside the query's own block.

        Selecting passes no gradient, so this is all the indexer learns from. Positions that answer count most.
        """
        local = self.local(blocks) | torch.isinf(blocks)
        logits = (blocks / math.sqrt(self.sparse["sparse_index_dim"])).masked_fill(local, -1e4)
        loss = -(mass.masked_fill(local, 0) * logits.log_softmax(-1)).sum(-1)
        weight = (asked.float() + 0.05)[:, None]
        return (loss * weight).sum() / weight.sum() / loss.shape[1]

    def mlp(self, part: Weights, f: torch.Tensor, prefix: str = "mlp") -> torch.Tensor:
        """The dense MLP or the shared expert."""
        gate, up, down = (part[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        f = f.to(gate.dtype)
        hidden = self.activation(F.linear(f, gate), F.linear(f, up), f.new_ones(*f.shape[:-1], 1))
        return F.linear(hidden.to(down.dtype), down).float()

    def experts(self, part: Weights, f: torch.Tensor, valid: torch.Tensor, layer: int) -> torch.Tensor:
        """The mixture of experts: all of them as one wide MLP, columns weighted by the router."""
        weight = self.route(part, f, valid, layer)
        w1, w2, w3 = (part[f"block_sparse_moe.experts.w{i}.weight"] for i in (1, 2, 3))
        low = f.to(w1.dtype)
        hidden = self.activation(F.linear(low, w1.flatten(0, 1)), F.linear(low, w3.flatten(0, 1)), weight)
        out = F.linear(hidden.to(w2.dtype), w2.transpose(0, 1).flatten(1)).float()
        return out * self.config["routed_scaling_factor"] + self.mlp(part, f, "block_sparse_moe.shared_experts")

    def route(self, part: Weights, f: torch.Tensor, valid: torch.Tensor, layer: int) -> torch.Tensor:
        """The weight of every expert for every token, zero for those not chosen."""
        scores = torch.sigmoid(F.linear(f.float(), part["block_sparse_moe.gate.weight"]))
        bias = part["block_sparse_moe.e_score_correction_bias"]
        chosen = (scores.detach() + bias).topk(self.config["num_experts_per_tok"]).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        self.loads[f"{MODEL}layers.{layer}.block_sparse_moe.e_score_correction_bias"] = (
            (mask * valid[..., None]).sum((0, 1)).detach()
        )
        kept = scores * mask
        return kept / kept.sum(-1, keepdim=True)
