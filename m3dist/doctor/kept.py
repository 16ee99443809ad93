"""What a host's store keeps of a model: probe.py runs this in the environment that the host's ranks will have. No MLX.

`python -m m3dist.doctor.kept '{"model": "owner/name", "world": 2}'`
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from m3dist.checkpoint import hub_id
from m3dist.fetch.store import candidates, check, root


def main() -> None:
    print(json.dumps(describe(**json.loads(sys.argv[1]))))


def describe(
    model: str,
    world: int,
    weights: Sequence[float] | None = None,
    experts: str = "columns",
    attention: str = "heads",
) -> dict[str, Any]:
    """Where the store is, how many bytes are free there, and its entries of a hub id for the ranks of this cut."""
    repo, revision = hub_id(model)
    if revision and not re.fullmatch("[0-9a-f]{40}", revision):
        revision = None  # a branch: which commit it is only the hub knows
    where = root()
    existing = next(parent for parent in (where, *where.parents) if os.path.exists(parent))
    cut: dict[str, Any] = {"world": world, "weights": weights, "experts": experts, "attention": attention}
    found = [entry for rank in range(world) for entry in candidates(repo, rank=rank, revision=revision, **cut)]
    return {
        "root": str(where),
        "free": shutil.disk_usage(existing).free,
        "entries": [
            {
                "rank": entry.manifest.rank,
                "created": entry.manifest.created,
                "revision": entry.manifest.revision,
                "plan": entry.manifest.plan,
                "bytes": entry.nbytes,
                "problem": next((f"{entry.directory / p.file} {p.what}" for p in check(entry)), None),
            }
            for entry in found
        ],
    }


if __name__ == "__main__":
    main()
