"""
The parts of a server while it runs. Routes find them in their application.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Depends, Request
from prometheus_client import (
    CollectorRegistry,
    Gauge,
    PlatformCollector,
    ProcessCollector,
)

from whispercache.errors import LoadFailed, WhisperCacheError

from . import seen
from .decode import Decoder
from .engine import Terms
from .errors import RETRY_S, ApiError
from .gate import Gate
from .limits import Arrivals
from .seen import RequestsSeen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .engine import Engine
    from .offers import Offer, Offers
    from .options import ServerOptions
    from .wyoming.endpoint import Endpoint

_log = logging.getLogger("whispercache")


class Service:
    """
    An engine and what it offers, with all that a server adds to them.
    """

    def __init__(self, options: ServerOptions, offers: Offers, engine: Engine) -> None:
        self.options = options
        self.offers = offers
        self.engine = engine
        # Requests that may be at work with each model.
        self._parallel: int = options.parallel
        self.arrivals: Arrivals = Arrivals()
        # In whatever protocol they come.
        self.seen: RequestsSeen = RequestsSeen()
        # Made anew at each start; these are for applications that ask before.
        self._renew()
        self.registry: CollectorRegistry = self._new_registry()
        # What is to be loaded at the start, and why it is not yet.
        self.pending: dict[str, str] = dict.fromkeys(
            (*options.preload, *options.pin), "loading"
        )
        # Where it runs: the loop, and what was started there without the server's word.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._background: asyncio.Task[None] | None = None

    def _new_endpoint(self) -> Endpoint | None:
        address = self.options.wyoming
        if address is None:
            return None
        try:
            from .wyoming.endpoint import Endpoint
        except ModuleNotFoundError as missing:
            name = str(missing.name).partition(".")[0]
            raise WhisperCacheError(
                f"{name} is missing; pip install 'whispercache[wyoming]'"
            ) from missing
        return Endpoint(self, address, self.options.drain_s)

    def _new_registry(self) -> CollectorRegistry:
        # Of its own: two servers in one process would clash in the global one.
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        waiting = Gauge(
            "whispercache_server_waiting_requests",
            "Requests beyond those that may be at work; max_waiting bounds them.",
            registry=registry,
        )
        # The gate is another one after a restart, so it is asked for each time.
        waiting.set_function(lambda: self.gate.waiting)
        return registry

    def _renew(self) -> None:
        options = self.options
        # The same one, which the application's middleware has.
        self.arrivals.open()
        self.gate: Gate = Gate(self._parallel, options.max_waiting)
        self.decoder: Decoder = Decoder(
            processes=options.decoders,
            max_duration_s=options.max_duration_s,
            timeout_s=options.decode_timeout_s,
        )
        # Where it speaks another protocol than HTTP.
        self.endpoint: Endpoint | None = self._new_endpoint()

    def let_in(self, parallel: int) -> None:
        """
        Lets that many requests work with each model at a time from now on.
        """
        self._parallel = parallel
        self.gate.let_in(parallel)

    @property
    def most(self) -> int:
        """
        The most requests that may be under way: as many as wait and work, and those at
        work once more for their successors.
        """
        at_work = self._parallel * len(self.options.models)
        return self.options.max_waiting + 2 * at_work

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """
        Runs all parts of the server in an ``async with`` block.
        """
        # An application may be started again, as by test clients.
        self._renew()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.engine.running())
            await stack.enter_async_context(self.decoder)
            if self.endpoint is not None:
                await stack.enter_async_context(self.endpoint)
            # In the background: requests are served meanwhile, and /readyz waits for
            # it.
            loads = asyncio.gather(*map(self._load_at_start, list(self.pending)))
            self._loop = asyncio.get_running_loop()
            try:
                yield
            finally:
                # No request begins any more.
                self._loop = None
                loads.cancel()
                with suppress(asyncio.CancelledError):
                    await loads

    async def drain(self) -> None:
        """
        Ends the conversations that are no requests of HTTP, with the answers that are
        under way.
        """
        if self.endpoint is not None:
            await self.endpoint.close()

    async def ensure_running(self) -> None:
        """
        Starts the parts of a server that was not started: no framework tells an
        application that is mounted in another one of its start. They then run for as
        long as the event loop does.
        """
        loop = asyncio.get_running_loop()
        # An application may be used from one loop after another, as in tests.
        if self._loop is loop:
            return
        if self._started is None or self._started.get_loop() is not loop:
            self._started = loop.create_future()
            # Kept, or it would be collected; the end of the loop cancels it.
            self._background = loop.create_task(self._run_on(self._started))
        # One request that is cancelled must not cancel the start for the others.
        await asyncio.shield(self._started)

    async def _run_on(self, started: asyncio.Future[None]) -> None:
        try:
            async with self.running():
                started.set_result(None)
                # For ever; the end of the loop cancels it.
                await asyncio.Event().wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)
        finally:
            started.cancel()  # nothing happens where it is done
            self._started = None

    async def _load_at_start(self, name: str) -> None:
        """
        Loads a model, again and again if that fails: files and memory may come.
        """
        offer = self.offers.find(name)
        assert offer is not None, name
        while True:
            try:
                if name in self.options.pin:
                    await self.engine.pin(offer, Terms())
                else:
                    await self.engine.load(offer, Terms())
            except WhisperCacheError as error:
                _log.error("%s is not ready: %s", name, error)
                self.pending[name] = type(error).__name__
                again_s = error.retry_in_s if isinstance(error, LoadFailed) else None
                await asyncio.sleep(again_s or RETRY_S)
            else:
                del self.pending[name]
                return

    @property
    def state(self) -> Literal["ready", "loading", "closing"]:
        """
        The state: does it take work, and has it loaded the models for its start?
        """
        if self.gate.is_closed or self.engine.is_closed:
            return "closing"
        return "loading" if self.pending else "ready"

    def offer(self, name: str) -> Offer:
        """
        Returns the model that clients call *name*; raises the 404 if there is none.
        """
        offer = self.offers.find(name)
        if offer is None:
            served = ", ".join(offer.name for offer in self.offers)
            # Names come from clients and may be long.
            message = f"the model {name[:100]!r} is not served here; there are {served}"
            raise ApiError(404, message, code="model_not_found", param="model")
        seen.wants(offer.name)
        return offer


async def _of(request: Request) -> Service:
    service: Service = request.app.state.service
    await service.ensure_running()
    return service


# The service of a route's application, which runs.
Served = Annotated[Service, Depends(_of)]
