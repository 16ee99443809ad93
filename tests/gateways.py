"""A gateway inside a test's own process: its event loop in a thread, HTTP on a free port, rank 0's port beside it."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import APIRouter
from scripted_ranks import ScriptedRanks

from m3dist.gateway.app import Services, create_access, create_app
from m3dist.gateway.limits import HEADERS, Keys, Protocol
from m3dist.gateway.link import Listener
from m3dist.gateway.log import flush
from m3dist.gateway.ranks import Ranks
from m3dist.options import ServeOptions

SECRET = "s" * 64
DEADLINE = 20.0  # seconds


class RunningGateway:
    """`with RunningGateway() as gateway:` and then gateway.url, gateway.start_ranks(...)."""

    def __init__(self, *routers: APIRouter, keys: tuple[str, ...] = (), **options: Any):
        self.options = ServeOptions(port=0, **options)
        self.told: list[str] = []  # the ranks' words
        self._routers, self._keys = routers, keys
        self._lives: list[ScriptedRanks] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "RunningGateway":
        self._thread.start()
        assert self._started.wait(DEADLINE)
        return self

    def __exit__(self, *exception: object) -> None:
        for life in self._lives:
            life.fall()
        self._server.should_exit = True
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        flush()

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ranks = Ranks(self.options.rows, self.options.queue, self.options.request_limit, tell=self.told.append)
        services = Services(self.ranks, self.options, Keys(self._keys))
        self.access = create_access(services, create_app(services, *self._routers))
        listener = Listener("127.0.0.1", SECRET)
        self.ranks_address = listener.address
        config = uvicorn.Config(
            self.access,
            port=0,
            http=Protocol,
            lifespan="off",
            log_config=None,
            h11_max_incomplete_event_size=HEADERS,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        http = config.bind_socket()
        self.port = http.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        serving = asyncio.create_task(listener.serve(self.ranks.live))
        self.loop.call_later(0.0, self._started.set)
        await self._server.serve([http])
        serving.cancel()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of `function(*args)`, run in the gateway's event loop."""

        async def run() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(DEADLINE)

    def start_ranks(self, **script: Any) -> ScriptedRanks:
        """A life of the ranks; returns once requests are taken, or where `ready` is False once hello was heard."""
        word = "ready" if script.get("ready", True) else "state"
        before = self.told.count(word)
        life = ScriptedRanks(self.ranks_address, SECRET, **script)
        self._lives.append(life)
        self.wait_for(lambda: self.told.count(word) > before)
        return life

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until `condition()`, asked in the event loop. Raises AssertionError after DEADLINE."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(poll(), DEADLINE), self.loop).result()
