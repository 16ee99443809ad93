"""How rank 0 tells the other ranks what to compute: a TCP connection to each, JSON objects, one a line. No MLX.

The other ranks, the workers, connect to rank 0. They are told a step before rank 0 computes it itself, while the one
before it is still being computed: so nobody waits for the telling. An idle worker blocks in a read, which costs
nothing, and never in a collective, which spins.

    rank 0 tells    step {...}, and where rows wait for a grammar masks {row: base64};  measure;  end
    workers tell    rank (whose connection it is);  report {...}
"""

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from m3dist.cluster.channel import Channel, ChannelClosed, Message
from m3dist.cluster.environment import Launch
from m3dist.cluster.handshake import admits
from m3dist.engine.link import channel_of, dial
from m3dist.errors import CommunicationError

CONNECT = 10.0  # seconds in which all workers must have connected
LONGEST = 256 * 2**20  # bytes of a message: the masks of 4096 rows, the most there can be, are 140 MB
ANY_PORT = 9  # of no meaning: nothing is sent to find a route


class World(Protocol):
    """What is used of a Comm."""

    rank: int
    world: int

    def gather_objects(self, value: Any) -> list[Any]: ...
    def object_from_rank_0(self, value: Any = None) -> Any: ...


class Workers:
    """The workers as rank 0 sees them. `reports`: what each rank said last about itself; rank 0 puts in its own."""

    def __init__(self, channels: Mapping[int, Channel], lost: Callable[[str], None]):
        """`lost` is called, by a thread, where a worker's connection ends before `end`."""
        self.reports: list[Message] = [{} for _ in range(len(channels) + 1)]
        self._channels, self._lost, self._ended = channels, lost, False
        for rank in channels:
            threading.Thread(target=self._listen, args=(rank,), name=f"rank {rank}", daemon=True).start()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Every worker. Raises CommunicationError where one is gone."""
        line = json.dumps(message).encode()
        for rank, channel in self._channels.items():
            try:
                channel.send_line(line)
            except ChannelClosed as error:
                raise CommunicationError(f"rank {rank} is gone: {error}") from None

    def end(self) -> None:
        """Tell the workers that this was all."""
        self._ended = True
        self.tell({"end": True})

    def _listen(self, rank: int) -> None:
        try:
            while (message := self._channels[rank].receive()) is not None:
                self.reports[rank] = message["report"]
        except Exception as error:  # whatever it is, nothing is heard any more
            if not self._ended:
                self._lost(f"rank {rank} is gone: {error}")


class Rank0:
    """Rank 0 as a worker sees it."""

    def __init__(self, channel: Channel, lost: Callable[[str], None]):
        """`lost` is called, by a thread, where the connection ends before rank 0 has said `end`: the main thread may be
        inside a collective that never returns."""
        self._channel, self._lost = channel, lost
        self._heard: SimpleQueue[Message] = SimpleQueue()
        threading.Thread(target=self._listen, name="rank 0", daemon=True).start()

    def hear(self) -> Message:
        """What rank 0 says next."""
        return self._heard.get()

    def report(self, report: Message) -> None:
        """Tell rank 0 about this one."""
        with suppress(ChannelClosed):  # the thread sees it too
            self._channel.send({"report": report})

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._heard.put(message)
                if "end" in message:
                    return
        except Exception as error:  # as above
            self._lost(f"rank 0 is gone: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# The connections


def meet(comm: World, launch: Launch, environ: Mapping[str, str], lost: Callable[[str], None]) -> Workers | Rank0:
    """Connect the ranks; every rank calls it. `lost` is called, by a thread, with what to say where one is gone later.

    Raises CommunicationError, on the rank that could not be reached or could not reach rank 0."""
    hosts = comm.gather_objects(socket.gethostname())
    if comm.rank == 0:
        secret, arrived = secrets.token_hex(32), Arrivals(comm.world)
        try:
            ports = arrived.listen(own_addresses(launch, environ, hosts), secret) if comm.world > 1 else []
        except CommunicationError as error:
            comm.object_from_rank_0({"error": str(error)})
            raise
        comm.object_from_rank_0({"addresses": ports, "secret": secret})
        return Workers(arrived.wait(time.monotonic() + CONNECT, hosts), lost)
    told = comm.object_from_rank_0()
    if "error" in told:
        raise CommunicationError(f"rank 0: {told['error']}")
    channel = reach(told["addresses"], told["secret"])
    channel.send({"rank": comm.rank})
    return Rank0(channel, lost)


def own_addresses(launch: Launch, environ: Mapping[str, str], hosts: Sequence[str]) -> list[str]:
    """Rank 0's: the IPv4 addresses on which the other ranks may reach it, the likeliest first. `hosts`: each rank's.

    A ring of cables has an address for each, and not every rank a cable to rank 0: those reach it on the address from
    which rank 0 reaches them.
    """
    if launch.backend == "jaccl":
        return [environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]]  # where all have met already
    if launch.backend == "nccl":
        return [environ["NCCL_HOST_IP"]]
    if launch.backend == "ring":
        rows = json.loads(Path(environ["MLX_HOSTFILE"]).read_text())
        rows = [[row] if isinstance(row, str) else row for row in rows]
        own, *others = [[address.rpartition(":")[0] for address in row] for row in rows]
        return list(dict.fromkeys([*own, *routes(address for row in others for address in row)]))
    if set(hosts) == {hosts[0]}:
        return ["127.0.0.1"]
    return list(dict.fromkeys(routes(host for host in dict.fromkeys(hosts) if host != hosts[0])))


def routes(hosts: Iterable[str]) -> list[str]:
    """Our addresses from which we would send to these hosts, those to which we know no way left out."""
    found = []
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((host, ANY_PORT))
            found.append(probe.getsockname()[0])
    return found


class Arrivals:
    """The workers that have connected to rank 0."""

    def __init__(self, world: int):
        self._world, self._listeners = world, list[socket.socket]()
        self._channels, self._changed = dict[int, Channel](), threading.Condition()

    def listen(self, addresses: Sequence[str], secret: str) -> list[str]:
        """Let in who knows the secret; returns the "ip:port" where. Raises CommunicationError if there is none."""
        reasons = []
        for address in addresses:
            try:
                listener = socket.create_server((address, 0))
                listener.settimeout(CONNECT)
                self._listeners.append(listener)
            except OSError as error:
                reasons.append(f"{address}: {error.strerror}")
        if not self._listeners:
            why = "; ".join(reasons) or "their host names lead nowhere"
            raise CommunicationError(f"no address of {socket.gethostname()} on which the other ranks reach it: {why}")
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener, secret), daemon=True).start()
        return [f"{host}:{port}" for host, port in (listener.getsockname() for listener in self._listeners)]

    def wait(self, until: float, hosts: Sequence[str]) -> dict[int, Channel]:
        """Rank -> its channel, once all are here; nobody is let in any more. Raises CommunicationError where one is not
        by `until` (time.monotonic's)."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._channels) == self._world - 1, until - time.monotonic())
            arrived = dict(self._channels)
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        if late := [f"{rank} on {hosts[rank]}" for rank in range(1, self._world) if rank not in arrived]:
            where = f"rank 0 on {hosts[0]} within {CONNECT:g} s; is a firewall between them?"
            raise CommunicationError(f"no connection from rank {', '.join(late)} to {where}")
        return arrived

    def _accept(self, listener: socket.socket, secret: str) -> None:
        with suppress(OSError):  # closed, or nobody came
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._admit, args=(connection, secret), daemon=True).start()

    def _admit(self, connection: socket.socket, secret: str) -> None:
        with connection, suppress(OSError, ChannelClosed):
            if not admits(connection, secret, CONNECT):
                return
            channel = channel_of(connection, LONGEST)
            if (message := channel.receive(CONNECT)) is None:
                return
            with self._changed:
                self._channels[message["rank"]] = channel
                self._changed.notify_all()


def reach(addresses: Sequence[str], secret: str) -> Channel:
    """Rank 0, at the first of its addresses that answers. Raises CommunicationError."""
    reasons = []
    for address in addresses:
        try:
            return dial(address, secret, CONNECT / len(addresses), LONGEST)
        except (OSError, EOFError) as error:
            reasons.append(f"{address}: {error or 'another program listens there'}")
    raise CommunicationError(f"{socket.gethostname()} cannot reach rank 0: {'; '.join(reasons)}")
