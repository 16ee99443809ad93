"""What predictions start from: Macs, links between them, and speeds that others published. Data only, no MLX.

Nothing here was measured by m3dist: each entry says where it is from. `m3dist bench --json` measures the same figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Of the published bandwidth, what a product of a quantised matrix with one vector reaches: 74 to 78% on a GB10
# (lablup/mlxcel/pull/684); a plain read reaches 530 of 614 GB/s on an M5 Max (ml-explore/mlx/issues/3837).
USABLE_BANDWIDTH = 0.75
# Of the published arithmetic, what MLX's matrix products reach: 17.4 of 28.6 TFLOP/s in float16 on an M3 Ultra
# (raullenchai/Rapid-MLX/pull/258); attention came within 12% of that there.
USABLE_FLOPS = 0.6
# How often K and V that many tokens selected pass through memory: sparse.attend_gathered copies them, attention reads
# the copies.
SELECTED_PASSES = 3
# Seconds a small dependent kernel takes in a long chain: 3,200 in 8.8 ms on an M3 Ultra (ml-explore/mlx/issues/4521).
LAUNCH = 2.75e-6
# Seconds to hand an array from the GPU to the CPU and back, as each sum on a Mac needs: 180 us on an M3 Ultra
# (ml-explore/mlx/issues/4438), 150 to 200 us on others (ml-explore/mlx/pull/1773). MLX_METAL_FAST_SYNCH=1 makes it
# about 4 us and can lock the GPU until a restart (ml-explore/mlx/issues/3142): m3dist does not set it.
HANDOVER, FAST_HANDOVER = 180e-6, 4e-6
LARGEST_MESH = 8  # jaccl's MESH_MAX_PEERS


@dataclass(frozen=True)
class Mac:
    """A kind of Mac as sold, with its largest GPU and memory."""

    bandwidth: float  # GB/s
    tflops: float  # TFLOP/s in float32, or in float16 where the GPU has matrix units (M5)
    memory: int  # GB
    rdma_ports: int  # of Thunderbolt 5; 0: older ones, which carry no RDMA
    source: str


# TFLOP/s: cores x 256 a cycle x clock (philipturner/metal-benchmarks), which gives the 21 and 27.2 that Apple says of
# M1 and M2 Ultra; x 1024 with the matrix units of the M5 (kavanaghpatrick/gpu-forge/issues/15).
MACS: Mapping[str, Mac] = {
    "m1-ultra": Mac(800, 21.2, 128, 0, "apple.com/newsroom 2022-03, M1 Ultra; 64 cores at 1.30 GHz"),
    "m2-ultra": Mac(800, 27.2, 192, 0, "apple.com/newsroom 2023-06, M2 Ultra; 76 cores at 1.40 GHz"),
    "m3-ultra": Mac(819, 28.6, 512, 6, "apple.com/mac-studio/specs 2025; 80 cores at 1.40 GHz"),
    "m3-max": Mac(400, 14.3, 128, 0, "apple.com/newsroom 2023-10, M3 Max; 40 cores at 1.40 GHz"),
    "m4-max": Mac(546, 16.2, 128, 4, "apple.com/mac-studio/specs 2025; 40 cores at 1.58 GHz"),
    "m5-max": Mac(614, 65.5, 128, 3, "apple.com/newsroom 2026-03, M5 Max; 40 cores at 1.6 GHz, the clock assumed"),
}


@dataclass(frozen=True)
class Machine:
    """What one rank's machine reaches. `sources`: where a field's value is from."""

    name: str
    bandwidth: float  # bytes/s, reading weights for one token
    flops: float  # FLOP/s of products of weights with many tokens
    expert_flops: float  # the same, of tokens that chose their experts
    attention_bandwidth: float  # bytes/s, reading K and V, and index K, for one token
    attention_flops: float  # FLOP/s
    index_flops: float  # FLOP/s of the index scores that blocks are chosen by
    selected_bandwidth: float  # bytes/s of K and V that many tokens chose, each its own
    launch: float  # seconds a kernel takes beyond its reads and its arithmetic
    # bytes/s of weights that are unpacked before they are multiplied by many tokens; None: unpacked on the way
    unpack_bandwidth: float | None = None
    host: float = 0.0  # seconds Python takes to build and submit a layer of a decode step
    host_selection: float = 0.0  # and beyond that, a layer that selects blocks
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    """How ranks are connected: in a ring, or up to `mesh` of them each with each. `sources` as in Machine."""

    name: str
    hop: float  # seconds from a rank to its neighbour, of a token's hidden state
    bandwidth: float  # bytes/s a rank sends
    exchange: float = 0.0  # seconds of a sum where each is connected with each
    mesh: int = 1
    handover: float = 0.0  # seconds between GPU and CPU, and back
    sources: Mapping[str, str] = field(default_factory=dict)

    def latency(self, world: int) -> float:
        """Seconds of the sum of one token's hidden state: a ring passes it on 2 (world - 1) times."""
        if world == 1:
            return 0.0
        return self.handover + (self.exchange if world <= self.mesh else 2 * (world - 1) * self.hop)

    def seconds(self, world: int, nbytes: float) -> float:
        """Seconds of a larger sum: a rank sends all parts but one twice, to reduce and to gather."""
        return self.latency(world) + 2 * (world - 1) / world * nbytes / self.bandwidth


