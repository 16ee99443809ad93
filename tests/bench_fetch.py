"""What m3dist fetch gets from a hub, keeps, and needs for it, and what starting from that costs; beside mlx-lm, each of
whose machines has a full copy.

    python tests/bench_fetch.py --gb 4 --ranks 1,2,4

Writes a synthetic checkpoint in the published BF16 layout and serves it by tests/hub_server.py, which counts what it
sends. The ranks of each world fetch together, over a ring, in its own format and with --bits 4. Then every rank loads
its entry, as tests/bench_loading.py does it: in a process of its own, one at a time, from files dropped from the page
cache. mlx-lm loads from the whole, for --bits 4 as m3dist convert made it. The hub is on this machine, so that seconds
are of everything but a network; and of as many ranks as it has cores, of them side by side. Memory is the peak resident
set above that after the imports. The tables show the largest figure among a world's ranks. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench_loading import drop_from_cache, in_a_process, largest, status

MODEL = "owner/name"
FORMATS = {"as published": (), "4 bits": ("--bits", "4")}
COLUMNS = (
    ("format", "ranks", "sent by the hub", "copies", "fetched in", "peak", "kept by a rank"),
    ("format", "ranks", "a rank holds", "reads", "of held", "peak", "above held", "cold")
    + ("mlx-lm keeps", "reads", "peak", "cold"),
)
TESTS = Path(__file__).parent


def measure(words: Sequence[str]) -> dict[str, float]:
    """Run a verb of m3dist's in this process, which has done nothing else."""
    import mlx.core as mx

    import m3dist.fetch.convert  # noqa: F401
    from m3dist import cli

    mx.eval(mx.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak (VmHWM) anew
    resident, began = status("status", "VmRSS"), time.perf_counter()
    code = cli.main(list(words))
    seconds = time.perf_counter() - began
    return {"status": code, "seconds": seconds, "peak": (status("status", "VmHWM") - resident) / 2**10}


def side_by_side(words: Sequence[str], environs: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """`measure` in a process for each environment; the largest figures."""
    command = [sys.executable, __file__, "--one", *words]
    root = {"PYTHONPATH": str(TESTS.parent)}
    processes = [
        subprocess.Popen(command, env=os.environ | root | environ, stdout=subprocess.PIPE, text=True)
        for environ in environs
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{' '.join(words)} failed")
    return largest([json.loads(text.splitlines()[-1]) for text in said])


def fetched(hub, folder: Path, world: int, flags: Sequence[str]) -> dict[str, float]:
    """Fetch for a world and load every entry."""
    from ranks.world import ring

    from m3dist.fetch import store

    hub.reset()
    found = side_by_side(["fetch", MODEL, *flags], [ring(folder, world, rank) for rank in range(world)])
    found["sent"] = hub.stats()["sent"] / 2**20
    entries = sorted(store.entries(MODEL), key=lambda entry: entry.manifest.rank)
    loads = []
    for entry in entries:
        held = entry.manifest.make_plan().bytes_held(entry.manifest.rank) / 2**20
        os.sync()  # pages still to be written cannot be dropped
        drop_from_cache(entry.directory)
        load = in_a_process("store", entry.directory, entry.manifest.rank, world)
        load |= {"disk": entry.nbytes / 2**20, "held": held}
        loads.append(load | {"ratio": load["read"] / held, "above": load["resident"] - held})
    shutil.rmtree(store.root())
    assert len(entries) == world
    return found | {f"load {field}": value for field, value in largest(loads).items()}


def loaded_by_mlx_lm(directory: Path, world: int) -> dict[str, float]:
    loads = []
    for rank in range(world):
        os.sync()
        drop_from_cache(directory)
        loads.append(in_a_process("mlx-lm", directory, rank, world))
    return largest(loads)


def compare(hub, folder: Path, sources: Mapping[str, Path], one_copy: float, worlds: Sequence[int]) -> None:
    """`sources`: what mlx-lm loads, by format; `one_copy`: MiB of what is kept, in the published format."""
    tables = [["| " + " | ".join(row) + " |", "|---" * len(row) + "|"] for row in COLUMNS]
    for name, flags in FORMATS.items():
        whole = sum(file.stat().st_size for file in sources[name].glob("*.safetensors")) / 2**20
        for world in worlds:
            f, m = fetched(hub, folder, world, flags), loaded_by_mlx_lm(sources[name], world)
            tables[0].append(
                f"| {name} | {world} | {f['sent']:,.0f} MiB | {f['sent'] / one_copy:.4f} | {f['seconds']:.0f} s |"
                f" {f['peak']:,.0f} MiB | {f['load disk']:,.0f} MiB |"
            )
            tables[1].append(
                f"| {name} | {world} | {f['load held']:,.0f} MiB | {f['load read']:,.0f} MiB | {f['load ratio']:.4f} |"
                f" {f['load resident']:,.0f} MiB | {f['load above']:,.0f} MiB | {f['load seconds']:.1f} s |"
                f" {whole:,.0f} MiB | {m['read']:,.0f} MiB | {m['resident']:,.0f} MiB | {m['seconds']:.1f} s |"
            )
            print("\n".join(table[-1] for table in tables), file=sys.stderr, flush=True)
    print("\n\n".join("\n".join(table) for table in tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint, in 10^9 bytes")
    parser.add_argument("--ranks", default="1,2,4", help="worlds to fetch for")
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = measure(options.one)
        print(json.dumps(found))
        sys.exit(found["status"])
    from checkpoints import synthetic
    from hub_server import HubServer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        directory = synthetic(folder / "checkpoint", options.gb)
        os.environ["M3DIST_STORE"] = str(folder / "store")
        one_copy = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 2**20
        converted = folder / "converted"
        made = side_by_side(["convert", str(directory), str(converted), *FORMATS["4 bits"]], [{}])
        with HubServer(directory, MODEL) as hub:
            os.environ.update(hub.environment(folder / "home"))
            sources = {"as published": directory, "4 bits": converted}
            compare(hub, folder, sources, one_copy, [int(world) for world in options.ranks.split(",")])
        print(f"\nm3dist convert --bits 4: {made['seconds']:.0f} s, peak {made['peak']:,.0f} MiB")


if __name__ == "__main__":
    main()
