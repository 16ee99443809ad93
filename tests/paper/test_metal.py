"""What is set on a Mac, from what Macs are reported to say. No Mac was asked by us: the samples are public reports."""

import dataclasses

import pytest

from m3dist import metal
from m3dist.errors import M3Error, PlanError
from m3dist.metal import ACTIVATIONS, GIB, MACOS, MIB
from m3dist.plan import make_plan
from m3dist.plan_report import RESERVE_GIB, inventory_of

# mx.device_info(), as printed in public repositories on GitHub: the first in SolaceHarmony/ember-ml, the second in
# several. The third's working set is also in antirez/ds4 #893: 107.52 GiB, and after sysctl iogpu.wired_limit_mb=114688
# 112.00 GiB.
M3_ULTRA = {
    "device_name": "Apple M3 Ultra",
    "architecture": "applegpu_g15d",
    "memory_size": 274877906944,
    "max_recommended_working_set_size": 223338299392,
    "max_buffer_length": 167503724544,
    "resource_limit": 499000,
}
M4_PRO = {
    "device_name": "Apple M4 Pro",
    "architecture": "applegpu_g16s",
    "memory_size": 51539607552,
    "max_recommended_working_set_size": 40200896512,
    "max_buffer_length": 30150672384,
    "resource_limit": 499000,
}
M5_MAX = {
    "device_name": "Apple M5 Max",
    "architecture": "applegpu_g17s",
    "memory_size": 137438953472,
    "max_recommended_working_set_size": 115448725504,
    "max_buffer_length": 86586540032,
    "resource_limit": 499000,
}
M5_MAX_RAISED = M5_MAX | {"max_recommended_working_set_size": 114688 * MIB}
MACS = [M3_ULTRA, M4_PRO, M5_MAX, M5_MAX_RAISED]


@pytest.mark.parametrize("device", MACS)
def test_what_is_needed_is_kept_and_no_more(device):
    recommended = device["max_recommended_working_set_size"]
    assert metal.wiring(device, 10 * GIB, {}) == metal.Wiring(10 * GIB + ACTIVATIONS)
    assert metal.wiring(device, recommended - ACTIVATIONS, {}) == metal.Wiring(recommended)
    assert metal.wiring(device, recommended - ACTIVATIONS + 1, {}).warning


@pytest.mark.parametrize("device", MACS)
def test_mlx_is_never_asked_for_more_than_it_allows(device):
    """Its set_wired_limit raises above max_recommended_working_set_size (backend/metal/allocator.cpp)."""
    recommended = device["max_recommended_working_set_size"]
    for needed in (recommended - 1, recommended, recommended + GIB, device["memory_size"]):
        assert metal.wiring(device, needed, {}).limit == recommended
    assert metal.wiring(device, GIB, {metal.WIRED_LIMIT: "99999999"}).limit == recommended


def test_the_command_to_run():
    """The weights of M3 in 4 bits, a rank of two on Macs of 128 GB, with 32,768 tokens of context."""
    plan = make_plan(inventory_of("MiniMaxAI/MiniMax-M3-4bit", None, None, None)[0], 2)
    needed = plan.bytes_held(0) + 32768 * plan.cache_bytes_per_token(0)
    stock = metal.wiring(M5_MAX, needed, {})
    assert stock.warning == (
        "weights, caches and activations need 118.4 GiB, but macOS lets the GPU keep 107.5 GiB of this Mac's 128.0 GiB;"
        " expect decoding many times slower. sudo sysctl iogpu.wired_limit_mb=121287 raises that until the next restart"
    )
    raised = metal.wiring(M5_MAX | {"max_recommended_working_set_size": 121287 * MIB}, needed, {})
    assert raised == metal.Wiring(needed + ACTIVATIONS)
    assert metal.wiring(M3_ULTRA, needed, {}).warning is None


