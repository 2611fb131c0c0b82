"""
The Wyoming protocol's own client, as Home Assistant uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["asked", "described"]

# Of samples: 16,000 a second, of 16 bits, one channel.
_SOUND: dict[str, Any] = {"rate": 16_000, "width": 2, "channels": 1}
_SECOND = 32_000


async def described(uri: str) -> Any:
    """
    Returns what a server says that it has (`Info`); None if it says something else.

    Raises:
        ConnectionRefusedError: Nothing listens there.
    """
    from wyoming.client import AsyncClient
    from wyoming.info import Describe, Info

    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Describe().event())
        event = await client.read_event()
        if event is not None and Info.is_type(event.type):
            return Info.from_event(event)
    return None


async def asked(
    uri: str, samples: bytes, language: str | None, name: str | None = None
) -> str:
    """
    Returns the text that a server hears in *samples*.

    Args:
        uri: The server, ``tcp://HOST:PORT``.
        samples: 16,000 a second, of 16 bits, one channel.
        language: Their language; None to detect it.
        name: The model; None for the server's own choice.

    Raises:
        ConnectionError: The server hung up, or refused.
    """
    from wyoming.asr import Transcribe, Transcript
    from wyoming.audio import AudioChunk, AudioStart, AudioStop
    from wyoming.client import AsyncClient
    from wyoming.error import Error

    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Transcribe(name=name, language=language).event())
        await client.write_event(AudioStart(**_SOUND).event())
        for part in _seconds(samples):
            await client.write_event(AudioChunk(audio=part, **_SOUND).event())
        await client.write_event(AudioStop().event())
        while event := await client.read_event():
            if Transcript.is_type(event.type):
                return str(Transcript.from_event(event).text)
            if Error.is_type(event.type):
                raise ConnectionError(Error.from_event(event).text)
    raise ConnectionError("the server hung up")


def _seconds(samples: bytes) -> Iterator[bytes]:
    for start in range(0, len(samples), _SECOND):
        yield samples[start : start + _SECOND]
