"""NexusServer: a pipeline behind OpenAI's video routes, alone or inside another application."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.routing import Route

from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.core.paths import as_path
from nexus_rt.serve.app import Api, make_app
from nexus_rt.serve.connections import ACCEPT_BURST, bounded_protocol
from nexus_rt.serve.dispatcher import Dispatcher
from nexus_rt.serve.runners import Runner, ThreadRunner
from nexus_rt.serve.settings import Settings
from nexus_rt.serve.store import Store

if TYPE_CHECKING:
    from nexus_rt.pipeline.pipeline import NexusPipeline

BACKLOG = 2048  # connections that the system keeps until they are accepted


class NexusServer:
    """A pipeline as a video service.

        server = NexusServer(pipe, "jobs")
        app = FastAPI(lifespan=server.lifespan)
        app.mount("/video", server.app)              # or app.router.routes.extend(server.routes)

    Args:
        pipe: a `NexusPipeline`, which runs in a thread; or a `nexus_rt.serve.runners.Runner`.
        store: the folder of the job store and the clips, of this server alone.
        settings: the rest of `nexus_rt.serve.settings.Settings`.

    Raises:
        InputError: a setting that cannot be.
    """

    def __init__(
        self, pipe: NexusPipeline | Runner, store: str | Path = "nexus-rt-jobs", **settings: Any
    ) -> None:
        self.settings = Settings(folder=as_path("store", store), **settings)
        every, warmup = self.settings.preview_every, self.settings.warmup
        source: Any = pipe
        runs = hasattr(pipe, "capacity")
        self.runner: Runner = source if runs else ThreadRunner(source, every, warmup)
        self.created = time.time()
        self._dispatcher: Dispatcher | None = None
        self.app = make_app(self, alone=False)

    @property
    def dispatcher(self) -> Dispatcher:
        """The running server's queue.

        Raises:
            InputError: it was not started.
        """
        if self._dispatcher is None:
            raise InputError(
                "the server was not started; pass lifespan=server.lifespan to the application.",
                code="missing",
                param="lifespan",
            )
        return self._dispatcher

    @property
    def routes(self) -> list[Route]:
        """The routes without an application of their own, `/v1/videos` and the rest."""
        return Api(self, alone=False).routes()

    @property
    def alone(self) -> Starlette:
        """The application where nothing else is served: it also looks at Host and Origin."""
        return make_app(self, alone=True)

    async def start(self) -> None:
        """Open the store and load the models; returns before they are there (`/ready`)."""
        store = await asyncio.to_thread(Store, self.settings.folder)
        self._dispatcher = Dispatcher(self.settings, store, self.runner)
        await self._dispatcher.start()

    async def stop(self) -> None:
        """Let the running job end, or queue it again; then close the store."""
        if self._dispatcher is not None:
            await self._dispatcher.stop()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[None]:
        """`FastAPI(lifespan=server.lifespan)`."""
        await self.start()
        try:
            yield
        finally:
            await self.stop()


def run_server(server: NexusServer) -> None:
    """Serve until SIGINT or SIGTERM, which end it gracefully; a second one at once.

    Raises:
        NexusError: the models cannot be loaded.
    """
    import uvicorn

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    settings = server.settings

    class Uvicorn(uvicorn.Server):
        failed = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit:  # the second: the store is in order, and the worker hears of it
                os._exit(128 + sig)
            if server._dispatcher is not None:
                server._dispatcher.hub.close()  # open streams would be waited for
            super().handle_exit(sig, frame)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for listener in (sock for made in self.servers for sock in made.sockets):
                # asyncio takes the backlog for what it accepts at once, too
                with socket.socket(fileno=os.dup(listener.fileno())) as same:
                    same.listen(BACKLOG)

        async def on_tick(self, counter: int) -> bool:
            of = server.dispatcher
            self.failed = of.profile is None and of.problem is not None
            return await super().on_tick(counter) or self.failed

    config = uvicorn.Config(
        server.alone,
        host=settings.host,
        port=settings.port,
        http=bounded_protocol(settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        backlog=ACCEPT_BURST,
    )
    # uvicorn raises the signal again when it is done, and then nothing is left to be ended
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    http = Uvicorn(config)
    try:
        http.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if http.failed:
        raise NexusError(server.dispatcher.problem)
