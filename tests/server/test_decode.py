"""
Untrusted uploads are decoded in processes of their own, and harm nobody else.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from broken_audio import (
    BOMB_S,
    VALID,
    Broken,
    corpus,
    encoded,
    playlists,
    silence_bomb,
)
from pebble import ProcessFuture
from real import child, clip, decode_audio

from whispercache.server import decode, decoding
from whispercache.server.decode import (
    AudioRefused,
    AudioTooLong,
    DecodeCrashed,
    Decoder,
    DecoderClosed,
    DecodeTimeout,
    samples,
)
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

pytestmark = pytest.mark.process

MIB = 1024**2
CLIP = Path(clip("en-bread"))
CLIP_S = 2.94


def run(main: Coroutine[Any, Any, None]) -> None:
    """
    Run *main* to its end, which has to come.
    """
    asyncio.run(asyncio.wait_for(main, 120))


async def until(condition: Callable[[], object]) -> None:
    """
    Wait until *condition* holds.
    """
    await asyncio.to_thread(wait_until, condition)


def workers() -> set[int]:
    """
    The decoding processes of this one.
    """
    found = set()
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(
                process.cmdline()
            ):
                found.add(process.pid)
    return found


async def stuck(decoder: Decoder, directory: Path) -> asyncio.Task[float]:
    """
    An upload whose decoding has begun, and goes on when its FIFO is written to.
    """
    upload = directory / "fifo"
    os.mkfifo(upload)
    task = asyncio.create_task(decoder.decode(upload, directory / "stuck"))
    await until(lambda: any(future.running() for future in decoder._under_way))
    return task


@contextmanager
def listener() -> Iterator[tuple[str, socket.socket]]:
    """
    A port at which nobody should knock: its URL, and its socket.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/tone.ts", server


def has_knocked(server: socket.socket) -> bool:
    """
    Whether somebody connected.
    """
    try:
        connection, _ = server.accept()
    except BlockingIOError:
        return False
    connection.close()
    return True


def decode_here(upload: Path, target: Path, seconds: float = 60) -> decoding.Outcome:
    """
    What a decoding process would do, in this process.
    """
    target.touch()
    return decoding.decode(str(upload), str(target), int(seconds * 16_000))


async def outcome_of(decoder: Decoder, broken: Broken, target: Path) -> object:
    """
    What became of *broken*: its expectation and its seconds, when all is well.
    """
    try:
        seconds = await decoder.decode(broken.path, target)
    except AudioTooLong:
        return "too long", broken.seconds
    except AudioRefused as error:
        is_discreet = str(broken.path.parent) not in f"{error} {error.args}"
        return "refused" if is_discreet else f"tells paths: {error}", broken.seconds
    await asyncio.to_thread(target.unlink)
    is_about_that = seconds == pytest.approx(broken.seconds or seconds, abs=0.06)
    return "decodes", broken.seconds if is_about_that else seconds


def test_each_broken_upload_has_its_outcome_and_leaves_nothing(tmp_path: Path) -> None:
    """
    The corpus is decoded or refused as expected, by processes that all survive it.
    """
    uploads, target = tmp_path / "uploads", tmp_path / "samples"
    uploads.mkdir()
    victim = tmp_path / "tone.ts"
    victim.write_bytes(encoded("mpegts", "aac"))

    async def main(url: str) -> None:
        files = corpus(uploads, str(victim), url)
        async with Decoder(max_duration_s=60, timeout_s=20) as decoder:
            await until(lambda: len(workers()) == 2)
            await outcome_of(decoder, files[0], target)
            pids, before = workers(), psutil.Process().memory_info().rss
            begin_s = time.monotonic()
            for broken in files:
                outcome = await outcome_of(decoder, broken, target)
                assert outcome == (broken.expectation, broken.seconds), broken.name
                assert not target.exists()
            assert time.monotonic() - begin_s < 10
            assert psutil.Process().memory_info().rss - before < 16 * MIB
            assert workers() == pids

    with listener() as (url, server):
        run(main(url))
        assert not has_knocked(server)
    assert not workers()
    assert {path.name for path in tmp_path.iterdir()} == {"uploads", "tone.ts"}


