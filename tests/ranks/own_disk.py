"""m3dist as a rank whose own folder is FOLDER/diskN. One that holds a file `stalls` answers its first reads only.

python own_disk.py FOLDER VERB ...
"""

import os
import sys
from pathlib import Path

from faulty import hang, rank_of

ANSWERED = 40  # reads of tensors


def stall(disk: Path) -> None:
    """From now on; the file `stalled` says when it has come to that."""
    read, left = os.preadv, iter(range(ANSWERED))

    def preadv(*arguments):
        if next(left, None) is None:
            (disk / "stalled").touch()
            hang()
        return read(*arguments)

    os.preadv = preadv


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    disk = Path(folder, f"disk{rank_of(os.environ)}")
    os.chdir(disk)
    if (disk / "stalls").exists():
        stall(disk)
    from m3dist.cli import main

    sys.exit(main(words))