_HANDOVER = "GPU to CPU and back, M3 Ultra (ml-explore/mlx issue 4438)"
_ROUND_TRIP = "half of a round trip of 300 us in TCP over Thunderbolt (jeffgeerling.com 2025-12)"
_ETHERNET = {
    "hop": f"assumed the same TCP: {_ROUND_TRIP}",
    "bandwidth": "10 Gbit/s less headers, assumed",
    "handover": _HANDOVER,
}
_THUNDERBOLT = {
    "hop": _ROUND_TRIP,
    "bandwidth": "26 Gbit/s over Thunderbolt 5 (exo issue 2117); Thunderbolt 4 is slower",
    "handover": _HANDOVER,
}
_JACCL = {
    "hop": "5 to 9 us (Stabilise.io)",
    "exchange": "4 KB between two M4 Pro (omar-karray/mlx-jaccl-cluster)",
    "bandwidth": "4 MB summed in 0.56 ms (omar-karray/mlx-jaccl-cluster)",
    "handover": _HANDOVER,
}
_FAST = _JACCL | {"handover": "MLX_METAL_FAST_SYNCH=1, which can lock the GPU (ml-explore/mlx issues 4438, 3142)"}
LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        Link("ethernet-ring", hop=150e-6, bandwidth=1.1e9, handover=HANDOVER, sources=_ETHERNET),
        Link("thunderbolt-ring", hop=150e-6, bandwidth=3.2e9, handover=HANDOVER, sources=_THUNDERBOLT),
        Link("jaccl", 9e-6, 7.5e9, 25.5e-6, LARGEST_MESH, HANDOVER, _JACCL),
        Link("jaccl-fast-synch", 9e-6, 7.5e9, 25.5e-6, LARGEST_MESH, FAST_HANDOVER, _FAST),
    )
}


@dataclass(frozen=True)
class Published:
    """Tokens per second of decode that others measured, by the number of Macs; M3 Ultra unless the model says so."""

    model: str
    engine: str
    speeds: Mapping[int, float]
    source: str


PUBLISHED_SPEEDS: tuple[Published, ...] = (
    Published("MiniMax-M3 4-bit, short context", "omlx", {1: 27}, "omlx's notes: 26 to 28"),
    Published("MiniMax-M3 4-bit, 103k of context", "omlx", {1: 18.7}, "omlx's notes"),
    Published("Qwen3-235B-A22B 8-bit", "exo, RDMA", {1: 19.5, 2: 26.2, 4: 31.9}, "Geerling, in exo docs/benchmarks"),
    Published("Qwen3-235B-A22B 8-bit", "llama.cpp, TCP", {1: 20.4, 2: 17.2, 4: 15.2}, "Geerling"),
    Published("DeepSeek V3.1 671B 8-bit", "exo, RDMA", {1: 21.1, 2: 27.8, 4: 32.5}, "Geerling"),
    Published("DeepSeek V3.1 671B 8-bit", "llama.cpp, TCP", {1: 14.8, 2: 16.0, 4: 14.6}, "Geerling"),
    Published("Kimi K2 Thinking 4-bit", "exo, RDMA", {2: 21.6, 4: 28.3}, "Geerling"),
    Published("Kimi K2 Thinking 4-bit", "llama.cpp, TCP", {2: 18.5, 4: 16.4}, "Geerling"),
    Published("GLM, mlx-lm's shard", "mlx-lm, jaccl", {1: 16, 4: 24.6}, "ml-explore/mlx-lm/pull/698"),
    Published("GLM-5 8-bit, 10k of context", "exo, RDMA", {2: 16.7, 4: 21.3}, "exo issue 1468"),
    Published("Kimi-K2.7-Code 4-bit", "mlx-lm, jaccl", {2: 20.1}, "HF moonshotai/Kimi-K2.7-Code discussion 7"),
)
