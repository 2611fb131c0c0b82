"""
The decoding of a file or a stream to samples, for the library and the server alike.

It goes packet by packet, as in FFmpeg's own programs: a broken packet is left out,
counted, and all that follows is heard.

This module imports PyAV and the standard library alone, since each new process of the
server waits for its imports.
"""

from __future__ import annotations

import gc
import inspect
import io
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import av
import av.error

from whispercache.errors import AudioError

from .damage import AudioDamage, Losses

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from numpy.typing import NDArray

SAMPLES_PER_S = 16_000
SAMPLE_BYTES = 2
# The errors that PyAV was seen to raise on broken files, and their kin. A mistake in
# the caller (a wrong name, say) raises none of these.
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

# Samples, and seconds at a low rate, that are resampled at once. Source: one frame at a
# time takes up to 1.9 times as long as faster-whisper, whose groups have 500,000
# samples; with these it is 0.5 to 1.0 times (benchmarks/decode.py).
GROUP_SAMPLES = 50_000
GROUP_S = 30
# Seconds that must be lost before it is told. No syllable is shorter, and the seam of
# two joined files is: one or two packets, of 26 ms each in an mp3.
WORTH_TELLING_S = 0.1
# Errors of FFmpeg's where a container cannot be read on: it is broken there, or a part
# of another kind was joined to it. All others are the machine's or the network's.
_OF_CONTENT = (ValueError, av.error.PatchWelcomeError)
# Containers whose header says how long each stream is, and not by way of an estimate.
_COUNTED = frozenset({"flac", "mov"})

_PYAV = int(av.__version__.partition(".")[0])
# Options that let metadata be bytes that are no text; from PyAV 19 on they always may
# be.
OPENING: dict[str, object] = {"metadata_errors": "ignore"} if _PYAV < 19 else {}  # noqa: PLR2004


class NoAudio(Exception):
    """
    A source without anything to decode; the text says why.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """
    A recording that was decoded.

    Attributes:
        samples: float32 (samples,), mono, 16 kHz, in ±1.
        damage: The parts that could not be heard; None if none are worth telling.
    """

    samples: NDArray[np.float32]
    damage: AudioDamage | None


def read_audio(source: str | os.PathLike[str] | BinaryIO) -> Audio:
    """
    Decodes a file or a stream, as ``transcribe`` does with what it is given.

    Args:
        source: A path, anything else that FFmpeg opens by name, or a binary stream,
            which is read from its position. It need not be seekable.

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
    if refusal := _refusal(source):
        raise AudioError(name_of(source), refusal)
    opened = source
    if isinstance(source, str) and Path(source).is_file():
        # What is before a colon would be a protocol: "12:30 talk.mp3".
        opened = str(Path(source).absolute())
    try:
        with open_audio(opened) as container:
            recording = Recording(container)
            samples = _joined(list(recording.pieces()))
            # From PyAV 19 on, a closed container tells nothing.
            damage = recording.damage()
    # The reason is ready for people; FFmpeg's errors need words first.
    except NoAudio as error:
        raise AudioError(name_of(source), str(error)) from error
    except UNDECODABLE as error:
        if _is_of_path(error, source):
            raise
        raise undecodable(source, error) from error
    finally:
        collect()
    if not samples.size:
        raise AudioError(name_of(source), "no audio in it")
    return Audio(samples, damage)


def undecodable(source: object, error: BaseException) -> AudioError:
    """
    Returns the error for a source that FFmpeg cannot decode. It is caught as FFmpeg's
    own, too, as programs that were written for faster-whisper do.
    """
    text = name_of(source), _reason(error)
    if not isinstance(error, av.error.FFmpegError):
        return AudioError(*text)

    def reduce(made: AudioError) -> tuple[type[AudioError], tuple[str, str]]:
        # Other processes have no such class.
        return AudioError, (made.audio, made.reason)

    # FFmpeg's attributes are of the class, since some of its own are properties.
    words = ("errno", "strerror", "filename", "log")
    members = {name: getattr(error, name, None) for name in words}
    members |= {"__module__": AudioError.__module__, "__reduce__": reduce}
    kind: type[AudioError] = type("AudioError", (AudioError, type(error)), members)
    return kind(*text)


def at_end(source: object) -> AudioError:
    """
    Returns the error for a stream from which all was read before.
    """
    reason = "the stream is at its end; seek(0) to hear it from its beginning"
    # FFmpeg's own for it.
    code = av.error.tag_to_code(b"INDA")
    return undecodable(source, av.error.InvalidDataError(code, reason))


def collect() -> None:
    """
    Frees resamplers that only the collector finds: those of PyAV before 15.

    Source: 1500 resamplers with the collector off, of 15.1 to 18.1: no growth.
    """
    if _PYAV < 15:  # noqa: PLR2004
        gc.collect()


def name_of(source: object) -> str:
    """
    Returns the name of a recording in a message: its path, or else its type.
    """
    # An open file has its path, or, if it was opened by number, that number.
    name = getattr(source, "name", source)
    if isinstance(name, (str, os.PathLike)):
        return repr(os.fspath(name))
    return type(source).__name__


def open_audio(source: str | BinaryIO, **options: object) -> InputContainer:
    """
    Opens a container to read, by ``av.open`` with these *options*.
    """
    container = av.open(source, mode="r", **OPENING, **options)  # type: ignore[call-overload]
    return cast("InputContainer", container)


