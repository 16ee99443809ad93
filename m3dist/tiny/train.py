"""Train the tiny checkpoint: `python -m m3dist.tiny.train --out DIR [--device cuda|cpu] [--minutes N]`.

The schedule follows the share of the time that has passed. First all attention is full, while each indexer learns
to predict where its attention goes; then the block selection acts; then every other step sees the weights as 4-bit
quantisation would leave them, so that the checkpoint answers the same in bfloat16 and in four bits.
"""

import argparse
import collections
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from m3dist.tiny import files
from m3dist.tiny.dialogues import held_out
from m3dist.tiny.network import Network, Weights, effective, initial
from m3dist.tiny.rows import Encoder, pack, parallel_batches

BLOCKS_FROM, FOUR_BIT_FROM, BALANCE_UNTIL = 0.3, 0.5, 0.8
REPORTS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HEAD = "language_model.lm_head.weight"


def learning_rate(passed: float, peak: float) -> float:
    """A short rise, then a cosine to zero."""
    return peak * min(1.0, passed / 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))


def losses(network: Network, weights: Weights, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The loss on the wanted tokens plus the indexers' loss."""
    asked = F.pad(wanted[:, 1:], (0, 1))
    hidden = network(weights, tokens, asked)[asked]
    logits = F.linear(hidden.to(weights[HEAD].dtype), weights[HEAD]).float()
    return F.cross_entropy(logits, tokens[wanted]) + network.index_loss


def balance(network: Network, weights: Weights) -> None:
    """Move the routing biases towards equal load of all experts."""
    for name, load in network.loads.items():
        weights[name].add_(torch.sign(load.mean() - load), alpha=1e-3)


@torch.no_grad()
def examine(network: Network, weights: Weights, encoder: Encoder, device: str) -> dict[str, list[bool]]:
    """Which held-out questions greedy decoding answers exactly, by kind.

    Greedy decoding gives the right answer exactly when every token of it has the largest logit after the ones before.
    """
    results: dict[str, list[bool]] = collections.defaultdict(list)
    encoded = [(question.kind, *encoder.question(question)) for question in held_out()]
    encoded.sort(key=lambda item: len(item[1]))
    for start in range(0, len(encoded), 25):
        part = encoded[start : start + 25]
        rows = [(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for _, prompt, answer in part]
        tokens, wanted = to_device(pack(rows, max(len(ids) for ids, _ in rows)), device)
        hidden = network(weights, tokens, F.pad(wanted[:, 1:], (0, 1)))
        guesses = F.linear(hidden.to(weights[HEAD].dtype), weights[HEAD]).argmax(-1)
        right = ((guesses[:, :-1] == tokens[:, 1:]) | ~wanted[:, 1:]).all(-1).tolist()
        for (kind, _, _), exact in zip(part, right, strict=True):
            results[kind].append(exact)
    return results


def summary(results: dict[str, list[bool]]) -> str:
    """Right answers in all and the kinds with wrong ones."""
    everything = [exact for kind in results.values() for exact in kind]
    wrong = ", ".join(f"{kind} {sum(r)}/{len(r)}" for kind, r in sorted(results.items()) if not all(r))
    return f"{sum(everything)}/{len(everything)} right" + (f" ({wrong})" if wrong else "")


def to_device(batch, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed batch as tensors."""
    return torch.from_numpy(batch[0]).to(device).long(), torch.from_numpy(batch[1]).to(device)


def save(weights: Weights, out: Path) -> None:
    """Write the weights under the published names: experts apart, router in float32, the rest in bfloat16."""
    from safetensors.torch import save_file

    tensors: Weights = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu()
        single = "block_sparse_moe.gate." in name or "correction_bias" in name
        weight = weight.clone() if single else weight.bfloat16()
        if ".experts." in name:
            before, after = name.split(".experts.")
            tensors |= {f"{before}.experts.{e}.{after}": w.contiguous().clone() for e, w in enumerate(weight)}
        else:
            tensors[name] = weight
    path = out / "model.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)


def load(out: Path, device: str) -> Weights:
    """Read a checkpoint back, experts stacked again."""
    from safetensors.torch import load_file

    tensors = {name: tensor.float().to(device) for name, tensor in load_file(out / "model.safetensors").items()}
    weights = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    count = files.text_config()["num_local_experts"]
    for name in [name for name in tensors if ".experts.0." in name]:
        stack = [tensors[name.replace(".experts.0.", f".experts.{e}.")] for e in range(count)]
        weights[name.replace(".experts.0.", ".experts.")] = torch.stack(stack)
    return weights


def train(out: Path, device: str, minutes: float, share: float, workers: int, peak: float) -> None:
    """Train for a fixed time and write the checkpoint."""
    files.write_files(out)
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    network, encoder = Network(files.text_config(), device), Encoder(out)
    weights = initial(network.config, device)
    learned = [weight for weight in weights.values() if weight.requires_grad]
    matrices, vectors = ([w for w in learned if (w.ndim > 1) is many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=device == "cuda")
    source = parallel_batches(out, workers, share)
    next(source)
    start, step, seen, reports = time.time(), 0, 0, list(REPORTS)
    while (passed := (time.time() - start) / (60 * minutes)) < 1:
        network.use_blocks = passed > BLOCKS_FROM
        four_bit = passed > FOUR_BIT_FROM and step % 2 == 0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(passed, peak)
        tokens, wanted = to_device(next(source), device)
        loss = losses(network, effective(weights, dtype, four_bit), tokens, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if passed < BALANCE_UNTIL:
            balance(network, weights)
        step, seen = step + 1, seen + tokens.numel()
        if step % 20 == 0:
            loss.item()  # waits for the device, so that the clock tells the truth
        if reports and passed > reports[0]:
            reports.pop(0)
            title = f"{passed:4.0%} step {step} tokens {seen / 1e6:.1f}M loss {loss.item():.4f}"
            report(title, network, weights, encoder, device)
            save(weights, out)
    network.use_blocks = True
    save(weights, out)
    report(f"end: {step} steps", network, weights, encoder, device)


def report(title: str, network: Network, weights: Weights, encoder: Encoder, device: str) -> None:
    """Print how the examination goes, in the file's precision and in four bits."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kept, network.use_blocks = network.use_blocks, True
    scores = [summary(examine(network, effective(weights, dtype, bits), encoder, device)) for bits in (False, True)]
    network.use_blocks = kept
    print(f"{title} index {network.index_loss.item():.3f} | bf16 {scores[0]} | 4-bit {scores[1]}", flush=True)


@torch.no_grad()
def check(out: Path) -> None:
    """Compare the written checkpoint's logits with transformers' own MiniMax-M3."""
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

    config, weights = files.text_config(), load(out, "cpu")
    reference = MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**config, attn_implementation="eager")).eval()
    reference.load_state_dict(transformers_names(weights))
    network, encoder = Network(config, "cpu"), Encoder(out)
    question = max(held_out(), key=lambda question: len(str(question.messages)))
    prompt, answer = encoder.question(question)
    tokens = torch.tensor([prompt + answer])
    hidden = network(weights, tokens, torch.ones_like(tokens, dtype=torch.bool))
    expected = reference(input_ids=tokens).logits
    difference = (F.linear(hidden, weights[HEAD]) - expected).abs().max().item()
    print(f"largest difference from transformers over {tokens.numel()} tokens: {difference:.2e}")
    if difference > 1e-2:
        raise SystemExit("the checkpoint's logits differ from transformers'")


def transformers_names(weights: Weights) -> Weights:
    """The weights as transformers' text model holds them: gate and up in one matrix."""
    out = {}
    for name, weight in weights.items():
        pairs = (("experts.w1.weight", "experts.w3.weight", "experts.gate_up_proj"),)
        pairs += (("gate_proj.weight", "up_proj.weight", "gate_up_proj.weight"),)
        pairs += (("experts.w2.weight", None, "experts.down_proj"),)
        gate, up, fused = next((pair for pair in pairs if name.endswith(pair[0])), (name, None, name))
        if name.endswith(("experts.w3.weight", "up_proj.weight")):
            continue
        if up:
            weight = torch.cat([weight, weights[name.removesuffix(gate) + up]], dim=-2)
        target = name.removesuffix(gate) + fused
        target = target.removeprefix("language_model.").replace("block_sparse_moe.", "mlp.")
        target = target.replace("mlp.e_score", "mlp.gate.e_score")
        out[target.replace("self_attn.index_", "self_attn.indexer.")] = weight
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time (0: only check the folder)")
    parser.add_argument("--share", type=float, default=1.0, help="batch size, as a share of the usual one")
    parser.add_argument("--workers", type=int, default=12, help="processes that make dialogues")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    args = parser.parse_args()
    if args.minutes > 0:
        train(args.out, args.device, args.minutes, args.share, args.workers, args.rate)
    check(args.out)


if __name__ == "__main__":
    main()
