"""
The engine of a server whose models are in replicas elsewhere.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.concurrency import run_in_threadpool

from whispercache.errors import LeaseTimeout
from whispercache.server.engine import nobody
from whispercache.server.errors import RETRY_S, ApiError, refused_for_now

from .seen import merged_metrics, merged_snapshot

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Mapping,
        Sequence,
    )

    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from prometheus_client.core import Metric
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
    from typing_extensions import Self

    from whispercache.engine.calls.languages import Knowledge
    from whispercache.server.engine import Phase, Samples, Terms
    from whispercache.server.offers import Offer
    from whispercache.watch.live import Snapshot

    from .engine import Heard

T = TypeVar("T")

# So many replicas hear a request at most, if they die of it, or meanwhile.
TRIES = 2

# Seconds for questions that take none: longer, and a replica is as good as dead.
_ANSWER_S = 30.0

# Seconds for a look at all replicas: a page asks again in a second.
_LOOK_S = 5.0

# Seconds for which what a model's files tell holds.
_KNOWN_S = 60.0


class RemoteEngine:
    """
    An `Engine` over replicas of a deployment, whose router knows where models are.

    It loads nothing, and looks at no device.
    """

    is_closed = False

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas
        # What was asked, until when it holds, and the answer.
        self._known: dict[tuple[str, str], tuple[float, object]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """
        Does nothing: replicas run by themselves.
        """
        yield

    # What is known of a model ---------------------------------------------------------

    async def knowledge(self, offer: Offer) -> Knowledge | None:
        """
        Returns what `Engine.knowledge` does, as some replica knows it.
        """
        known = await self._remembered("knowledge", offer)
        return cast("Knowledge | None", known)

    async def may_tell_words(self, offer: Offer) -> bool:
        """
        Returns what `Engine.may_tell_words` does, as some replica knows it.
        """
        return bool(await self._remembered("may_tell_words", offer))

    async def _remembered(self, method: str, offer: Offer) -> object:
        asked, now_s = (method, offer.name), time.monotonic()
        until_s, answer = self._known.get(asked, (0.0, None))
        if until_s > now_s:
            return answer
        answer = await self._ask(offer, method, _ANSWER_S, offer)
        # What a download will tell is not known yet.
        if answer is not None:
            self._known[asked] = now_s + _KNOWN_S, answer
        return answer

    # Work -----------------------------------------------------------------------------

    async def transcribe(
        self,
        offer: Offer,
        samples: Samples,
        options: Mapping[str, object],
        terms: Terms,
        tell: Callable[[Phase], None] = nobody,
    ) -> tuple[Hearing, TranscriptionInfo]:
        """
        Begins to transcribe, where that will begin soonest. See `Engine.transcribe`.
        """
        # Once, also if it is sent again. The replica gets it when its model is there:
        # until then Ray may keep it on disk.
        stored = await run_in_threadpool(lambda: ray.put(samples()))
        heard = partial(ray.get, stored)
        replica = self._replicas.options(
            stream=True, method_name="hear", multiplexed_model_id=offer.name
        )

        def ask() -> DeploymentResponseGenerator[Any]:
            # A repetition may wait as long again: its client has part of the answer.
            return replica.remote(offer, heard, dict(options), terms)

        hearing = Hearing(offer, terms, ask, tell)
        try:
            return hearing, await hearing.begin()
        except BaseException:
            await hearing.__aexit__(None, None, None)
            raise

    async def load(
        self, offer: Offer, terms: Terms, tell: Callable[[Phase], None] = nobody
    ) -> None:
        """
        Loads a model into the replica where a request for it would begin soonest.
        """
        tell("loading")
        await self._ask(offer, "load", terms.timeout_s, offer, terms, model=offer.name)

    async def pin(
        self, offer: Offer, terms: Terms, tell: Callable[[Phase], None] = nobody
    ) -> None:
        """
        Loads a model into each replica, and keeps it.
        """
        tell("loading")
        if not await self._ask_all("pin", terms.timeout_s, offer, terms):
            raise no_replica()

    async def unpin(self, offer: Offer) -> bool:
        """
        Ends pins. False if there were none in any replica.
        """
        return any(await self._ask_all("unpin", _ANSWER_S, offer))

    async def evict(self, offer: Offer, timeout_s: float) -> bool:
        """
        Unloads a model from all replicas. False if it was in none.
        """
        return any(await self._ask_all("evict", None, offer, timeout_s))

    async def _ask(
        self,
        offer: Offer,
        method: str,
        timeout_s: float | None,
        *args: object,
        model: str = "",
    ) -> object:
        """
        Returns the answer of one replica, or of another one if it dies.
        """
        options = {"multiplexed_model_id": model} if model else {}
        replica = self._replicas.options(method_name=method, **options)
        limit_s = None if timeout_s is None else timeout_s + 0.5
        with anyio.move_on_after(limit_s):
            for tries_left in reversed(range(TRIES)):
                try:
                    return await _own_errors(replica.remote(*args))
                except RayActorError:
                    if not tries_left:
                        raise died(offer) from None
        raise LeaseTimeout(offer.name, timeout_s or 0.0)

    async def _ask_all(
        self, method: str, timeout_s: float | None, *args: object
    ) -> list[Any]:
        """
        Returns the answers of all replicas that there are.
        """
        asked = self._replicas.broadcast(method, *args)
        try:
            answers = await asked.results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except DeploymentUnavailableError:  # none is there
            return []
        except TimeoutError:
            raise LeaseTimeout("one of the replicas", timeout_s or 0.0) from None
        there = []
        for answer in answers:
            if isinstance(answer, RayTaskError):
                raise _cause(answer)
            # One that has just died has nothing in memory.
            if not isinstance(answer, RayActorError):
                there.append(answer)
        return there

    # What is seen ---------------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """
        Returns the state of all replicas; their devices are called "replica/device".
        """
        seen = await self._look()
        parts = {name: snapshot for name, (snapshot, _) in seen.items()}
        return merged_snapshot(time.time(), parts)

    async def metrics(self) -> Sequence[Metric]:
        """
        Returns the figures of all replicas, by the label ``replica``.
        """
        seen = await self._look()
        stats = [snapshot.stats for snapshot, _ in seen.values()]
        requests = sum(each.requests for each in stats)
        affinity = sum(each.hits for each in stats) / max(requests, 1)
        return merged_metrics(
            {name: part for name, (_, part) in seen.items()}, affinity
        )

    async def _look(self) -> dict[str, tuple[Snapshot, Sequence[Metric]]]:
        answers = await self._ask_all("seen", _LOOK_S)
        return {name: (snapshot, metrics) for name, snapshot, metrics in answers}


class Hearing:
    """
    Segments that a replica computes. Who leaves early ends the call there. If the
    replica dies, another one hears it all again, and what was passed on is left out:
    hearing twice does no harm.
    """

    def __init__(
        self,
        offer: Offer,
        terms: Terms,
        ask: Callable[[], DeploymentResponseGenerator[Any]],
        tell: Callable[[Phase], None],
    ) -> None:
        self._offer = offer
        self._terms = terms
        self._ask = ask
        self._tell = tell
        self._tries = TRIES
        self._stream: DeploymentResponseGenerator[Any] | None = None
        # The end of the last segment that was passed on, in seconds of audio.
        self._heard_s = -1.0

    async def begin(self) -> TranscriptionInfo:
        """
        Returns the info, once a replica has begun.
        """
        while True:
            try:
                return await self._begin()
            except RayActorError:
                self._give_up_after_death()

    async def _begin(self) -> TranscriptionInfo:
        self._stream = self._ask()
        limit_s = self._terms.timeout_s
        with anyio.move_on_after(None if limit_s is None else limit_s + 0.5) as limit:
            # The replica itself knows the time that is left, once it has the request.
            await self._next()
        if limit.cancelled_caught:
            raise LeaseTimeout(self._offer.name, limit_s or 0.0)
        while True:
            kind, item = await self._next()
            if kind == "info":
                return cast("TranscriptionInfo", item)
            self._tell(cast("Phase", item))

    async def _next(self) -> Heard:
        assert self._stream is not None
        heard: Heard = await _own_errors(anext(self._stream))
        return heard

    def _give_up_after_death(self) -> None:
        self._tries -= 1
        if not self._tries:
            raise died(self._offer) from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Segment:
        while True:
            try:
                _, item = await self._next()
            except RayActorError:
                self._give_up_after_death()
                await self.begin()
                continue
            segment = cast("Segment", item)
            if segment.end > self._heard_s:
                self._heard_s = segment.end
                return segment

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        # Of no effect where it is over.
        if self._stream is not None:
            self._stream.cancel()


async def _own_errors(answer: Awaitable[T]) -> T:
    """
    Returns what a replica answers; raises what it raised there.
    """
    try:
        return await answer
    except RayTaskError as error:
        raise _cause(error) from None
    except DeploymentUnavailableError:
        raise no_replica() from None


def _cause(error: RayTaskError) -> BaseException:
    cause = error.cause
    # A copy of an error of ours, by the pickle.
    return cause if isinstance(cause, Exception) else error


def no_replica() -> ApiError:
    """
    Returns the refusal while there is no replica.
    """
    message = "no replica with models is there; try again later"
    return refused_for_now(503, message, "no_replica")


def died(offer: Offer) -> ApiError:
    """
    Returns the refusal of a request during which as many replicas died as may.
    """
    return ApiError(
        503,
        f"{TRIES} replicas with {offer.name} died while they heard this request; it is "
        "not tried again",
        code="replicas_died",
        # OpenAI's client heeds the second one: it would kill two more.
        headers={"Retry-After": str(RETRY_S), "x-should-retry": "false"},
    )