def test_samples_are_those_of_faster_whisper(tmp_path: Path) -> None:
    """
    Every clip, decoded in a process and read back, is bit for bit what
    ``faster_whisper.decode_audio`` gives.
    """

    async def main() -> None:
        async with Decoder(processes=1) as decoder:
            for path in sorted(CLIP.parent.glob("*.flac")):
                seconds = await decoder.decode(path, tmp_path / "samples")
                heard, expected = samples(tmp_path / "samples"), decode_audio(str(path))
                assert heard.dtype == expected.dtype
                assert np.array_equal(heard, expected)
                assert seconds == len(expected) / 16_000

    run(main())


@pytest.mark.parametrize("name", VALID)
def test_resampled_audio_is_that_of_faster_whisper(tmp_path: Path, name: str) -> None:
    """
    Every kind of audio gives the very samples of ``decode_audio``.
    """
    container, codec, rate_hz = VALID[name]
    upload = tmp_path / name
    upload.write_bytes(encoded(container, codec, 3.0, rate_hz))
    outcome = decode_here(upload, tmp_path / "samples")
    expected = decode_audio(str(upload))
    assert outcome == decoding.Outcome(len(expected))
    assert np.array_equal(samples(tmp_path / "samples"), expected)


@pytest.mark.parametrize(
    ("without", "is_read"),
    [
        ((), False),
        (("format_whitelist",), False),
        (("format_whitelist", "_open_nothing"), False),
        (("format_whitelist", "protocol_whitelist"), False),
        (("format_whitelist", "protocol_whitelist", "_open_nothing"), True),
    ],
    ids=["all", "no-formats", "protocols", "opener", "none"],
)
def test_a_playlist_opens_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without: tuple[str, ...],
    is_read: bool,  # noqa: FBT001
) -> None:
    """
    Three barriers keep playlists from opening files and addresses; each alone is enough
    but for the last case, the control, where none is left and both are opened.
    """
    kept = {k: v for k, v in decoding._OPTIONS.items() if k not in without}
    kept.pop("codec_whitelist")
    monkeypatch.setattr(decoding, "_OPTIONS", kept)
    monkeypatch.setattr(decoding, "_NAME", "upload.m3u8")
    if "_open_nothing" in without:
        monkeypatch.setattr(decoding, "_open_nothing", None)
    victim = tmp_path / "tone.ts"
    victim.write_bytes(encoded("mpegts", "aac"))
    with listener() as (url, server):
        found = {
            broken.name: broken.path for broken in playlists(tmp_path, str(victim), url)
        }
        outcome = decode_here(found["hls-file.m3u8"], tmp_path / "samples")
        assert bool(outcome.n_samples) is is_read
        server.settimeout(5 if is_read else 0)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(
                decode_here, found["hls-url.m3u8"], tmp_path / "samples"
            )
            if not is_read:
                assert asked.result().refusal
            assert has_knocked(server) is is_read


def test_a_silence_bomb_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    """
    Of hours of silence in a small file, so much is decoded as is allowed.
    """
    upload, target = tmp_path / "bomb.flac", tmp_path / "samples"
    upload.write_bytes(silence_bomb(BOMB_S))
    assert upload.stat().st_size < MIB / 8
    outcome = decode_here(upload, target, 30)
    assert outcome.is_too_long
    assert target.stat().st_size <= 30 * 32_000
    upload.write_bytes(silence_bomb(600))
    assert decode_here(upload, target, 605).n_samples >= 600 * 16_000


def test_a_file_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    """
    A process that begins after its request has left writes nothing.
    """
    with pytest.raises(FileNotFoundError):
        decoding.decode(str(CLIP), str(tmp_path / "samples"), 1)
    assert not list(tmp_path.iterdir())


def test_a_decoding_that_stalls_is_ended(tmp_path: Path) -> None:
    """
    After its time-out an upload fails, its process is replaced, and others go on.
    """

    async def main() -> None:
        async with Decoder(processes=1, timeout_s=0.5) as decoder:
            pids = workers()
            with pytest.raises(DecodeTimeout, match=r"within 0\.5 s"):
                await (await stuck(decoder, tmp_path))
            assert not (tmp_path / "stuck").exists()
            decoder.timeout_s = 30
            assert await decoder.decode(CLIP, tmp_path / "samples") == CLIP_S
            assert not workers() & pids

    run(main())


