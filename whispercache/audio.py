"""
Audio: what a file or a stream holds, as samples, for the library and the server alike.

Decoding goes packet by packet, as in FFmpeg's own programs: a broken packet is left
out, and all that follows is heard. What was lost is told.

This module imports PyAV and the standard library alone, since each new process of the
server waits for its imports.
"""

from __future__ import annotations

import gc
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import av
import av.error

from .errors import AudioError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from numpy.typing import NDArray

__all__ = [
    "SAMPLES_PER_S",
    "SAMPLE_BYTES",
    "UNDECODABLE",
    "Audio",
    "AudioDamage",
    "NoAudio",
    "Recording",
    "collect",
    "name_of",
    "open_audio",
    "read_audio",
]

SAMPLES_PER_S = 16_000
SAMPLE_BYTES = 2

UNDECODABLE = (
    av.error.FFmpegError,
    ArithmeticError,
    AssertionError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""
All that PyAV was seen to raise on broken files, and their kin. A mistake in the caller
(a wrong name, say) is none of these and is no file's fault.
"""

GROUP_SAMPLES = 50_000
GROUP_S = 30
"""
Samples, and seconds at a low rate, that are resampled at once.

Source: one frame at a time takes up to 1.9 times as long as faster-whisper, whose
groups have 500,000 samples; with these it is 0.5 to 1.0 times (benchmarks/decode.py).
"""

JUMP_S = 0.1
"""
Seconds that timestamps may leave out before that counts as missing: in containers that
keep milliseconds, or times of arrival, they tremble.
"""

WORTH_TELLING_S = 0.1
"""
Seconds that must be lost before it is told. No syllable is shorter, and the seam of two
joined files is: one or two packets, of 26 ms each in an mp3.
"""

_TAGS = (b"ID3", b"TAG", b"APETAGEX")
"""
Beginnings of what stands between joined files and is no audio.
"""

_COUNTED = frozenset({"flac", "mov"})
"""
Containers whose header says how long each stream is, and not by way of an estimate.
"""

_PYAV = int(av.__version__.partition(".")[0])
_OPEN: dict[str, object] = {"metadata_errors": "ignore"} if _PYAV < 19 else {}  # noqa: PLR2004
"""
Names of artists that are no text are no error; from PyAV 19 on they never are.
"""


class NoAudio(Exception):
    """
    There is nothing to decode; the text says why.
    """


@dataclass(frozen=True, slots=True)
class AudioDamage:
    """
    What of a recording could not be heard, as far as its packets and timestamps tell.

    Times of what follows do not count it: they are that much earlier.

    Attributes:
        packets: How many packets could not be decoded, and were left out.
        broken_s: About how many seconds these stand for.
        missing_s: Seconds that are not there at all: timestamps leave them out, or the
            header counts them. A recorder that was paused does that, too.
    """

    packets: int
    broken_s: float
    missing_s: float

    @property
    def lost_s(self) -> float:
        """
        Seconds in all.
        """
        return self.broken_s + self.missing_s

    def __str__(self) -> str:
        parts = []
        if self.packets:
            packets = "1 packet" if self.packets == 1 else f"{self.packets} packets"
            parts.append(
                f"about {self.broken_s:.1f} s could not be decoded ({packets})"
            )
        if self.missing_s:
            parts.append(f"{self.missing_s:.1f} s are missing, by its own times")
        return " and ".join(parts)


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """
    A recording that was decoded.

    Attributes:
        samples: float32 (samples,), mono, 16 kHz, in ±1.
        damage: What of it could not be heard; None if nothing worth telling.
    """

    samples: NDArray[np.float32]
    damage: AudioDamage | None


def read_audio(source: str | os.PathLike[str] | BinaryIO) -> Audio:
    """
    Decodes a file or a stream, as ``transcribe`` does with what it is given.

    Args:
        source: A path, or whatever else FFmpeg opens by name, or a binary stream, read
            from where it is. It need not be seekable.

    Returns:
        The samples, bit by bit those of ``faster_whisper.decode_audio`` where nothing
        is broken, and what was lost.

    Raises:
        AudioError: it cannot be decoded, or there is no audio in it.
        FileNotFoundError, IsADirectoryError, PermissionError: the path cannot be read.

    Blocks: while it is read and decoded.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    elif not isinstance(source, str) and not hasattr(source, "read"):
        reason = "it is neither a path nor a stream; bytes become one by io.BytesIO"
        raise AudioError(name_of(source), reason)
    try:
        with open_audio(source) as container:
            recording = Recording(container)
            samples = _joined(list(recording.pieces()))
    except NoAudio as error:
        raise AudioError(name_of(source), str(error)) from error
    except UNDECODABLE as error:
        if _is_of_path(error, source):
            raise
        raise AudioError(name_of(source), _reason(error)) from error
    finally:
        collect()
    if not samples.size:
        raise AudioError(name_of(source), "no audio in it")
    return Audio(samples, recording.damage())


def collect() -> None:
    """
    Frees resamplers that only the collector finds: those of PyAV before 15.

    Source: 1500 resamplers with the collector off, of 15.1 to 18.1: no growth.
    """
    if _PYAV < 15:  # noqa: PLR2004
        gc.collect()


def name_of(source: object) -> str:
    """
    The name of a recording in a message: its path, or its type where it has none.
    """
    name = getattr(source, "name", source)  # an open file has its path
    if isinstance(name, (str, os.PathLike)):
        return repr(os.fspath(name))
    return type(source).__name__


def open_audio(source: str | BinaryIO, **options: object) -> InputContainer:
    """
    Opens a container to read, by ``av.open`` with these *options*.
    """
    container = av.open(source, mode="r", **_OPEN, **options)  # type: ignore[call-overload]
    return cast("InputContainer", container)


def _is_of_path(error: BaseException, source: object) -> bool:
    """
    Tells errors about the path itself from those that name a file inside of it, or
    were FFmpeg's words for broken content.
    """
    kinds = (FileNotFoundError, IsADirectoryError, PermissionError)
    if not isinstance(source, str) or not isinstance(error, kinds):
        return False
    return not (Path(source).is_file() and os.access(source, os.R_OK))


def _reason(error: BaseException) -> str:
    if isinstance(error, EOFError):
        return "it ends before its audio begins"
    if isinstance(error, av.error.DecoderNotFoundError):
        return "its codec is not known"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _joined(pieces: list[memoryview]) -> NDArray[np.float32]:
    """
    Samples as floats. *pieces* is emptied on the way, so that long audio is there once.
    """
    import numpy as np

    n_samples = sum(piece.nbytes for piece in pieces) // SAMPLE_BYTES
    samples = np.empty(n_samples, np.float32)
    at = 0
    pieces.reverse()
    while pieces:
        piece = np.frombuffer(pieces.pop(), np.int16)
        end = at + len(piece)
        np.divide(piece, np.float32(32768), out=samples[at:end])
        at = end
    return samples


class Recording:
    """
    The first audio stream of a container, decoded once.

    Args:
        container: Opened for reading.
        options: For FFmpeg's decoder.
        highest_rate_hz: A rate beyond it is refused.

    Raises:
        NoAudio: it has no such stream, or no decoder for it.
    """

    def __init__(
        self,
        container: InputContainer,
        options: dict[str, str] | None = None,
        highest_rate_hz: float = math.inf,
    ) -> None:
        if not container.streams.audio:
            raise NoAudio("there is no audio in it")
        self._container = container
        self._stream = container.streams.audio[0]
        if self._stream.codec_context is None:
            raise NoAudio("its codec is not known")
        if options:
            self._stream.codec_context.options = options
        self._highest_rate_hz = highest_rate_hz
        self._losses = _Losses()

    def pieces(self) -> Iterator[memoryview]:
        """
        Samples in mono, 16 kHz, 16 bit, of this machine's byte order, some at a time.

        Raises:
            NoAudio: its rate is none, or too high.
            UNDECODABLE: something else is wrong than single packets.
        """
        for frame in _resampled(_grouped(self._frames()), self._losses):
            n_bytes = frame.samples * SAMPLE_BYTES
            yield memoryview(frame.planes[0])[:n_bytes]

    def damage(self) -> AudioDamage | None:
        """
        What was lost, once all pieces are there; None if nothing worth telling.
        """
        self._losses.end(_promised_s(self._container, self._stream))
        damage = AudioDamage(
            self._losses.packets, self._losses.broken_s, self._losses.missing_s
        )
        return damage if damage.lost_s >= WORTH_TELLING_S else None

    def _frames(self) -> Iterator[AudioFrame]:
        """
        What the stream decodes to, without its times.
        """
        losses = self._losses
        for packet in self._packets():
            try:
                frames = cast("Sequence[AudioFrame]", packet.decode())
            except (av.error.LookupError, MemoryError):
                # No packet is to blame for what FFmpeg or the machine lacks.
                raise
            except av.error.FFmpegError:
                losses.lose(packet)
                continue
            losses.n_bytes += packet.size
            for frame in frames:
                if not 0 < frame.sample_rate <= self._highest_rate_hz:
                    raise NoAudio(f"its sample rate is {frame.sample_rate} Hz")
                losses.hear(frame, packet)
                # Timestamps that jump are not to become silence, or an error.
                frame.pts = None
                yield frame

    def _packets(self) -> Iterator[Packet[AudioStream]]:
        """
        The stream's packets, to where the container breaks off.
        """
        try:
            yield from self._container.demux(self._stream)
        except av.error.InvalidDataError:
            if not self._losses.heard_s:
                raise


def _promised_s(container: InputContainer, stream: AudioStream) -> float:
    """
    Seconds that a stream lasts by its header; 0 where that cannot be relied on.
    """
    names = container.format.name.split(",")
    if _COUNTED.isdisjoint(names) or not stream.duration or not stream.time_base:
        return 0.0
    return float(stream.duration * stream.time_base)


class _Losses:
    """
    What of a stream could not be heard, counted as it is decoded.

    Attributes:
        n_bytes: Size of the packets that could be decoded.
        heard_s: Seconds that came of them.
        packets: As in `AudioDamage`.
        broken_s: Likewise.
        missing_s: Likewise.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self.heard_s = 0.0
        self.packets = 0
        self.broken_s = 0.0
        self.missing_s = 0.0
        self._next_s: float | None = None
        self._largest_bytes = 0
        # Broken packets since the last one that was heard, and their seconds.
        self._stretch = 0
        self._stretch_s = 0.0
        self._is_tag = False

    def hear(self, frame: AudioFrame, packet: Packet[AudioStream]) -> None:
        """
        Counts a *frame* of *packet*; its time tells what is missing before it.
        """
        length_s = frame.samples / frame.sample_rate
        at_s, next_s = frame.time, self._next_s
        if at_s is None:
            at_s = next_s or 0.0
        gap_s = 0.0 if next_s is None else at_s - next_s
        self._next_s = at_s + length_s
        self.heard_s += length_s
        self._largest_bytes = max(self._largest_bytes, packet.size)
        if self._stretch:
            self._close(gap_s)
        elif gap_s > JUMP_S:
            self.missing_s += gap_s

    def lose(self, packet: Packet[AudioStream]) -> None:
        """
        Counts a packet that could not be decoded. The last one is empty: no loss.
        """
        if not packet.size:
            return
        if not self._stretch:
            self._is_tag = bytes(packet).startswith(_TAGS)
        self._stretch += 1
        self._stretch_s += self._seconds(packet)

    def unhear(self, frame: AudioFrame) -> None:
        """
        Counts a *frame* that came of a broken packet after all.
        """
        length_s = frame.samples / frame.sample_rate
        self.heard_s -= length_s
        self.broken_s += length_s
        self.packets += 1

    def end(self, promised_s: float) -> None:
        """
        Counts what is broken or missing at the end of a stream of *promised_s*.
        """
        if self._stretch:
            self._close(0.0)
        left_s = promised_s - self.heard_s - self.lost_s
        if left_s > JUMP_S:
            self.missing_s += left_s

    @property
    def lost_s(self) -> float:
        """
        Seconds in all, so far.
        """
        return self.broken_s + self.missing_s

    def _close(self, gap_s: float) -> None:
        """
        Counts a stretch of broken packets, over which timestamps went by *gap_s*.
        """
        if not self._is_tag:
            self.packets += self._stretch
            self.broken_s += max(gap_s, self._stretch_s)
        self._stretch, self._stretch_s = 0, 0.0

    def _seconds(self, packet: Packet[AudioStream]) -> float:
        """
        What a broken packet would have lasted.

        Where a container has no packets of its own, as mp3, junk of any length comes as
        one: by its size.
        """
        if packet.size > 2 * self._largest_bytes and self.n_bytes:
            return packet.size * self.heard_s / self.n_bytes
        return float((packet.duration or 0) * (packet.time_base or 0))


def _grouped(frames: Iterable[AudioFrame]) -> Iterator[AudioFrame]:
    """
    The same in larger frames, each of one form: format, channels and rate.
    """
    fifo: av.AudioFifo | None = None
    form: tuple[object, ...] = ()
    for frame in frames:
        of_frame = (frame.format.name, frame.layout.name, frame.sample_rate)
        if fifo is None or form != of_frame:
            if fifo is not None:
                yield from _rest(fifo)
            # One that was made for other channels would read beyond the frame's.
            fifo, form = av.AudioFifo(), of_frame
            most = min(GROUP_SAMPLES, GROUP_S * frame.sample_rate)
        fifo.write(frame)
        if fifo.samples >= most:
            yield from _rest(fifo)
    if fifo is not None:
        yield from _rest(fifo)


def _rest(fifo: av.AudioFifo) -> Iterator[AudioFrame]:
    frame = fifo.read()
    if frame is not None:
        yield frame


def _resampled(frames: Iterable[AudioFrame], losses: _Losses) -> Iterator[AudioFrame]:
    """
    The same in mono, 16 kHz, 16 bit, however often *frames* change their form.

    A broken packet may decode to a form that there is no way from: it is left out.
    """
    resampler: av.AudioResampler | None = None
    form: tuple[object, ...] = ()
    for frame in frames:
        of_frame = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or form != of_frame:
            if resampler is not None:
                yield from resampler.resample(None)
            resampler, form = av.AudioResampler("s16", "mono", SAMPLES_PER_S), of_frame
        try:
            resampled = resampler.resample(frame)
        except MemoryError:
            raise
        except (av.error.FFmpegError, ValueError):
            losses.unhear(frame)
            resampler = None
            continue
        yield from resampled
    if resampler is not None:
        yield from resampler.resample(None)
