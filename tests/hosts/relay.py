"""A slow link: frames between two tap devices, each passed on a fixed time after it came.

    relay.py NEAR FAR SECONDS

Makes the devices, says so with a line, and removes them by ending, which it does when standard input ends.
"""

import contextlib
import fcntl
import os
import select
import struct
import sys
from collections import deque
from time import monotonic

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 2, 0x1000  # <linux/if_tun.h>
FRAME = 65536
TURN = 64  # frames read from one side before the other has its turn


def tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def relay(near: int, far: int, delay: float) -> None:
    other = {near: far, far: near}
    on_the_way: deque[tuple[float, int, bytes]] = deque()  # when to hand over, to which side, what
    while True:
        wait = max(0.0, on_the_way[0][0] - monotonic()) if on_the_way else None
        readable, _, _ = select.select([sys.stdin, near, far], [], [], wait)
        if sys.stdin in readable:
            return
        due = monotonic() + delay
        for side in readable:
            with contextlib.suppress(BlockingIOError):
                for _ in range(TURN):
                    on_the_way.append((due, other[side], os.read(side, FRAME)))
        while on_the_way and on_the_way[0][0] <= monotonic():
            _, side, frame = on_the_way.popleft()
            with contextlib.suppress(OSError):  # the device is down, or its queue full: the frame is lost, as on a wire
                os.write(side, frame)


def main() -> None:
    near, far = tap(sys.argv[1]), tap(sys.argv[2])
    with contextlib.suppress(OSError):
        os.nice(-20)  # ranks that spin would make the link slower than it should be
    print("ready", flush=True)
    relay(near, far, float(sys.argv[3]))


main()