def test_whoever_leaves_ends_the_work(tmp_path: Path) -> None:
    """
    A cancelled decoding loses its process and its file; one that waits for a process
    does no harm by leaving.
    """

    async def main() -> None:
        async with Decoder(processes=1) as decoder:
            pids = workers()
            task = await stuck(decoder, tmp_path)
            waiting = asyncio.create_task(decoder.decode(CLIP, tmp_path / "waiting"))
            await until((tmp_path / "waiting").exists)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert workers() == pids
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not workers() & pids)
            assert await decoder.decode(CLIP, tmp_path / "samples") == CLIP_S

    run(main())
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "samples"}


def test_a_crash_is_the_error_of_one_upload(tmp_path: Path) -> None:
    """
    When a process dies, its upload fails and the next is decoded.
    """

    async def main() -> None:
        async with Decoder(processes=1) as decoder:
            (pid,) = workers()
            task = await stuck(decoder, tmp_path)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DecodeCrashed, match="convert it"):
                await task
            assert await decoder.decode(CLIP, tmp_path / "samples") == CLIP_S

    run(main())


def test_the_death_of_an_idle_process_fails_nobody(tmp_path: Path) -> None:
    """
    The system may kill a process that has nothing to do.
    """

    async def main() -> None:
        async with Decoder(processes=1) as decoder:
            (pid,) = workers()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pid not in workers())
            assert await decoder.decode(CLIP, tmp_path / "samples") == CLIP_S

    run(main())


def test_an_upload_that_a_dying_pool_loses_is_decoded_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A pool that gives up in the moment of the hand-over settles nothing: pebble 5.2.
    """

    async def main() -> None:
        async with Decoder(processes=1) as decoder:
            pool = decoder._pool
            assert pool is not None

            def lose(*_args: object, **_kwargs: object) -> ProcessFuture[Any]:
                pool.stop()  # type: ignore[no-untyped-call]
                return ProcessFuture()

            monkeypatch.setattr(pool, "schedule", lose)
            assert await decoder.decode(CLIP, tmp_path / "samples") == CLIP_S
            assert decoder._pool is not pool

    run(main())


def test_an_upload_that_no_process_begins_is_handed_to_another_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As where a process was killed in the midst of a message, and keeps its lock.
    """

    async def main() -> None:
        async with Decoder(processes=1) as decoder:
            monkeypatch.setattr(decode, "_BEGIN_TIMEOUT_S", 0.1)
            pool = decoder._pool
            assert pool is not None
            stop = pool.stop

            def stopped() -> None:
                monkeypatch.setattr(decode, "_BEGIN_TIMEOUT_S", 60.0)
                stop()  # type: ignore[no-untyped-call]

            monkeypatch.setattr(pool, "stop", stopped)
            monkeypatch.setattr(pool, "schedule", lambda *_, **__: ProcessFuture())
            assert await decoder.decode(CLIP, tmp_path / "samples") == CLIP_S
            assert decoder._pool is not pool

    run(main())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_upload_outlives_a_shutdown_signal_to_all_processes(
    tmp_path: Path, name: str
) -> None:
    """
    A process that was told to end, as service managers and terminals that are closed
    do, has its upload repeated.
    """
    told = getattr(signal, name, signal.SIGTERM)

    async def main() -> None:
        async with Decoder(processes=1) as decoder:
            (pid,) = workers()
            task = await stuck(decoder, tmp_path)
            os.kill(pid, told)
            await until(lambda: pid not in workers())
            content = encoded("wav", "pcm_s16le")
            await asyncio.to_thread((tmp_path / "fifo").write_bytes, content)
            assert await task == 1.0

    run(main())


def test_closing_ends_all_that_runs_or_waits(tmp_path: Path) -> None:
    """
    After close() there is no process, thread or file, and everybody has been told.
    """
    threads = set(threading.enumerate())

    async def main() -> None:
        decoder = Decoder(processes=1)
        await decoder.start()
        running = await stuck(decoder, tmp_path)
        waiting = asyncio.create_task(decoder.decode(CLIP, tmp_path / "waiting"))
        await until((tmp_path / "waiting").exists)
        await decoder.close()
        for task in (running, waiting):
            with pytest.raises(DecoderClosed):
                await task
        with pytest.raises(DecoderClosed):
            await decoder.decode(CLIP, tmp_path / "samples")
        with pytest.raises(DecoderClosed):
            await decoder.start()
        await decoder.close()

    run(main())
    assert not workers()
    assert set(threading.enumerate()) <= threads
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_processes_are_replaced_after_so_many_uploads(tmp_path: Path) -> None:
    """
    What uploads leave behind in a process ends with it.
    """

    async def main() -> None:
        async with Decoder(processes=1, uploads_per_process=2) as decoder:
            pids = workers()
            for _ in range(3):
                assert await decoder.decode(CLIP, tmp_path / "samples") == CLIP_S
            assert not workers() & pids

    run(main())


PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
import psutil
from whispercache.server.decode import Decoder

async def main():
    folder = Path(sys.argv[2])
    os.mkfifo(folder / "fifo")
    async with Decoder(processes=2) as decoder:
        seconds = await decoder.decode(Path(sys.argv[1]), folder / "samples")
        stuck = asyncio.create_task(decoder.decode(folder / "fifo", folder / "stuck"))
        while not any(future.running() for future in decoder._under_way):
            await asyncio.sleep(0.01)
        print(seconds, *(child.pid for child in psutil.Process().children()))
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """
    Nothing stays when the server is killed, not even what is busy with an upload.
    """
    killed = child(f"{PROGRAM}\nasyncio.run(main())", CLIP, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    seconds, *pids = killed.stdout.split()
    assert float(seconds) == CLIP_S
    assert len(pids) == 3  # and multiprocessing's tracker of semaphores
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids))


def test_processes_that_still_start_end_without_a_word() -> None:
    """
    The first that is up is waited for; the others find that their pool has gone.
    """
    ended = child(
        "import asyncio\n"
        "from whispercache.server.decode import Decoder\n"
        "async def main():\n"
        "    for _ in range(4):\n"
        "        async with Decoder(processes=4):\n"
        "            pass\n"
        "asyncio.run(main())\n"
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_program_without_a_guard_is_told_so(tmp_path: Path) -> None:
    """
    Processes that would run the program again do not start, and the error says why; a
    program with a guard works.
    """
    program = tmp_path / "program.py"
    program.write_text(f"{PROGRAM}\nasyncio.run(main())\n")
    run_it = "import runpy, sys; del sys.argv[0]; import subprocess; "
    run_it += "sys.exit(subprocess.run([sys.executable, *sys.argv]).returncode)"
    failed = child(run_it, program, CLIP, tmp_path)
    assert "no process for decoding starts" in failed.stderr
    (tmp_path / "fifo").unlink()
    guarded = PROGRAM.replace("os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)")
    program.write_text(f"{guarded}\nif __name__ == '__main__':\n asyncio.run(main())\n")
    assert child(run_it, program, CLIP, tmp_path).stdout.startswith(str(CLIP_S))


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_a_process_limits_itself() -> None:
    """
    It can take no more memory, write no longer file and leave no core.
    """
    limited = child(
        "import resource, tempfile\n"
        "from whispercache.server.decoding import prepare\n"
        "MIB = 1024**2\n"
        "prepare(64 * MIB, MIB)\n"
        "try:\n    bytearray(512 * MIB)\n"
        "except MemoryError:\n    print('memory')\n"
        "with tempfile.TemporaryFile(buffering=0) as file:\n"
        "    print(file.write(bytes(MIB)) == MIB)\n"
        "    try:\n        file.write(b'1')\n"
        "    except OSError:\n        print('file')\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE))\n"
    )
    assert limited.stdout.split("\n") == ["memory", "True", "file", "(0, 0)", ""]


@pytest.mark.parametrize(
    "error",
    [
        AudioRefused("upload", "it is broken"),
        AudioTooLong(60.0),
        DecodeTimeout(5.0),
        DecodeCrashed(),
        DecoderClosed(),
    ],
)
def test_errors_travel_between_processes(error: Exception) -> None:
    """
    A pickled error says the same afterwards.
    """
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


@pytest.mark.parametrize(
    "options",
    [
        {"processes": 0},
        {"max_duration_s": 0},
        {"timeout_s": -1},
        {"memory_bytes": 0},
        {"uploads_per_process": 0},
    ],
)
def test_limits_are_above_zero(options: dict[str, Any]) -> None:
    """
    A limit that lets nothing through is a mistake.
    """
    with pytest.raises(ValueError, match=r"above zero|at least 1"):
        Decoder(**options)