def _refusal(source: object) -> str:
    """
    Explains, with a cure, why nothing can be read from *source*; empty if it can.
    """
    if isinstance(source, str):
        return ""
    if not hasattr(source, "read"):
        return "it is neither a path nor a stream; bytes become one by io.BytesIO"
    if isinstance(source, io.TextIOBase):
        return "it is open as text; open it with mode 'rb'"
    if inspect.iscoroutinefunction(source.read):
        return "its read() has to be awaited; give io.BytesIO(await audio.read())"
    return ""


def _is_of_path(error: BaseException, source: object) -> bool:
    kinds = (FileNotFoundError, IsADirectoryError, PermissionError)
    if not isinstance(source, str) or not isinstance(error, kinds):
        return False
    # FFmpeg may use the same words for a segment that a playlist names.
    return not (Path(source).is_file() and os.access(source, os.R_OK))


def _reason(error: BaseException) -> str:
    if isinstance(error, EOFError):
        return "it ends before its audio begins"
    if isinstance(error, av.error.DecoderNotFoundError):
        return "its codec is not known"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _joined(pieces: list[memoryview]) -> NDArray[np.float32]:
    # The list is emptied on the way, so that long audio is in memory once.
    import numpy as np

    n_samples = sum(piece.nbytes for piece in pieces) // SAMPLE_BYTES
    samples = np.empty(n_samples, np.float32)
    # From the end of the reversed list: to pop its beginning would move all others.
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
    The first audio stream of a container, decoded once by FFmpeg with *options*.

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
        self._losses = Losses()

    def pieces(self) -> Iterator[memoryview]:
        """
        Yields samples in mono, 16 kHz, 16 bit, of this machine's byte order, some at a
        time.

        Raises:
            NoAudio: its rate is none, or higher than allowed.
            UNDECODABLE: something else is wrong than single packets.
        """
        for frame in _resampled(_grouped(self._frames()), self._losses):
            n_bytes = frame.samples * SAMPLE_BYTES
            yield memoryview(frame.planes[0])[:n_bytes]

    def damage(self) -> AudioDamage | None:
        """
        Returns the losses, once all pieces are there, if any are worth telling. The
        container must still be open.
        """
        damage = self._losses.total(_promised_s(self._container, self._stream))
        is_told = damage.lost_s >= WORTH_TELLING_S or damage.breaks_off
        return damage if is_told else None

    def _frames(self) -> Iterator[AudioFrame]:
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
            # Decoded packets give the size of a second, for those that cannot be.
            losses.n_bytes += packet.size
            for frame in frames:
                if not 0 < frame.sample_rate <= self._highest_rate_hz:
                    raise NoAudio(f"its sample rate is {frame.sample_rate} Hz")
                losses.hear(frame, packet)
                # Timestamps that jump are not to become silence, or an error.
                frame.pts = None
                yield frame

    def _packets(self) -> Iterator[Packet[AudioStream]]:
        try:
            yield from self._container.demux(self._stream)
        except av.error.FFmpegError as error:
            if not (self._losses.heard_s and isinstance(error, _OF_CONTENT)):
                raise
            self._losses.breaks_off = True


def _promised_s(container: InputContainer, stream: AudioStream) -> float:
    """
    Returns the seconds that a stream lasts by its header; 0 where that cannot be relied
    on.

    Fragments of an mp4 count from the beginning of the stream that they were cut out
    of, as those of a live stream: the part before them is not missing. The header of a
    flac does so, too, but there nothing else shows that a beginning is gone.
    """
    names = container.format.name.split(",")
    if _COUNTED.isdisjoint(names) or not stream.duration or not stream.time_base:
        return 0.0
    before = max(0, stream.start_time or 0) if "mov" in names else 0
    return float((stream.duration - before) * stream.time_base)


def _form(frame: AudioFrame) -> tuple[object, ...]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _grouped(frames: Iterable[AudioFrame]) -> Iterator[AudioFrame]:
    """
    Yields the same in larger frames, each of one form: format, channels and rate.
    """
    # A queue that was made for other channels would read beyond a frame's.
    for _, alike in itertools.groupby(frames, key=_form):
        fifo = av.AudioFifo()
        for frame in alike:
            fifo.write(frame)
            if fifo.samples >= min(GROUP_SAMPLES, GROUP_S * frame.sample_rate):
                yield from _rest(fifo)
        yield from _rest(fifo)


def _rest(fifo: av.AudioFifo) -> Iterator[AudioFrame]:
    frame = fifo.read()
    if frame is not None:
        yield frame


def _resampled(frames: Iterable[AudioFrame], losses: Losses) -> Iterator[AudioFrame]:
    """
    Yields the same in mono, 16 kHz, 16 bit, however often *frames* change their form.

    A broken packet may decode to a form that cannot be converted; it is left out.
    """
    resampler: av.AudioResampler | None = None
    form: tuple[object, ...] = ()
    for frame in frames:
        if resampler is None or form != _form(frame):
            if resampler is not None:
                # What the old one still holds comes before the new form's samples.
                yield from resampler.resample(None)
            resampler = av.AudioResampler("s16", "mono", SAMPLES_PER_S)
            form = _form(frame)
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
