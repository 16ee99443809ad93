"""What loading costs one rank: bytes, memory and seconds, for m3dist from the whole checkpoint and from the store, and
for mlx-lm's sharded_load.

    python tests/bench_loading.py --gb 2 --ranks 1,2,4

Writes a synthetic checkpoint in the published BF16 layout, then loads every rank of every world in a process of its
own, one at a time, as if alone on its machine: first with the files dropped from the page cache (cold), then again
(warm). mlx-lm gets a stand-in for its group, so that no rank has to talk; the steps are those of its sharded_load. The
table shows the largest figure among a world's ranks. Memory is the peak resident set above that after the imports.
`store` loads from an entry that was made before. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOADERS = ("m3dist", "store", "mlx-lm")


def load_ours(directory: Path, rank: int, world: int) -> None:
    from m3dist.checkpoint import open_checkpoint
    from m3dist.loader import load_weights
    from m3dist.plan import make_plan

    checkpoint = open_checkpoint(directory)
    translation = checkpoint.translate()
    load_weights(checkpoint, translation, make_plan(translation.inventory, world), rank)


def load_store(directory: Path, rank: int, world: int) -> None:
    """`directory` is that of the rank's entry."""
    from m3dist.fetch.manifest import read_manifest
    from m3dist.fetch.store import Entry
    from m3dist.loader import load_entry_weights, plan_of

    entry = Entry(directory, read_manifest(directory))
    load_entry_weights(entry, plan_of(entry))


def load_mlx_lm(directory: Path, rank: int, world: int) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    class Group:
        def rank(self) -> int:
            return rank

        def size(self) -> int:
            return world

    model, _ = load_model(directory, lazy=True, strict=False)
    if world > 1:
        model.shard(Group())
    mx.eval(model.parameters())


def status(file: str, field: str) -> int:
    """A number out of /proc/self/`file`."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(loader: str, directory: Path, rank: int, world: int) -> dict[str, float]:
    """Load once in this process, which has done nothing else."""
    import mlx.core as mx

    if loader == "mlx-lm":
        import mlx_lm.models.minimax_m3_vl  # noqa: F401
        import mlx_lm.utils  # noqa: F401
    else:
        import m3dist.loader  # noqa: F401
    mx.eval(mx.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak (VmHWM) anew
    resident, called, disk = status("status", "VmRSS"), status("io", "rchar"), status("io", "read_bytes")
    began = time.perf_counter()
    {"m3dist": load_ours, "store": load_store, "mlx-lm": load_mlx_lm}[loader](directory, rank, world)
    return {
        "seconds": time.perf_counter() - began,
        "read": (status("io", "rchar") - called) / 2**20,
        "disk": (status("io", "read_bytes") - disk) / 2**20,
        "resident": (status("status", "VmHWM") - resident) / 2**10,
        "mlx": mx.get_peak_memory() / 2**20,
    }


def in_a_process(loader: str, directory: Path, rank: int, world: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", loader, str(directory), str(rank), str(world)]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def drop_from_cache(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def largest(results: list[dict[str, float]]) -> dict[str, float]:
    return {field: max(result[field] for result in results) for field in results[0]}


def compare(directory: Path, worlds: list[int], loaders: list[str]) -> None:
    from stores import keep

    total = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 2**20
    print(f"\n{total:,.0f} MiB of safetensors; MiB and seconds of the world's worst rank\n")
    print("| world | loader | read | of it cold from disk | peak resident | peak in MLX | cold s | warm s |")
    print("|---|---|---|---|---|---|---|---|")
    for world in worlds:
        for loader in loaders:
            cold, warm = [], []
            for rank in range(world):
                source = keep(directory, rank, world).directory if loader == "store" else directory
                os.sync()  # pages still to be written cannot be dropped
                drop_from_cache(source)
                cold.append(in_a_process(loader, source, rank, world))
                warm.append(in_a_process(loader, source, rank, world))
                if loader == "store":
                    shutil.rmtree(source)
            c, w = largest(cold), largest(warm)
            sizes = " | ".join(f"{c[field]:,.0f}" for field in ("read", "disk", "resident", "mlx"))
            print(f"| {world} | {loader} | {sizes} | {c['seconds']:.2f} | {w['seconds']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, in 10^9 bytes")
    parser.add_argument("--ranks", default="1,2,4", help="worlds to load for")
    parser.add_argument("--loaders", default=",".join(LOADERS), help="any of " + ", ".join(LOADERS))
    parser.add_argument("--one", nargs=4, metavar=("LOADER", "DIRECTORY", "RANK", "WORLD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        loader, directory, rank, world = options.one
        print(json.dumps(measure(loader, Path(directory), int(rank), int(world))))
        return
    from checkpoints import synthetic

    with tempfile.TemporaryDirectory() as folder:
        os.environ["M3DIST_STORE"] = str(Path(folder, "store"))
        directory = synthetic(Path(folder, "checkpoint"), options.gb)
        compare(directory, [int(world) for world in options.ranks.split(",")], options.loaders.split(","))


if __name__ == "__main__":
    main()
