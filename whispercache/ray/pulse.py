"""
Signs of life from a replica that hears.

A process that dies ends its connections. A machine that loses its power, or its
network, ends nothing: Ray needs about a minute to believe that, and tells routers
nothing until then.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

T = TypeVar("T")

PULSE_S = 3.0
"""
Seconds between two signs of a replica that has nothing to say.
"""

SILENT_S = 15.0
"""
Seconds without a sign after which a replica is as good as dead.

Source: a choice. Four signs may be lost. It must be more than the 10 s for which Ray's
routers believe what a replica said of its queue
(``RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S``, Ray 2.60): afterwards they ask it, get no
answer, and take another one.
"""


async def pulsing(
    items: AsyncGenerator[T, None], sign: T, every_s: float = PULSE_S
) -> AsyncGenerator[T, None]:
    """
    Yields *items*, and a *sign* whenever none came for *every_s* seconds. Closing this
    closes *items*, wherever they are.
    """
    step: asyncio.Future[T] | None = None
    try:
        while True:
            step = asyncio.ensure_future(anext(items))
            while not (await asyncio.wait((step,), timeout=every_s))[0]:
                yield sign
            try:
                item = step.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if step is not None and not step.done():
            step.cancel()
            await asyncio.wait((step,))
        await items.aclose()
