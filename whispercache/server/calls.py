"""
Work for a client, which ends when the client hangs up: all but the call of a model,
which cannot be stopped once it runs.
"""

from __future__ import annotations

import asyncio
import contextvars
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import anyio
from starlette.requests import ClientDisconnect

from whispercache.aio import AsyncSegments
from whispercache.results import call_in_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Executor, Future

    import numpy as np
    from faster_whisper import WhisperModel
    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from numpy.typing import NDArray
    from starlette.requests import Request

    from whispercache.lease import Lease
    from whispercache.results import Breaks, LeasedIterator

    # Returns the ``transcribe`` of a new batched pipeline of a model.
    Pipeline: TypeAlias = Callable[[WhisperModel], Callable[..., object]]

T = TypeVar("T")


async def while_present(request: Request, work: Coroutine[None, None, T]) -> T:
    """
    Returns the result of *work*, which is cancelled if the client hangs up, by a
    ClientDisconnect. The request's body must have been read.
    """
    # Nothing else reads from the client meanwhile: its body has been read.
    return await unless(_left(request), work)


async def unless(
    left: Coroutine[None, None, object], work: Coroutine[None, None, T]
) -> T:
    """
    Returns the result of *work*, which is cancelled once *left* has ended, by a
    ClientDisconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(left)
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        # Work is cancelled below, and waited for: it may hold a lease.
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))
        if not working.cancelled():
            working.exception()  # or asyncio would log that none had read it


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def transcribe(
    pool: Executor,
    lease: Lease,
    audio: NDArray[np.float32],
    options: dict[str, object],
    batched: Pipeline,
    *,
    breaks: Breaks | None = None,
) -> tuple[AsyncSegments[Segment], TranscriptionInfo]:
    """
    Begins to transcribe *audio*: float32 (samples,), mono, 16 kHz, with a leased model.
    The segments take the lease with them, and give it back between two of them where
    *breaks* say so. See `Engine.transcribe` for the options.

    A cancelled call goes on to its end, so that its request keeps its place at the
    `Gate` as long as the model is busy with it.
    """
    # From here on the call releases the lease, and not the caller.
    lease.owned = True
    call = partial(_begin, lease.whisper, batched)
    # In this context: what the call logs is of this request.
    started = partial(call_in_parts, breaks, lease, call, audio, **options)
    future = pool.submit(contextvars.copy_context().run, started)
    ended = asyncio.wrap_future(future)
    try:
        # The shield lets the thread go on where this task is cancelled.
        segments, info = cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]",
            await asyncio.shield(ended),
        )
    except asyncio.CancelledError:
        if future.cancel():  # before a thread was free for it
            lease.release()
        else:
            future.add_done_callback(_close_segments)
            # A second cancellation still ends this wait; the lease is held by the call.
            with anyio.CancelScope(shield=True):
                await asyncio.wait((ended,))
        raise
    return AsyncSegments(segments), info


def _begin(
    whisper: WhisperModel,
    batched: Pipeline,
    audio: NDArray[np.float32],
    *,
    batch_size: int | None = None,
    languages: Sequence[str] = (),
    **options: object,
) -> object:
    if languages:
        filters = bool(options.get("vad_filter"))
        options["language"] = _likeliest(whisper, audio, languages, filters=filters)
    if batch_size is None:
        return whisper.transcribe(audio, **options)
    return batched(whisper)(audio, batch_size=batch_size, **options)


def _likeliest(
    whisper: WhisperModel,
    audio: NDArray[np.float32],
    languages: Sequence[str],
    *,
    filters: bool,
) -> str:
    if not whisper.model.is_multilingual:
        return "en"
    _, _, all_of_them = whisper.detect_language(audio, vad_filter=filters)
    chances = dict(all_of_them)
    return max(languages, key=lambda code: chances.get(code, 0.0))


def _close_segments(future: Future[object]) -> None:
    if future.exception() is None:
        segments, _ = cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]", future.result()
        )
        segments.close()
