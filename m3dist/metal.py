"""What a rank on a Mac sets before it computes, and what it tells its user. Pure functions over evidence. No MLX.

**None of this has run on a Mac.** When MLX reads a setting and what it does with it, its sources say (files are named);
what a setting is worth, others have measured (issues are named). rank.py applies it.
"""

import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m3dist.errors import M3Error, PlanError

MIB, GIB = 2**20, 2**30
# Memory as sold less both is what weights and caches may take: plan_report.RESERVE_GIB.
ACTIVATIONS = 4 * GIB  # and MLX's cache of buffers
MACOS = 6 * GIB

# MLX hands the GPU a command buffer after 40 or 50 operations or "MB" (backend/metal/device.cpp; in truth elements of
# the buffer's inputs, >> 20), about 20 us of GPU time each (mlx #4521). A MoE layer of 4 bits counts 1105 of them, over
# `world`: with MLX's limits each product with the experts ends a buffer, with these a token takes 32 / world buffers.
# Measured gains: on an M1 Ultra 2000 and 2000, from 58 to 91 tokens/s of a small mixture of experts (vllm-metal #637),
# 1000 operations being as fast (#578); on an M3 Ultra 1000 and 400, 5 to 8% (mlx #4521), and 4000 and 4000 with
# MiniMax-M3 itself, 8% (omlx).
# No more than these: what a buffer uses stays allocated until it ends (vllm-metal #585: 38 GB instead of 2, at 8192
# tokens a chunk), the GPU idles until its first buffer is complete, and one that waits for other ranks in between must
# end before the GPU's watchdog, about 5 s, does.
COMMAND_BUFFER_LIMITS = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "2000"}

WIRED_LIMIT = "M3DIST_WIRED_LIMIT_MB"  # MiB to keep resident instead of what the plan needs; 0: nothing, as MLX does


def chip(platform: str = sys.platform) -> str:
    """This Mac's chip, such as "Apple M3 Ultra"; empty on any other machine."""
    if platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def command_buffer_limits(environ: Mapping[str, str], chip: str) -> dict[str, str]:
    """Variables to set before MLX first uses the GPU, when it reads them once and for all (Device in
    backend/metal/device.cpp). Those the user set are not among them.

    None on an M5, where larger buffers were slower or as fast (mlxcel #353, #360), nor on chips not heard of.
    """
    if not re.match(r"Apple M[1-4]\b", chip):
        return {}
    return {name: value for name, value in COMMAND_BUFFER_LIMITS.items() if name not in environ}


def fast_synch_risk(environ: Mapping[str, str], chip: str) -> str | None:
    """What the user must know who set MLX_METAL_FAST_SYNCH; m3dist never does. MLX reads it as C's atoi does."""
    value = environ.get("MLX_METAL_FAST_SYNCH", "")
    number = re.match(r"\s*[+-]?\d+", value)
    if not chip or not number or int(number[0]) == 0:
        return None
    return (
        f"MLX_METAL_FAST_SYNCH={value} can lock this Mac's GPU until it is restarted (mlx issues #3142 and #3830); "
        "unset it, also in the hostfile's envs"
    )


@dataclass(frozen=True)
class Wiring:
    """`limit`: bytes for mx.set_wired_limit. `warning`: what the user should do first, if anything."""

    limit: int
    warning: str | None = None


def wiring(device: Mapping[str, Any], needed: int, environ: Mapping[str, str]) -> Wiring:
    """How much memory MLX should keep resident for a rank that needs `needed` bytes of weights and caches.

    `device` is what mx.device_info() says of a Mac's GPU (backend/metal/device_info.cpp). MLX keeps nothing resident by
    itself, and macOS then takes back and compresses weights between two tokens: decoding was 43 times slower
    (vmlx-swift #418), M3's 65 times (omlx). All that macOS allows would be too much for a rank that needs little
    (exo #1672), and more is an error in MLX (backend/metal/allocator.cpp). Needs macOS 15; does nothing before.

    Raises PlanError where the machine has less memory than that, M3Error where M3DIST_WIRED_LIMIT_MB is wrong.
    """
    recommended, memory = device["max_recommended_working_set_size"], device["memory_size"]
    if needed > memory:
        raise PlanError(
            f"weights and caches need {_gib(needed)}, this Mac has {_gib(memory)}; m3dist plan --machines shows "
            "what fits: more machines, fewer bits, or a smaller share by --weights"
        )
    if asked := environ.get(WIRED_LIMIT):
        if not asked.isdecimal():
            raise M3Error(f"{WIRED_LIMIT} must be a whole number of MiB, not {asked!r}")
        return Wiring(min(int(asked) * MIB, recommended))
    wanted = needed + ACTIVATIONS
    if wanted <= recommended:
        return Wiring(wanted)
    # Activations count: weights that left less than those 0.7 GB below the limit were compressed (vmlx-swift #418).
    allowed = max(recommended, min(wanted, memory - MACOS))
    advice = f"sudo sysctl iogpu.wired_limit_mb={math.ceil(allowed / MIB)} raises that until the next restart"
    if allowed == recommended:
        advice = "that cannot be raised: use more machines, fewer bits or a shorter context"
    return Wiring(
        recommended,
        f"weights, caches and activations need {_gib(wanted)}, but macOS lets the GPU keep {_gib(recommended)} of this "
        f"Mac's {_gib(memory)}; expect decoding many times slower. {advice}",
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
