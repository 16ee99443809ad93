"""The `m3dist fetch` that gets what is missing, to be shown to whoever has to type it. No MLX."""

import shlex
from collections.abc import Sequence

from m3dist.fetch.manifest import Manifest
from m3dist.tensors import Quantization, modules


def fetch_command(
    model: str,
    where: str,
    *,
    weights: Sequence[float] | None = None,
    experts: str = "columns",
    attention: str = "heads",
    quantization: Quantization | None = None,
) -> str:
    """`m3dist fetch` of a hub id. `where`: its flags for the ranks, such as "-n 2"; the rest: as `loader.load` has it,
    and the format asked for."""
    words = ["m3dist fetch", shlex.quote(model), where]
    if weights and len(set(weights)) > 1:
        words.append("--weights " + ",".join(f"{weight:.15g}" for weight in weights))
    if experts != "columns":
        words.append(f"--experts {experts}")
    if attention != "heads":
        words.append(f"--attention {attention}")
    if quantization:
        bits = f" --bits {quantization.bits}" if quantization.mode == "affine" else ""
        words.append(f"--mode {quantization.mode}{bits} --group-size {quantization.group_size}")
    return " ".join(word for word in words if word)


def refetch_command(manifest: Manifest) -> str:
    """What gets one rank's entry again, on its own host."""
    hub = not manifest.revision.startswith("files-")
    model = f"{manifest.model}@{manifest.revision}" if hub else manifest.model
    where = f"--world {manifest.world} --rank {manifest.rank}" if manifest.world > 1 else ""
    cut = {"experts": manifest.experts, "attention": manifest.attention}
    wanted = converted_to(manifest)
    matrices = [m for m in modules(manifest.inventory().config).values() if m.is_matrix and not m.exact]
    formats = {manifest.quantization.get(module.name) for module in matrices}
    overrides = " --overrides FILE" if wanted and formats != {wanted} else ""
    return fetch_command(model, where, weights=manifest.weights, quantization=wanted, **cut) + overrides


def converted_to(manifest: Manifest) -> Quantization | None:
    """The format that an entry's experts were given; None where its config.json says that they had it before."""
    own, found = manifest.inventory().config.quantization or {}, manifest.expert_format
    if found is None:
        return None
    had = {"mode": own.get("mode") or own.get("quant_method") or "affine", "bits": own.get("bits", found.bits)}
    return None if own and had == {"mode": found.mode, "bits": found.bits} else found
