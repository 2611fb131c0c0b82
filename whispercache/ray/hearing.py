"""
A request at the replicas: what it does when they die, or seem to.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from whispercache.errors import LeaseTimeout
from whispercache.server.errors import RETRY_S, ApiError, refused_for_now

from .pulse import SILENT_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from ray.serve.handle import DeploymentResponseGenerator
    from typing_extensions import Self

    from whispercache.server.engine import Phase, Terms
    from whispercache.server.offers import Offer

    from .engine import Heard

T = TypeVar("T")

# So many replicas hear a request at most, if they die of it, or meanwhile.
TRIES = 2


class Hearing:
    """
    Segments that a replica computes. Who leaves early ends the call there. If the
    replica dies, another one hears it all again, and what was passed on is left out:
    hearing twice does no harm.

    Args:
        offer: The model.
        terms: On which it is wanted.
        ask: Sends the request, and is told which replica had it and is gone.
        tell: Called with each phase as it begins.
        transfer_s: Seconds that the audio may take to get there.
        silent_s: Seconds without a sign of life after which a replica is given up.
    """

    def __init__(
        self,
        offer: Offer,
        terms: Terms,
        ask: Callable[[str], DeploymentResponseGenerator[Any]],
        tell: Callable[[Phase], None],
        *,
        transfer_s: float = 0.0,
        silent_s: float = SILENT_S,
    ) -> None:
        self._offer = offer
        self._terms = terms
        self._ask = ask
        self._tell = tell
        self._transfer_s = transfer_s
        self._silent_s = silent_s
        self._tries = TRIES
        # The replica that has the request, or had it last.
        self._holder = ""
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
            except GONE:
                self._give_up_after_death()

    async def _begin(self) -> TranscriptionInfo:
        limit_s = self._terms.timeout_s
        with anyio.move_on_after(None if limit_s is None else limit_s + 0.5) as limit:
            # The replica itself knows the time that is left, once it has the request.
            await self._arrive()
        if limit.cancelled_caught:
            raise LeaseTimeout(self._offer.name, limit_s or 0.0)
        while True:
            kind, item = await self._next()
            if kind == "info":
                return cast("TranscriptionInfo", item)
            self._tell(cast("Phase", item))

    async def _arrive(self) -> None:
        """
        Waits until a replica has the request. That takes long as well while there is
        none, so it is no try where nothing was heard.
        """
        while True:
            self._stream = self._ask(self._holder)
            try:
                _, name = await self._next(self._transfer_s)
            except Silent:
                self._stream.cancel()
            else:
                self._holder = cast("str", name)
                return

    async def _next(self, more_s: float = 0.0) -> Heard:
        assert self._stream is not None
        while True:
            with listening(self._silent_s + more_s):
                heard: Heard = await own_errors(anext(self._stream))
            if heard[0] != "alive":
                return heard

    def _give_up_after_death(self) -> None:
        if self._stream is not None:
            # One that was but slow need not go on.
            self._stream.cancel()
        self._tries -= 1
        if not self._tries:
            raise died(self._offer) from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Segment:
        while True:
            try:
                _, item = await self._next()
            except GONE:
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


class Silent(Exception):
    """
    No sign of life from a replica.
    """


# What becomes of a replica: it has died, or seems to.
GONE = (RayActorError, Silent)


@contextmanager
def listening(silent_s: float) -> Iterator[None]:
    """
    Raises a `Silent` if the ``with`` block takes longer.
    """
    with anyio.move_on_after(silent_s) as silence:
        yield
    if silence.cancelled_caught:
        raise Silent


async def own_errors(answer: Awaitable[T]) -> T:
    """
    Returns what a replica answers; raises what it raised there.
    """
    try:
        return await answer
    except RayTaskError as error:
        raise cause_of(error) from None
    except DeploymentUnavailableError:
        raise no_replica() from None


def cause_of(error: RayTaskError) -> BaseException:
    """
    Returns the error that a replica raised.
    """
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
