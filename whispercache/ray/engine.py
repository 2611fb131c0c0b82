"""
A replica with models: a cache of its own, asked by servers in other processes.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ray import serve

from whispercache.cache import ModelCache
from whispercache.errors import LoadFailed, WhisperCacheError
from whispercache.events import DeviceLost
from whispercache.server.engine import Terms
from whispercache.server.errors import RETRY_S
from whispercache.server.local import LocalEngine
from whispercache.server.offers import offers_of

from .meter import Meter
from .pulse import pulsing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from faster_whisper.transcribe import TranscriptionInfo
    from prometheus_client.core import Metric

    from whispercache.engine.calls.languages import Knowledge
    from whispercache.events import Event
    from whispercache.options import CacheOptions
    from whispercache.server.engine import Phase, Samples, Segments
    from whispercache.server.offers import Offer
    from whispercache.server.options import ServerOptions
    from whispercache.watch.live import Snapshot

# What a stream consists of, and what comes with it.
Heard: TypeAlias = 'tuple[Literal["here", "alive", "phase", "info", "segment"], object]'

_log = logging.getLogger("whispercache")

# A replica has this long to unload its models when it ends.
_CLOSE_S = 10.0


class EngineReplica:
    """
    One cache, and the calls on its models.

    Args:
        options: What is offered, and how many calls a model has at once.
        cache: The parameters of the cache.
    """

    def __init__(self, options: ServerOptions, cache: CacheOptions) -> None:
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._options = options
        self._cache = ModelCache(**cache)
        self._offers = offers_of(options)
        # The servers have bounded how many wait.
        self._engine = LocalEngine(
            self._offers, self._cache, options.parallel, options.audio_in_memory_s
        )
        self._meter = Meter()
        self._keep_alive: str | None = None
        self._pins: dict[str, asyncio.Task[None]] = {}
        # Measured before a model left: the next load will take as long.
        self._load_s: dict[str, float] = {}
        self._lost = ""
        self._cache.subscribe(self._note)
        self._stack = AsyncExitStack()
        self._is_running = False

    def _note(self, event: Event) -> None:
        if isinstance(event, DeviceLost):
            self._lost = f"{event.device} is lost for this process: {event.reason}"

    async def _run(self) -> LocalEngine:
        # Ray may call any of these methods first.
        if not self._is_running:
            self._is_running = True
            await self._stack.enter_async_context(self._engine.running())
        return self._engine

    # Calls of servers -----------------------------------------------------------------

    async def hear(
        self,
        offer: Offer,
        samples: Samples,
        options: Mapping[str, object],
        terms: Terms,
        lost: str = "",  # noqa: ARG002 - for the router: who had it, and is gone
    ) -> AsyncGenerator[Heard, None]:
        """
        Transcribes what *samples* returns, once the model is there. Yields this
        replica's name, each phase as it begins, the info, then the segments; and in
        between that this replica is alive.
        """
        hearing = self._hear(offer, samples, options, terms)
        async with aclosing(pulsing(hearing, ("alive", None))) as items:
            async for item in items:
                yield item

    async def _hear(
        self,
        offer: Offer,
        samples: Samples,
        options: Mapping[str, object],
        terms: Terms,
    ) -> AsyncGenerator[Heard, None]:
        yield "here", self._name
        engine = await self._run()
        loop = asyncio.get_running_loop()
        came_s = loop.time()
        # Phases as they begin; None when all have.
        phases: asyncio.Queue[Phase | None] = asyncio.Queue()

        def tell(phase: Phase | None) -> None:
            # From any thread.
            loop.call_soon_threadsafe(phases.put_nowait, phase)

        call = asyncio.ensure_future(
            engine.transcribe(offer, samples, options, self._kept(terms), tell)
        )
        call.add_done_callback(lambda _: tell(None))
        try:
            with ExitStack() as work:
                while (phase := await phases.get()) is not None:
                    if phase == "working":
                        self._meter.waited(loop.time() - came_s)
                        work.enter_context(self._meter.working(offer.name))
                    yield "phase", phase
                segments, info = await call
                yield "info", info
                # Here, since Ray's streams run ahead of who reads them.
                async for segment in segments:
                    yield "segment", segment
        finally:
            await _over(call)

    def _kept(self, terms: Terms) -> Terms:
        return replace(terms, keep_alive=terms.keep_alive or self._keep_alive)

    async def knowledge(self, offer: Offer) -> Knowledge | None:
        """
        Returns what `Engine.knowledge` does.
        """
        return await self._engine.knowledge(offer)

    async def may_tell_words(self, offer: Offer) -> bool:
        """
        Returns what `Engine.may_tell_words` does.
        """
        return await self._engine.may_tell_words(offer)

    async def load(self, offer: Offer, terms: Terms) -> None:
        """
        Loads a model.
        """
        engine = await self._run()
        await engine.load(offer, self._kept(terms))

    async def pin(self, offer: Offer, terms: Terms) -> None:
        """
        Loads a model, and keeps it.
        """
        await (await self._run()).pin(offer, terms)

    async def unpin(self, offer: Offer) -> bool:
        """
        Ends a pin.
        """
        return await self._engine.unpin(offer)

    async def evict(self, offer: Offer, timeout_s: float) -> bool:
        """
        Unloads a model.
        """
        return await self._engine.evict(offer, timeout_s)

    async def seen(self) -> tuple[str, Snapshot, Sequence[Metric]]:
        """
        Returns this replica's name, what its cache is doing, and its figures.
        """
        engine = await self._run()
        return self._name, await engine.snapshot(), await engine.metrics()

    # Ray asks for these, by these names -----------------------------------------------

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """
        Takes what may change while models are in memory: limits, the keep-alive, pins.
        """
        limits = {name: config[name] for name in ("vram", "ram") if name in config}
        self._cache.resize(**limits)
        self._keep_alive = config.get("keep_alive")
        await self._run()
        pinned = set(config.get("pin", ()))
        unknown = sorted(name for name in pinned if self._offers.find(name) is None)
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not among the models served")
        for name in pinned - set(self._pins):
            self._pins[name] = asyncio.ensure_future(self._pin(name))
        for name in set(self._pins) - pinned:
            self._pins.pop(name).cancel()
            offer = self._offers.find(name)
            if offer is not None:
                await self._engine.unpin(offer)

    async def _pin(self, name: str) -> None:
        """
        Pins a model, again and again if that fails.
        """
        offer = self._offers.find(name)
        assert offer is not None, name
        while True:
            try:
                await self._engine.pin(offer, Terms())
            except WhisperCacheError as error:
                _log.error("%s is not pinned: %s", name, error)
                again_s = error.retry_in_s if isinstance(error, LoadFailed) else None
                await asyncio.sleep(again_s or RETRY_S)
            else:
                return

    async def record_replica_metadata(self) -> dict[str, Any]:
        """
        Returns what stays as it is: capacities, bytes of models, calls at once.
        """
        sizes: dict[str, int] = {}
        for offer in self._offers:
            try:
                seen = await self._engine.cache.explain(*offer.place)
            except WhisperCacheError as error:
                # Not downloaded yet: its bytes are told once it is in memory.
                _log.info("the bytes of %s are not known yet: %s", offer.name, error)
            else:
                sizes[offer.name] = seen.needed_bytes
        capacity = {each.device: each.capacity_bytes for each in self._places()}
        return {"capacity": capacity, "sizes": sizes, "parallel": 1}

    def _places(self) -> list[Any]:
        """
        Returns the devices on which models may be.
        """
        devices = self._cache.devices()
        cards = [each for each in devices if each.device != "cpu"]
        wants_host = self._options.device == "cpu" or not cards
        return list(devices) if wants_host else cards

    async def record_routing_stats(self) -> dict[str, Any]:
        """
        Returns what is in memory. Nothing that moves by itself: each change goes to all
        routers, so seconds have one digit.
        """
        resident: dict[str, tuple[str, int]] = {}
        pinned = []
        for info in self._cache.models():
            name = self._engine.name_of(info.key)
            if info.load_s:
                self._load_s[name] = _rounded(info.load_s)
            if info.state != "unloading":
                resident[name] = info.device, info.weights_bytes
                pinned += [name] if info.pinned else []
        return {
            "resident": resident,
            "pinned": sorted(pinned),
            "load_s": dict(self._load_s),
            "call_s": _rounded(self._meter.call_s),
            "calls_s": {
                name: _rounded(call_s) for name, call_s in self._meter.calls_s.items()
            },
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """
        Returns what `whispercache.ray.by_pressure` decides by.
        """
        filled = (
            each.charged_bytes / each.capacity_bytes
            for each in self._places()
            if each.capacity_bytes
        )
        return {
            "lost_share": self._meter.lost_share,
            "busy_share": self._meter.busy_share / self._options.parallel,
            "fill": max(filled, default=0.0),
        }

    async def check_health(self) -> None:
        """
        Raises an error if this process is of no more use, so that Ray replaces it.
        """
        if self._lost:
            raise RuntimeError(self._lost)
        if self._engine.is_closed:
            raise RuntimeError("the cache is closed")

    def __del__(self) -> None:
        """
        Unloads all, after the last call has ended. Ray calls this, and then Python.
        """
        # A constructor that failed has none.
        cache = getattr(self, "_cache", None)
        if cache is not None:
            cache.close(_CLOSE_S)


async def _over(call: asyncio.Future[tuple[Segments, TranscriptionInfo]]) -> None:
    """
    Ends a call, which lets go of its model, wherever it is.
    """
    call.cancel()
    await asyncio.wait((call,))
    if not call.cancelled() and call.exception() is None:
        segments, _ = call.result()
        await segments.__aexit__(None, None, None)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.1g}")
