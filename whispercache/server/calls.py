"""
The call of a model for a request, which cannot be stopped once it runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import anyio

from whispercache.aio import AsyncSegments
from whispercache.model import call_leased

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    import numpy as np
    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from numpy.typing import NDArray

    from whispercache.lease import Lease
    from whispercache.model import LeasedIterator

__all__ = ["transcribe"]


async def transcribe(
    pool: Executor,
    lease: Lease,
    audio: NDArray[np.float32],
    options: dict[str, object],
) -> tuple[AsyncSegments[Segment], TranscriptionInfo]:
    """
    Begins to transcribe with a leased model; the segments take the lease with them.

    A cancelled call goes on to its end, so that its request keeps its place at the
    `Gate` as long as the model is busy with it.

    Args:
        pool: Has the threads for calls.
        lease: Released with the segments, or when the call fails.
        audio: float32 (samples,), mono, 16 kHz.
        options: Parameters of ``transcribe``.
    """
    # From here on the call releases the lease, and not the caller.
    lease.owned = True
    call = lease.whisper.transcribe
    future = pool.submit(call_leased, lease, call, audio, **options)
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


def _close_segments(future: Future[object]) -> None:
    if future.exception() is None:
        segments, _ = cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]", future.result()
        )
        segments.close()
