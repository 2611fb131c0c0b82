"""
Calls: a model's work for a request. It cannot be stopped once it runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import anyio

from whispercache.aio import AsyncSegments, _close_result, _pool
from whispercache.model import call_leased

if TYPE_CHECKING:
    import numpy as np
    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from numpy.typing import NDArray

    from whispercache.lease import Lease
    from whispercache.model import LeasedIterator

__all__ = ["transcribe"]


async def transcribe(
    lease: Lease, audio: NDArray[np.float32], options: dict[str, object]
) -> tuple[AsyncSegments[Segment], TranscriptionInfo]:
    """
    Begin to transcribe with a leased model; the segments take the lease with them.

    Cancelled, it goes on to the end of the call, so that whoever cancelled keeps his
    place at the `Gate` as long as the model is busy for him.
    """
    lease.owned = True
    call = lease.whisper.transcribe
    future = _pool().submit(call_leased, lease, call, audio, **options)
    ended = asyncio.wrap_future(future)
    try:
        segments, info = cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]",
            await asyncio.shield(ended),
        )
    except asyncio.CancelledError:
        if future.cancel():  # before a thread was free for it
            lease.release()
        else:
            future.add_done_callback(_close_result)
            with anyio.CancelScope(shield=True):
                await asyncio.wait((ended,))
        raise
    return AsyncSegments(segments), info
