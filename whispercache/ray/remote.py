"""
The engine of a server whose models are in replicas elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import anyio
import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import ReplicaState
from starlette.concurrency import run_in_threadpool

from whispercache.errors import LeaseTimeout
from whispercache.server.engine import nobody

from .hearing import (
    GONE,
    TRIES,
    Hearing,
    cause_of,
    died,
    listening,
    no_replica,
    own_errors,
)
from .pulse import SILENT_S
from .seen import merged_metrics, merged_snapshot

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Callable,
        Mapping,
        Sequence,
    )

    import numpy as np
    from faster_whisper.transcribe import TranscriptionInfo
    from numpy.typing import NDArray
    from prometheus_client.core import Metric
    from ray import ObjectRef
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

    from whispercache.engine.calls.languages import Knowledge
    from whispercache.server.engine import Phase, Samples, Terms
    from whispercache.server.offers import Offer
    from whispercache.watch.live import Snapshot


_log = logging.getLogger("whispercache")

# Seconds for questions to all replicas that take none.
_ANSWER_S = 30.0

# Bytes of audio that reach a replica in a second, at the least: a tenth of what a slow
# network of a cluster does.
_TRANSFER_BYTES = 10 * 1024**2

# Seconds for a look at all replicas: a page asks again in a second.
_LOOK_S = 5.0

# Seconds between two counts of replicas.
_COUNT_S = 2.0

# Seconds for which what a model's files tell holds.
_KNOWN_S = 60.0


class RemoteEngine:
    """
    An `Engine` over replicas of a deployment, whose router knows where models are.

    It loads nothing, and looks at no device. While it runs it tells *counted* how many
    replicas there are: they come and go without a word to it.
    """

    is_closed = False

    def __init__(
        self, replicas: DeploymentHandle[Any], counted: Callable[[int], None]
    ) -> None:
        self._replicas = replicas
        self._counted = counted
        # What was asked, until when it holds, and the answer.
        self._known: dict[tuple[str, str], tuple[float, object]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """
        Counts replicas, which run by themselves.
        """
        counting = asyncio.create_task(self._count())
        try:
            yield
        finally:
            counting.cancel()
            await asyncio.wait((counting,))

    async def _count(self) -> None:
        while True:
            try:
                running = await run_in_threadpool(_running, self._replicas)
            except (RayError, RayServeException) as error:
                _log.warning("replicas cannot be counted: %s", error)
            else:
                self._counted(running)
            await asyncio.sleep(_COUNT_S)

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
        answer = await self._ask(offer, method, TRIES * SILENT_S, offer, takes_s=0.0)
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
        stored, n_bytes = await run_in_threadpool(lambda: _put(samples()))
        heard = partial(ray.get, stored)
        replica = self._replicas.options(
            stream=True, method_name="hear", multiplexed_model_id=offer.name
        )

        def ask(lost: str) -> DeploymentResponseGenerator[Any]:
            # A repetition may wait as long again: its client has part of the answer.
            return replica.remote(offer, heard, dict(options), terms, lost=lost)

        transfer_s = n_bytes / _TRANSFER_BYTES
        hearing = Hearing(offer, terms, ask, tell, transfer_s=transfer_s)
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
        takes_s: float = math.inf,
    ) -> object:
        """
        Returns the answer of one replica, or of another one if it dies, or is silent
        although an answer takes no more than *takes_s*.
        """
        options = {"multiplexed_model_id": model} if model else {}
        replica = self._replicas.options(method_name=method, **options)
        limit_s = None if timeout_s is None else timeout_s + 0.5
        with anyio.move_on_after(limit_s):
            for tries_left in reversed(range(TRIES)):
                try:
                    with listening(takes_s + SILENT_S):
                        return await own_errors(replica.remote(*args))
                except GONE:
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
                raise cause_of(answer)
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


def _running(replicas: DeploymentHandle[Any]) -> int:
    seen = serve.status().applications.get(replicas.app_name)
    found = seen and seen.deployments.get(replicas.deployment_name)
    return found.replica_states.get(ReplicaState.RUNNING, 0) if found else 0


def _put(samples: NDArray[np.float32]) -> tuple[ObjectRef[Any], int]:
    return ray.put(samples), samples.nbytes
