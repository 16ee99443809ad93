"""`m3dist serve`: a gateway that holds the requests, ranks that compute them, and who starts them again. No MLX.

The gateway outlives the ranks: when they end, whatever the reason, it keeps its clients waiting while they are started
again, and has them go on where they were. Never before the last of the old ranks is gone: two copies of the weights
would not fit.

Everything that happens (a signal, a message of the gateway's, the end of the ranks) is an event on one queue, on which
the main thread sleeps; the job itself runs on a thread of its own.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

from m3dist.cluster.agent import END_GRACE
from m3dist.cluster.channel import Message
from m3dist.cluster.environment import Launch
from m3dist.cluster.hostfile import Host
from m3dist.cluster.judge import Verdict
from m3dist.cluster.mpi import own_addresses
from m3dist.cluster.supervise import Events, Interrupted, Job, judged, signals_to
from m3dist.engine.link import GATEWAY
from m3dist.gateway.process import GatewayProcess
from m3dist.options import ServeOptions

SETTLED = 60.0  # seconds after which ranks that are ready count as started well
LONGEST_PAUSE = 60.0  # seconds
FAREWELL = 10.0  # seconds in which /health says why all is over
STOP_LIMIT = 10.0  # seconds that ranks may take to end in good order
LEAVE_LIMIT = 120.0  # seconds that a killed rank may take to be gone: it gives back hundreds of gigabytes
WRONG_INPUT = 2  # a rank's status where starting it again cannot help


def main(options: ServeOptions, job: Job, keys: Sequence[str]) -> int:
    """Serve until a signal; or until the ranks have failed too often, then with the status of what went wrong.

    SIGTERM, SIGINT and SIGHUP: no new requests; what runs may finish within `options.drain` seconds; 0 then. At a
    second one everything ends at once. Raises LaunchError where the gateway does not come up.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # what is typed is for nobody here, nor for rank 0, which would have our standard input
    os.close(nothing)
    server = _Server(options, replace(job, leave_limit=LEAVE_LIMIT), keys)
    with signals_to(server.events.put):
        try:
            return server.run()
        finally:
            server.close()


def rank_main(options: ServeOptions, launch: Launch, keys: Sequence[str] = ()) -> int:
    """Be a rank. Where nobody supervises this job, under mpirun or mlx.launch, rank 0 has the gateway as its child, and
    nothing is started again."""
    from m3dist.engine.program import main as engine_main

    if launch.rank or GATEWAY in os.environ:
        return engine_main(options, launch)
    gateway = GatewayProcess(options, keys, lambda message: None)  # that it is gone, the link tells
    try:
        os.environ.update(gateway.variables)
        announce(gateway)
        return engine_main(options, launch)
    finally:
        gateway.close()


def announce(gateway: GatewayProcess) -> None:
    """The one line on standard output: programs read the address there."""
    print(f"m3dist: listening on {gateway.url}", flush=True)


def tell(text: str) -> None:
    print(f"m3dist: {text}", file=sys.stderr, flush=True)


