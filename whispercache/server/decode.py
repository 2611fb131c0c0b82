"""
Decodes uploads in processes of their own, since they may hold anything.

A file that crashes, stalls or bloats FFmpeg ends one process and one request. What is
decoded waits for its model in a file, so that waiting requests hold no memory.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from pebble import ProcessExpired, ProcessPool

from whispercache.engine.audio.decoder import SAMPLE_BYTES, SAMPLES_PER_S
from whispercache.errors import AudioError, WhisperCacheError

from . import decoding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from pebble import ProcessFuture
    from typing_extensions import Self

    from .decoding import Outcome

# Exit codes of processes that others have told to end; Windows has no SIGHUP.
_STOPPED = (-signal.SIGTERM, -getattr(signal, "SIGHUP", signal.SIGTERM))

_log = logging.getLogger("whispercache")

# Further ones, for processes that others have ended and pools that were lost with them;
# an upload that crashes FFmpeg once would do so again.
_ATTEMPTS = 4
_START_TIMEOUT_S = 60.0
# Whoever has a permit has a process: longer than this only a broken pool lets him wait.
_BEGIN_TIMEOUT_S = 30.0
_LOOK_EVERY_S = 0.5


class AudioRefused(AudioError):
    """
    An upload that is broken, or is no audio. Its message has no path of the server.
    """

    def __str__(self) -> str:
        return f"the upload cannot be decoded: {self.reason}"


class AudioTooLong(WhisperCacheError, ValueError):
    """
    An upload that goes on for longer than *limit_s* seconds of audio.
    """

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self.limit_s = limit_s

    def __str__(self) -> str:
        # In seconds, as clients know their audio's length.
        return f"the upload is longer than {self.limit_s:g} s; send it in parts"


class DecodeTimeout(WhisperCacheError, TimeoutError):
    """
    An upload that took longer than *timeout_s* seconds to decode.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return (
            f"the upload was not decoded within {self.timeout_s:g} s; send it in "
            "parts, or as flac, mp3 or wav"
        )


class DecodeCrashed(WhisperCacheError):
    """
    A process that ended while it decoded, by a crash or for want of memory.
    """


class DecoderClosed(WhisperCacheError):
    """
    A decoder that was closed before the upload was decoded.
    """

    def __init__(self, reason: str = "the server is shutting down") -> None:
        super().__init__(reason)


class _Lost(Exception):
    """
    A call that no process will finish; another pool may.
    """


