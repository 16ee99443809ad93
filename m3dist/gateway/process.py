"""The gateway's process, as whoever starts it sees it: the supervisor, or rank 0 under another launcher. No MLX.

Messages go through its standard input and output, JSON objects, one a line; what it has to say to people goes to our
standard error. The API keys and the secret that rank 0 proves to know travel there alone, never on a command line and
never in an environment but rank 0's. Its standard input ends with us, however we end, and it with that.

    told    options (ServeOptions', api_keys, secret, ranks_host)    tells   listening {http, ranks}: addresses
            up: number of this start of the ranks                            ready
            down: why the ranks ended; again: seconds                        answered (the first token since ready)
            failed: why they are not started again                           drained
            drain: seconds
"""

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict

from m3dist.cluster.channel import Channel, ChannelClosed, Message
from m3dist.cluster.environment import LaunchError
from m3dist.cluster.judge import signal_name
from m3dist.cluster.ssh import python_module
from m3dist.engine.link import GATEWAY, SECRET
from m3dist.options import ServeOptions

MODULE = "m3dist.gateway.program"
API_KEY = "M3DIST_API_KEY"  # where a user may put one
START_LIMIT = 60.0  # seconds until it listens
END_GRACE = 5.0  # seconds that it may take to end


class GatewayProcess:
    """The gateway, once it listens at `url` for clients. `tell` is called with each of its messages, and with None once
    it is gone; on a thread of its own."""

    def __init__(
        self,
        options: ServeOptions,
        keys: Sequence[str],
        tell: Callable[[Message | None], None],
        ranks_host: str = "127.0.0.1",
    ):
        """`ranks_host`: our address at which rank 0 finds it. Raises LaunchError where it does not come up."""
        self._tell, self._secret = tell, secrets.token_hex(32)
        environ = {name: value for name, value in os.environ.items() if name != API_KEY}
        # A session of its own: Ctrl-C reaches us alone, and we end everything in good order.
        self._process = subprocess.Popen(
            [sys.executable, *python_module(MODULE)],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._stdin = self._process.stdin
        self._channel = Channel(self._process.stdout.fileno(), self._stdin.fileno())
        told = asdict(options) | {"api_keys": list(keys), "secret": self._secret, "ranks_host": ranks_host}
        try:
            self._channel.send({"options": told})
            message = self._channel.receive(START_LIMIT)
            if message is None:
                raise LaunchError(f"the gateway did not listen within {START_LIMIT:g} s")
            listening = message["listening"]
        except (ChannelClosed, LaunchError) as error:
            self.close()
            reason = f"the gateway {self.how_it_ended()}" if isinstance(error, ChannelClosed) else str(error)
            raise LaunchError(reason) from None
        self.address: str = listening["http"]  # host:port
        self._ranks_address: str = listening["ranks"]  # ip:port
        self._following = threading.Thread(target=self._follow, daemon=True)
        self._following.start()

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def variables(self) -> dict[str, str]:
        """What rank 0 must find in its environment."""
        return {GATEWAY: self._ranks_address, SECRET: self._secret}

    def send(self, **message: object) -> None:
        """Tell it something. A gateway that is gone, `tell` has said or will say."""
        if not self._stdin.closed:
            with suppress(ChannelClosed):
                self._channel.send(message)

    def how_it_ended(self) -> str:
        """In words, to go on with after its name."""
        status = self._process.poll()
        if status is None:
            return "is still running"
        return f"ended with exit code {status}" if status >= 0 else f"was killed by {signal_name(-status)}"

    def close(self) -> None:
        """End it: at once, where it heeds the end of its standard input. What still ran there gets an error."""
        with suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(END_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _follow(self) -> None:
        with suppress(ChannelClosed):
            while (message := self._channel.receive()) is not None:
                self._tell(message)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_GRACE)  # so that how_it_ended knows
        self._tell(None)
