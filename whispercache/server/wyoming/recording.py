"""
What a client says, on its way to a model: on disk, as an upload by HTTP is.
"""

from __future__ import annotations

import tempfile
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from anyio import to_thread

from whispercache.engine.audio.decoder import SAMPLE_BYTES, SAMPLES_PER_S
from whispercache.server.decode import AudioTooLong
from whispercache.server.errors import nonsense

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whispercache.server.decode import Decoder

# Bytes that wait in memory, so that a short sentence needs one look at the disk.
_BUFFER_BYTES: Final = 256 * 1024
# What sound cards have.
_HIGHEST_RATE_HZ: Final = 768_000
_MOST_CHANNELS: Final = 32
_WIDTHS: Final = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Format:
    """
    The shape of raw samples: whole numbers of *width* bytes, unsigned if that is one.
    """

    rate: int
    width: int
    channels: int

    @classmethod
    def of(cls, data: Mapping[str, object]) -> Format:
        """
        Returns the one that an event names; raises an `ApiError` if that is none.
        """
        values = []
        for name, least, most in (
            ("rate", 1, _HIGHEST_RATE_HZ),
            ("width", _WIDTHS[0], _WIDTHS[-1]),
            ("channels", 1, _MOST_CHANNELS),
        ):
            value = data.get(name)
            if type(value) is not int or not least <= value <= most:
                raise nonsense(name, f"{name} is a whole number, {least} to {most}")
            values.append(value)
        return cls(*values)

    @property
    def frame_bytes(self) -> int:
        """
        The bytes of one moment.
        """
        return self.width * self.channels


# That of models, and of Home Assistant: nothing has to be done to it.
NATIVE: Final = Format(SAMPLES_PER_S, SAMPLE_BYTES, 1)


class Recording:
    """
    Raw samples as they come, up to a length.

    Args:
        shape: Their shape.
        max_s: Seconds that there may be.
        max_bytes: Bytes that there may be.
    """

    def __init__(self, shape: Format, max_s: float, max_bytes: int) -> None:
        self.shape = shape
        self._max_s = max_s
        self._max_bytes = int(min(max_bytes, max_s * shape.rate * shape.frame_bytes))
        self._n_bytes = 0
        self._buffer = bytearray()
        # Of its own: whatever becomes of it, all is removed with it.
        self._folder = tempfile.TemporaryDirectory(prefix="whispercache-")
        self._raw = Path(self._folder.name, "raw")

    @property
    def is_empty(self) -> bool:
        """
        True if there is no sample in it.
        """
        return self._n_bytes < self.shape.frame_bytes

    async def add(self, piece: bytes) -> None:
        """
        Adds samples, or parts of them. Raises AudioTooLong if these are too many.
        """
        self._n_bytes += len(piece)
        if self._n_bytes > self._max_bytes:
            per_s = self.shape.rate * self.shape.frame_bytes
            raise AudioTooLong(min(self._max_s, round(self._max_bytes / per_s, 3)))
        self._buffer += piece
        if len(self._buffer) >= _BUFFER_BYTES:
            await to_thread.run_sync(self._write)

    def _write(self) -> None:
        with self._raw.open("ab") as file:
            file.write(self._buffer)
        self._buffer.clear()

    async def samples(self, decoder: Decoder) -> tuple[Path, float]:
        """
        Returns the file of 16-bit samples, mono, 16 kHz, and its seconds. Other shapes
        go the way of uploads, which resamples as it should be done. Raises what
        `Decoder.decode` does.
        """
        await to_thread.run_sync(self._write)
        if self.shape == NATIVE:
            return self._raw, self._n_bytes // SAMPLE_BYTES / SAMPLES_PER_S
        upload, target = self._raw.with_name("upload"), self._raw.with_name("samples")
        await to_thread.run_sync(self._wrap, upload)
        return target, await decoder.decode(upload, target)

    def _wrap(self, target: Path) -> None:
        with self._raw.open("rb") as raw, wave.open(str(target), "wb") as file:
            file.setnchannels(self.shape.channels)
            file.setsampwidth(self.shape.width)
            file.setframerate(self.shape.rate)
            whole_bytes = self._n_bytes // self.shape.frame_bytes
            whole_bytes *= self.shape.frame_bytes
            while piece := raw.read(min(whole_bytes, _BUFFER_BYTES * 4)):
                whole_bytes -= len(piece)
                file.writeframesraw(piece)
        self._raw.unlink()

    def close(self) -> None:
        """
        Removes all of it.
        """
        self._folder.cleanup()
