"""
The work of a decoding process: an upload becomes samples, within limits.

Of what FFmpeg can read, little is let in: the containers and codecs in which people
send speech. Playlists, manifests, scripts, pictures and subtitles are refused by name
before they are read, and nothing but the upload itself can be opened.

This module and the engine's decoder import PyAV and the standard library
alone, since a new process waits for their imports.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar

import av.logging

from whispercache.engine.audio.decoder import (
    SAMPLE_BYTES,
    UNDECODABLE,
    NoAudio,
    Recording,
    collect,
    open_audio,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType

    from whispercache.engine.audio.damage import AudioDamage

_CONTAINERS = (
    "aac,aiff,amr,asf,au,caf,flac,matroska,mov,mp3,mpeg,mpegts,ogg,w64,wav"  # demuxers
)
_CODECS = ",".join(
    (
        "aac,aac_fixed,aac_latm,ac3,ac3_fixed,eac3,alac,flac,mp1,mp1float,mp2,mp2float",
        "mp3,mp3float,opus,libopus,vorbis,libvorbis,speex,libspeex,wmapro,wmav1,wmav2",
        "amrnb,libopencore_amrnb,amrwb,libopencore_amrwb,gsm,gsm_ms,g722,g726",
        "adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,pcm_alaw,pcm_mulaw,pcm_s8,pcm_u8",
        *(f"pcm_s{n_bits}{order}" for n_bits in (16, 24, 32) for order in ("le", "be")),
        *(f"pcm_f{n_bits}{order}" for n_bits in (32, 64) for order in ("le", "be")),
    )
)
_OPTIONS = {
    "format_whitelist": _CONTAINERS,
    # Decoders of video are kept out too: FFmpeg tries them to learn what is in a file.
    "codec_whitelist": _CODECS,
    # A protocol that does not exist: an empty list would mean any.
    "protocol_whitelist": "none",
    "max_streams": "64",
}
_NAME = "upload"
# What sound cards offer at most; a header may claim anything.
_HIGHEST_RATE_HZ = 768_000
_STACK_BYTES = 8 * 1024**2
# Python's libraries and one upload; many more would be an attack.
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    The result of decoding an upload: the samples that were written, or the reason of a
    refusal, for the client; and what could not be decoded of it, if any.
    """

    n_samples: int
    refusal: str = ""
    is_too_long: bool = False
    damage: AudioDamage | None = None


class _Refused(Exception):
    pass  # its text is the reason


class Worker(SpawnProcess):
    """
    A decoding process, which ends without a word if its pool ends while it starts.
    """

    def __reduce__(self) -> tuple[Callable[[], Worker], tuple[()], dict[str, object]]:
        # The child makes it by that call, and reads the rest after it: locks, which may
        # be gone, since pebble puts them away before it ends its processes.
        return _arriving, (), self.__dict__


def _arriving() -> Worker:
    sys.excepthook = _end_quietly
    return Worker.__new__(Worker)


def _end_quietly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """
    Prints an error that ends this process, unless it means that the pool has ended.
    """
    if not isinstance(error, (EOFError, FileNotFoundError, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)


class Context(SpawnContext):
    """
    Starts new processes. A fork would share the models, their threads and the event
    loop's signals with code that reads what strangers have sent.
    """

    Process: ClassVar[type[SpawnProcess]] = Worker


def prepare(memory_bytes: int, output_bytes: int) -> None:
    """
    Limits this process, once, before its first upload: its growth from now on, which is
    kept on Linux alone, and the files that it writes, which is not on Windows.
    """
    # A handler in Python would wait until FFmpeg returns.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    av.logging.set_level(av.logging.PANIC)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _set_limits(memory_bytes, output_bytes)
    # What was imported stays; the collector need not look through it each time.
    gc.freeze()


def ready() -> Outcome:
    """
    Decodes nothing: a process that answers is up and limited.
    """
    return Outcome(0)


def decode(path: str, target: str, max_samples: int) -> Outcome:
    """
    Decodes the first audio stream of *path* into *target*: mono, 16 kHz, 16 bit, until
    there are more than *max_samples*.

    *target* is not created here, since a request that has ended may have removed it.
    """
    n_samples = 0
    damages: list[AudioDamage] = []
    try:
        with (
            io.FileIO(path) as source,
            Path(target).open("r+b") as file,
            contextlib.closing(_pieces(source, damages)) as pieces,
        ):
            # FFmpeg takes "song.png" for a picture, whatever is in it.
            source.name = _NAME
            file.truncate()
            for piece in pieces:
                n_samples += piece.nbytes // SAMPLE_BYTES
                # By samples and not by the header, which may lie.
                if n_samples > max_samples:
                    return Outcome(0, "it is too long", is_too_long=True)
                file.write(piece)
    except _Refused as refusal:
        return Outcome(0, str(refusal))
    finally:
        collect()
    # A container without audio in it, for example.
    if not n_samples:
        return Outcome(0, "no audio could be decoded from it")
    return Outcome(n_samples, damage=damages[0] if damages else None)


def _pieces(
    source: io.FileIO, damages: list[AudioDamage]
) -> Generator[memoryview, None, None]:
    """
    Yields all samples of *source*, some at a time, and adds what was lost to *damages*.
    """
    try:
        with open_audio(
            source, container_options=_OPTIONS, io_open=_open_nothing
        ) as container:
            recording = Recording(
                container, {"codec_whitelist": _CODECS}, _HIGHEST_RATE_HZ
            )
            yield from recording.pieces()
            if (damage := recording.damage()) is not None:
                damages.append(damage)
    except NoAudio as error:
        raise _Refused(str(error)) from error
    # RLIMIT_AS, which _set_limits has set.
    except MemoryError as error:
        raise _Refused("it is broken, or takes too much memory") from error
    except UNDECODABLE as error:
        raise _Refused(
            "it is broken, or none of the kinds of audio that are accepted; send "
            "flac, m4a, mp3, mp4, ogg, wav or webm"
        ) from error


def _open_nothing(*_asked: object) -> BinaryIO:
    raise PermissionError


def _end_with_parent() -> None:
    """
    Ends this process at once when its parent has ended, even in the midst of decoding.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Also after SIGKILL, which lets a parent end nothing.
        parent.join()
        os._exit(1)


def _set_limits(memory_bytes: int, output_bytes: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    limits = {
        # A core dump would hold the upload.
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: output_bytes,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
    }
    if sys.platform == "linux":
        # Resampling starts a thread for each CPU, and each reserves a stack.
        stacks_bytes = _STACK_BYTES * (os.cpu_count() or 1)
        n_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        mapped_bytes = n_pages * os.sysconf("SC_PAGE_SIZE")
        limits[resource.RLIMIT_AS] = mapped_bytes + stacks_bytes + memory_bytes
    for limit, wanted in limits.items():
        _, hard = resource.getrlimit(limit)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # Soft and hard: the process cannot raise it again.
        resource.setrlimit(limit, (value, value))