@pytest.mark.parametrize("device", MACS)
def test_macos_keeps_what_it_needs(device):
    """Whatever is needed, the command leaves macOS its part; where that is done already, it says so."""
    most = (device["memory_size"] - MACOS) // MIB
    assert f"iogpu.wired_limit_mb={most} " in metal.wiring(device, device["memory_size"], {}).warning
    raised = device | {"max_recommended_working_set_size": most * MIB}
    assert "that cannot be raised: use more machines" in metal.wiring(raised, device["memory_size"], {}).warning


def test_more_than_the_memory_is_an_error():
    with pytest.raises(PlanError, match=r"need 60\.0 GiB, this Mac has 48\.0 GiB; m3dist plan --machines"):
        metal.wiring(M4_PRO, 60 * GIB, {})


def test_the_user_decides_what_is_kept():
    assert metal.wiring(M3_ULTRA, 200 * GIB, {metal.WIRED_LIMIT: "0"}) == metal.Wiring(0)
    assert metal.wiring(M3_ULTRA, 200 * GIB, {metal.WIRED_LIMIT: "1024"}) == metal.Wiring(GIB)
    for wrong in ("-1", "all", "1.5"):
        with pytest.raises(M3Error, match=f"M3DIST_WIRED_LIMIT_MB must be a whole number of MiB, not '{wrong}'"):
            metal.wiring(M3_ULTRA, GIB, {metal.WIRED_LIMIT: wrong})


def test_what_fits_on_paper_can_be_kept():
    """m3dist plan reserves what is not kept resident here."""
    assert ACTIVATIONS + MACOS == RESERVE_GIB * GIB


@pytest.mark.parametrize("chip", ["Apple M1", "Apple M1 Ultra", "Apple M3 Ultra", "Apple M4 Pro"])
def test_command_buffers(chip):
    assert metal.command_buffer_limits({}, chip) == metal.COMMAND_BUFFER_LIMITS
    # What the user set stays, whatever it is, and does not keep the other from being set.
    for name in metal.COMMAND_BUFFER_LIMITS:
        settings = metal.command_buffer_limits({name: "50"}, chip)
        assert name not in settings and len(settings) == len(metal.COMMAND_BUFFER_LIMITS) - 1


@pytest.mark.parametrize("chip", ["", "Apple M5", "Apple M5 Max", "Apple M10", "Apple A18 Pro", "Intel(R) Core(TM) i9"])
def test_command_buffers_are_left_alone(chip):
    assert metal.command_buffer_limits({}, chip) == {}


def test_layers_in_a_command_buffer():
    """The arithmetic that COMMAND_BUFFER_LIMITS rests on: elements of a MoE layer's arrays >> 20, of 4-bit weights."""
    limit = int(metal.COMMAND_BUFFER_LIMITS["MLX_MAX_MB_PER_BUFFER"])
    inventory, _ = inventory_of("MiniMaxAI/MiniMax-M3-4bit", None, None, None)
    for world, layer, buffers in ((1, 1105, 32), (2, 553, 16), (4, 277, 8)):
        held = make_plan(inventory, world).held_specs(0)
        elements = {name: dataclasses.replace(spec, dtype="U8").nbytes for name, spec in held.items()}
        assert round(sum(n for name, n in elements.items() if ".layers.10." in name) / MIB) == layer
        assert round(sum(n for name, n in elements.items() if ".layers." in name) / MIB / limit) == buffers


@pytest.mark.parametrize(("value", "risk"), [("1", True), (" 2x", True), ("0", False), ("", False), ("true", False)])
def test_fast_synch_is_named(value, risk):
    """As atoi reads it. Nothing here ever sets it."""
    said = metal.fast_synch_risk({"MLX_METAL_FAST_SYNCH": value}, "Apple M3 Ultra")
    assert bool(said) == risk
    if said:
        assert f"MLX_METAL_FAST_SYNCH={value} can lock this Mac's GPU until it is restarted" in said
    assert metal.fast_synch_risk({"MLX_METAL_FAST_SYNCH": value}, "") is None
    assert metal.fast_synch_risk({}, "Apple M3 Ultra") is None
    assert "MLX_METAL_FAST_SYNCH" not in metal.COMMAND_BUFFER_LIMITS


def test_no_other_machine_has_a_chip_here():
    assert metal.chip("linux") == ""