def pause_before(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 0, 1, 2, 4 ... LONGEST_PAUSE."""
    return 0.0 if failures <= 1 else min(LONGEST_PAUSE, 2.0 ** (failures - 2))


def address_for(host: Host) -> str:
    """Ours, at which `host` reaches us. Raises LaunchError where there is no way to it."""
    return "127.0.0.1" if host.local else own_addresses([host])[0]


class _Ranks:
    """One life of the ranks. When all are gone, its Verdict is put on `events`."""

    def __init__(self, job: Job, events: "SimpleQueue[_Event]"):
        self._job, self._over = job, events
        self._events: Events = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def end(self, number: int, why: str = "") -> None:
        """As signal `number` would, but for the reason `why`; a second time: at once."""
        self._events.put(Interrupted(number, why))

    def _run(self) -> None:
        try:
            verdict = judged(self._job, events=self._events)
        except Exception as error:  # whatever it is, the main thread must not wait for ever
            verdict = Verdict(1, f"the launcher failed: {type(error).__name__}: {error}")
        self._over.put(verdict)


_Event = Interrupted | Message | Verdict | None  # of the gateway a message, or None when it is gone


class _Server:
    def __init__(self, options: ServeOptions, job: Job, keys: Sequence[str]):
        self.options, self.job, self.keys = options, job, keys
        self.events: SimpleQueue[_Event] = SimpleQueue()
        self.gateway: GatewayProcess | None = None
        self.gateway_lost = ""  # why
        self.ranks: _Ranks | None = None
        self.starts = 0
        self.failures = 0  # in a row
        self.was_ready = False  # ever
        self.ready_since: float | None = None  # of these ranks
        self.signal: int | None = None  # the first that came: no new requests since
        self.limit = float("inf")  # what is awaited must have happened by then, once all is to end
        self.status: int | None = None  # ours, once it is certain: nothing is started again

    def run(self) -> int:
        while self.status is None:
            self._start_gateway()
            verdict = self._live()
            if self.status is None:
                self._failed(verdict)
        return self.status

    def close(self) -> None:
        """Nothing is left, whatever happened."""
        if self.ranks:  # an error of ours
            self.limit = float("inf")
            self.ranks.end(signal.SIGTERM)
            self._wait(STOP_LIMIT)
        if self.gateway:
            self.gateway.close()

    # -----------------------------------------------------------------------------------------------------------------
    # A life of the ranks, and between two

    def _start_gateway(self) -> None:
        """The first; or another at the same address, if it is gone. Raises LaunchError."""
        if self.gateway:
            return
        address = address_for(self.job.hosts[0])
        self.gateway = GatewayProcess(self.options, self.keys, self.events.put, address)
        self.options, self.gateway_lost = replace(self.options, port=self.gateway.port), ""
        if not self.starts:
            announce(self.gateway)

    def _live(self) -> Verdict:
        """Start the ranks, and do what is to be done until they have ended."""
        assert self.gateway
        self.starts += 1
        self.gateway.send(up=self.starts)
        env: Mapping[str, str] = {**self.job.env, **self.gateway.variables}
        self.ranks = _Ranks(replace(self.job, env=env), self.events)
        while (verdict := self._wait(float("inf"))) is None:
            self.ranks.end(signal.SIGTERM, "the ranks were told to end")
            self.limit = float("inf")
        self.ranks = None
        if self.ready_since is not None and time.monotonic() - self.ready_since >= SETTLED:
            self.failures = 0
        self.ready_since = None
        if self.gateway_lost:
            return replace(verdict, reason=self.gateway_lost)
        return verdict if verdict.status else replace(verdict, status=1, reason="the ranks ended by themselves")

    def _failed(self, verdict: Verdict) -> None:
        """Wait until the ranks may be started again; or set our status."""
        self.failures += 1
        hopeless = verdict.status == WRONG_INPUT and not self.was_ready
        if hopeless or self.failures > self.options.restarts:
            self._give_up(verdict, 0.0 if hopeless else FAREWELL)
        else:
            self._pause(verdict)

    def _pause(self, verdict: Verdict) -> None:
        """Until it is time to start again: not while ranks may still be ending on a host that did not say so, which
        then are ended by their agent, or with it."""
        pause = pause_before(self.failures)
        if verdict.unsure:
            pause = max(pause, self.job.silence_limit + END_GRACE + 1.0)
        if self.gateway:
            self.gateway.send(down=verdict.reason, again=pause)
        tell(f"starting the ranks again in {pause:g} s ({self.failures} of {self.options.restarts} in a row)")
        self._wait(pause)

    def _give_up(self, verdict: Verdict, farewell: float) -> None:
        """The requests get the reason as their error; /health says it for `farewell` seconds."""
        self.status = verdict.status
        if farewell:
            tell(f"giving up after {self.failures} failures in a row: {verdict.reason}")
        if self.gateway:
            self.gateway.send(failed=verdict.reason)
            self._wait(farewell)

    # -----------------------------------------------------------------------------------------------------------------
    # Events

    def _wait(self, seconds: float) -> Verdict | None:
        """Handle what happens, until the ranks have ended; None after `seconds`, or at `self.limit`."""
        until = time.monotonic() + seconds
        while True:
            left = min(until, self.limit) - time.monotonic()
            try:
                event = self.events.get(timeout=None if left == float("inf") else max(0.0, left))
            except Empty:
                if self.signal and self.status is None and time.monotonic() >= self.limit:
                    self.status = 128 + self.signal  # the gateway did not say that it is done
                return None
            if isinstance(event, Verdict):
                return event
            if isinstance(event, Interrupted):
                self._interrupted(event.signal)
            elif event is None:
                self._gateway_gone()
            else:
                self._told(event)

    def _told(self, message: Message) -> None:
        if "ready" in message:
            self.ready_since = time.monotonic()
            if not self.was_ready:
                assert self.gateway
                tell(f"ready: {self.gateway.url}")
            elif self.failures:
                tell("ready again")
            self.was_ready = True
        elif "answered" in message:
            self.failures = 0
        elif "drained" in message:
            self.status = 0
            # Ranks that are not ready have not heard that they are to stop.
            self.limit = time.monotonic() + (STOP_LIMIT if self.ready_since is not None else 0.0)

    def _interrupted(self, number: int) -> None:
        """The first signal drains; the second ends all at once."""
        if self.signal is None and self.gateway and self.status is None:
            self.signal = number
            tell(f"{signal.Signals(number).name} received: finishing what runs, for {self.options.drain:g} s at most")
            self.gateway.send(drain=self.options.drain)
            self.limit = time.monotonic() + self.options.drain + STOP_LIMIT
            return
        self.status = 128 + number
        self.limit = time.monotonic() if not self.ranks else float("inf")
        if self.ranks:
            self.ranks.end(number)
            self.ranks.end(number)

    def _gateway_gone(self) -> None:
        """Its requests are lost, and what the ranks compute is nobody's: they end, and all begins anew."""
        assert self.gateway
        self.gateway_lost = f"the gateway {self.gateway.how_it_ended()}"
        self.gateway.close()
        self.gateway = None
        if self.status is not None:
            return
        tell(self.gateway_lost)
        if self.signal is not None:
            self.status = 128 + self.signal
        if self.ranks:
            self.ranks.end(signal.SIGTERM, self.gateway_lost)
