"""
Work for a client, which ends when the client hangs up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from starlette.requests import Request

__all__ = ["while_present"]

T = TypeVar("T")


async def while_present(request: Request, work: Coroutine[None, None, T]) -> T:
    """
    Returns the result of *work*, which is cancelled if the client hangs up.

    The request's body must have been read.

    Raises:
        ClientDisconnect: it hung up.
    """
    working = asyncio.ensure_future(work)
    # Nothing else reads from the client meanwhile: its body has been read.
    leaving = asyncio.ensure_future(_left(request))
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