class Decoder:
    """
    A pool of processes that decode uploads, one upload each at a time.

    Used in one event loop. No process, thread or file remains of it.

    Args:
        max_duration_s: Seconds of audio that an upload may hold. Decoding ends
            where they are over, whatever its header claims.
        timeout_s: Seconds that decoding may take, without the wait for a process.
        memory_bytes: Limit of a process's memory for decoding (on Linux).
        uploads_per_process: After so many, a process is replaced by a new one.
    """

    def __init__(
        self,
        *,
        processes: int = 2,
        max_duration_s: float = 4 * 3600.0,
        timeout_s: float = 120.0,
        memory_bytes: int = 1024**3,
        uploads_per_process: int = 200,
    ) -> None:
        if min(processes, max_duration_s, timeout_s, memory_bytes) <= 0:
            raise ValueError("processes and limits of a Decoder are above zero")
        if uploads_per_process < 1:
            raise ValueError("uploads_per_process is at least 1")
        self.processes = processes
        self.max_duration_s = max_duration_s
        self.timeout_s = timeout_s
        self._max_samples = int(max_duration_s * SAMPLES_PER_S)
        self._uploads_per_process = uploads_per_process
        # One sample more than is ever written: the limit is a second barrier.
        self._limits = (memory_bytes, (self._max_samples + 1) * SAMPLE_BYTES)
        # Of what was handed to the pool, all starts at once: pebble ends the process of
        # a task that was cancelled before it had begun.
        self._free = asyncio.Semaphore(processes)
        self._renewal = asyncio.Lock()
        self._pool: ProcessPool | None = None
        self._is_closed = False
        self._under_way: set[ProcessFuture[Outcome]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def start(self) -> None:
        """
        Starts the processes, so that the first upload does not wait for their imports,
        and waits for the first. Raises DecodeCrashed if none starts.
        """
        try:
            await self._run(decoding.ready, _START_TIMEOUT_S)
        except BaseException as error:
            await self.close()
            if not isinstance(error, DecodeCrashed):
                raise
            # The usual cause: a script without that line is run again by its own child.
            raise DecodeCrashed(
                "no process for decoding starts; a program that runs the server itself "
                "does so under `if __name__ == '__main__':`"
            ) from None

    async def close(self) -> None:
        """
        Ends all processes. Uploads that are being decoded, or wait, fail.
        """
        # Before anything is awaited, so that no new pool is made meanwhile.
        self._is_closed = True
        async with self._renewal:
            # Waits for a pool that is just being made.
            pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(_end, pool)
        # The pool, which has ended, fails only those that it still happens to look at.
        for future in self._under_way:
            if not future.done():
                future.set_exception(DecoderClosed())

    async def decode(self, path: Path, target: Path) -> float:
        """
        Decodes the upload *path* into the new file *target*, which `samples` reads, and
        returns its seconds of audio. Waits until a process is free.

        A cancelled call ends the work. Without success there is no *target*. Raises
        AudioRefused, AudioTooLong, DecodeTimeout, DecodeCrashed or DecoderClosed.
        """
        call = partial(decoding.decode, str(path), str(target), self._max_samples)
        # Made here: the child may write to it, but make no file.
        with _gone_unless_successful(target):
            outcome = await self._run(call, self.timeout_s)
            if outcome.is_too_long:
                raise AudioTooLong(self.max_duration_s)
            if outcome.refusal:
                raise AudioRefused("upload", outcome.refusal)
            if outcome.damage is not None:
                _log.warning("an upload is damaged: %s", outcome.damage)
            return outcome.n_samples / SAMPLES_PER_S

    async def _run(self, call: Callable[[], Outcome], timeout_s: float) -> Outcome:
        async with self._free:
            # One permit for all attempts, so that a retry is not overtaken.
            for _ in range(_ATTEMPTS):
                try:
                    return await self._attempt(call, timeout_s)
                except (TimeoutError, asyncio.TimeoutError):
                    _log.warning("decoding took over %g s and was ended", timeout_s)
                    raise DecodeTimeout(timeout_s) from None
                except ProcessExpired as expired:
                    _log.warning("decoding ended with code %s", expired.exitcode)
                    # A service manager, or a terminal that is closed, stops all
                    # processes at once, but this one finishes what it has begun.
                    if expired.exitcode not in _STOPPED:
                        break
                except _Lost:
                    _log.info("the processes for decoding have ended")
        raise DecodeCrashed(
            "decoding the upload failed badly; convert it to flac, mp3 or wav and try "
            "again"
        )

    async def _attempt(self, call: Callable[[], Outcome], timeout_s: float) -> Outcome:
        pool = await self._sound_pool()
        try:
            future = pool.schedule(call, timeout=timeout_s)
        except RuntimeError:
            raise _Lost from None
        # For close(), which fails those that the pool forgets.
        self._under_way.add(future)
        outcome = asyncio.wrap_future(future)
        try:
            await self._end_of(future, outcome, pool)
            return await outcome
        except RuntimeError:
            raise _Lost from None
        finally:
            # Ends the process where the caller was cancelled; of no effect otherwise.
            outcome.cancel()
            self._under_way.discard(future)

    async def _end_of(
        self,
        future: ProcessFuture[Outcome],
        outcome: asyncio.Future[Outcome],
        pool: ProcessPool,
    ) -> None:
        """
        Waits for *outcome*, and raises `_Lost` where *pool* will never settle it.

        pebble gives the whole pool up when a process ends that has nothing to do. A
        task that is handed over at that moment is in no list of the pool any more, and
        a process may end between receiving a task and saying so.
        """
        must_begin_by = asyncio.get_running_loop().time() + _BEGIN_TIMEOUT_S
        while not outcome.done():
            # Read before the wait: a result that arrives during it counts.
            is_active = pool.active
            await asyncio.wait((outcome,), timeout=_LOOK_EVERY_S)
            has_begun = future.running() or future.done()
            is_late = asyncio.get_running_loop().time() > must_begin_by
            if not outcome.done() and (not is_active or (is_late and not has_begun)):
                # close() settles what it finds.
                if self._is_closed:
                    raise DecoderClosed
                if is_active:
                    # A process that is killed in the midst of a message keeps the lock
                    # of those that come after it: the next try needs another pool.
                    await asyncio.to_thread(pool.stop)
                raise _Lost

    async def _sound_pool(self) -> ProcessPool:
        """
        Returns the pool; a new one if there is none yet, or if the last one broke.
        """
        async with self._renewal:
            if self._is_closed:
                raise DecoderClosed
            # pebble marks a pool as inactive when it gives up.
            if self._pool is not None and self._pool.active:
                return self._pool
            if self._pool is not None:
                await asyncio.to_thread(_end, self._pool)
            # Noted before it starts: close() ends it where this call is cancelled.
            self._pool = ProcessPool(
                self.processes,
                self._uploads_per_process,
                decoding.prepare,
                self._limits,
                decoding.Context(),
            )
            # The first look starts the processes, which takes a while.
            await asyncio.to_thread(getattr, self._pool, "active")
            return self._pool


def samples(target: Path) -> NDArray[np.float32]:
    """
    Returns the samples that `Decoder.decode` wrote to *target*: float32 (samples,),
    mono, 16 kHz, in ±1.
    """
    import numpy as np

    # Written as int16, half the size that the model takes.
    audio = np.fromfile(target, np.int16).astype(np.float32)
    audio /= 32768
    return audio


@contextmanager
def _gone_unless_successful(target: Path) -> Iterator[None]:
    target.touch()
    try:
        yield
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _end(pool: ProcessPool) -> None:
    # Joined afterwards, or pebble's threads would outlive it.
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join()
