"""
Events of the Wyoming protocol as they come from a client, which may send anything.

An event is a line of JSON, perhaps more JSON after it, and perhaps bytes after that. No
length that a client claims is believed: lines and JSON have limits, and bytes are read
in pieces.

Source: the protocol's README in the package wyoming 1.10.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LINE_BYTES: Final = 64 * 1024
"""
Limit of the first line of an event.
"""

DATA_BYTES: Final = 256 * 1024
"""
Limit of the JSON after it. Source: a choice; names and terms to listen for are the most
that anybody sends.
"""

PIECE_BYTES: Final = 64 * 1024
"""
Most bytes that are read at once.
"""


class BrokenStream(Exception):
    """
    Bytes that are no event. Where the next one begins is not known any more, and the
    client may be none of this protocol at all: a browser, say, that a page sent here.
    """


@dataclass(frozen=True, slots=True)
class Frame:
    """
    An event without its bytes, of which there are *payload_bytes* to be read.
    """

    type: str
    data: dict[str, object]
    payload_bytes: int


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """
    Returns the next event, or None at the end.

    Raises:
        BrokenStream: it is none.
    """
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise BrokenStream(f"an event begins with over {LINE_BYTES} bytes") from None
    head = _object(line)
    data = head.get("data") or {}
    if not isinstance(data, dict) or not isinstance(head.get("type"), str):
        raise BrokenStream("an event has a type, a text, and data, an object")
    data_bytes = _length(head, "data_length")
    payload_bytes = _length(head, "payload_length")
    if data_bytes > DATA_BYTES:
        raise BrokenStream(f"an event has over {DATA_BYTES} bytes of data")
    if data_bytes:
        try:
            data.update(_object(await reader.readexactly(data_bytes)))
        except asyncio.IncompleteReadError:
            return None
    return Frame(str(head["type"]), data, payload_bytes)


def _object(text: bytes) -> dict[str, object]:
    try:
        found = json.loads(text)
        # What is sent back must have bytes, and half of a surrogate pair has none.
        if b"\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    # Of JSON that is nested too deeply, the second.
    except (ValueError, RecursionError):
        raise BrokenStream("this is no event: a line of JSON is expected") from None
    if not isinstance(found, dict):
        raise BrokenStream("this is no event: an object is expected")
    return found


def _length(head: dict[str, object], name: str) -> int:
    length = head.get(name)
    # True is an int to Python.
    if length is None or (type(length) is int and length >= 0):
        return length or 0
    raise BrokenStream(f"{name} is no length")


async def read_payload(
    reader: asyncio.StreamReader, n_bytes: int
) -> AsyncIterator[bytes]:
    """
    Yields the bytes of an event in pieces; fewer of them at the end of the stream.
    """
    while n_bytes:
        piece = await reader.read(min(n_bytes, PIECE_BYTES))
        if not piece:
            return
        n_bytes -= len(piece)
        yield piece
