"""
whispercache reserve: a program as it is, with room that is kept while it runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from real import SILENCE, child_environment, micro, model_of

from whispercache import EvictionCause, ModelCache, ModelEvicted
from whispercache.cli import reserve
from whispercache.cli.main import main
from whispercache.devices.memory import headroom_bytes
from whispercache.devices.probe import SystemProbe
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from whispercache import Event

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()"),
]
MIB = 1024**2


def line(place: Path, *arguments: str) -> list[str]:
    """
    The command, on the host's memory, with the ledgers in *place*.
    """
    common = ["--device", "cpu", "--coordinate-dir", str(place)]
    return [sys.executable, "-m", "whispercache", "reserve", *common, *arguments]


def run(
    place: Path, *arguments: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    """
    The command, to its end.
    """
    return subprocess.run(
        line(place, *arguments),
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def accounts(place: Path) -> dict[int, dict[str, int]]:
    """
    What stands in the ledger, by process.
    """
    files = (place / "cpu").glob("*.json") if (place / "cpu").exists() else ()
    return {int(f.name.split("-")[0]): json.loads(f.read_text()) for f in files}


def most() -> str:
    """
    All that a machine without other programs could give; some run here.
    """
    total_bytes = SystemProbe().read("cpu").total_bytes
    return f"{(total_bytes - headroom_bytes('cpu', total_bytes)) // MIB - 1}MiB"


def test_the_program_is_the_process_that_was_started(tmp_path: Path) -> None:
    """
    With its exit code, its streams, and no child that it did not start. Its account is
    in its name, and gone when it has ended.
    """
    code = 'read word; echo "$word $$"; echo oops >&2; read word; exit 7'
    process = subprocess.Popen(
        line(tmp_path, "100MiB", "--", "sh", "-c", code),
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hello\n")
        assert process.stdout.readline() == f"hello {process.pid}\n"
        assert 0 < accounts(tmp_path)[process.pid]["promised_bytes"] <= 100 * MIB
        assert not psutil.Process(process.pid).children()
        out, err = process.communicate("go on\n", timeout=60)
    assert (process.returncode, out) == (7, "")
    assert err.endswith("oops\n")
    wait_until(lambda: not accounts(tmp_path), "the account is gone")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_signals_are_the_program_s_own(tmp_path: Path, name: str) -> None:
    """
    Ctrl-C as well, which Python would have turned into an error.
    """
    number = getattr(signal, name)
    process = subprocess.Popen(
        line(tmp_path, "10MiB", "sleep", "60"), env=child_environment()
    )
    wait_until(lambda: psutil.Process(process.pid).name() == "sleep", "it runs")
    process.send_signal(number)
    assert process.wait(30) == -number
    wait_until(lambda: not accounts(tmp_path), "the account is gone")


def test_what_the_program_holds_is_promised_no_more(tmp_path: Path) -> None:
    """
    Its children's too; and when they give it back, it is.
    """
    program = """
import subprocess, sys
child = "import sys; kept = b'x' * (60 << 20); print(flush=True); sys.stdin.read()"
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
process = subprocess.Popen([sys.executable, "-c", child], **pipes)
process.stdout.readline()
sys.stdin.readline()
process.communicate()
sys.stdin.readline()
"""
    process = subprocess.Popen(
        line(tmp_path, "200MiB", "--", sys.executable, "-c", program),
        env=child_environment(),
        stdin=subprocess.PIPE,
        text=True,
        bufsize=1,
    )

    def promised(more: int) -> bool:
        found = accounts(tmp_path).get(process.pid, {"promised_bytes": 0})
        return found["promised_bytes"] > more * MIB

    with process:
        assert process.stdin is not None
        wait_until(lambda: promised(150), "the promise is made")
        wait_until(lambda: not promised(150), "the child holds a part")
        process.stdin.write("go on\n")
        wait_until(lambda: promised(150), "the child has ended")
        process.communicate("go on\n", timeout=60)
    assert process.returncode == 0


def test_caches_of_other_processes_make_room_or_it_says_why_not(tmp_path: Path) -> None:
    """
    Idle models leave, though they are too few here; the program is not run.
    """
    told: list[Event] = []
    with ModelCache(coordinate_dir=tmp_path) as cache:
        cache.subscribe(told.append)
        model_of(cache, micro("micro a")).transcribe(SILENCE)[0].close()
        done = run(tmp_path, most(), "--timeout", "2s", "--", "echo", "never")
        assert done.returncode == reserve.NO_ROOM
        assert not done.stdout
        first, last = done.stderr.splitlines()
        assert first.startswith("whispercache: waiting for ")
        assert "1 process holds" in first
        assert "there was no room for" in last
        [evicted] = [each for each in told if isinstance(each, ModelEvicted)]
        assert evicted.cause is EvictionCause.PRESSURE
        wait_until(
            lambda: len(accounts(tmp_path)) == 1, "nothing is asked for any more"
        )


def test_who_gives_up_waiting_takes_his_wish_back(tmp_path: Path) -> None:
    """
    Nobody evicts anything for a command that was interrupted.
    """
    process = subprocess.Popen(
        line(tmp_path, most(), "--timeout", "10m", "--", "echo", "never"),
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        assert "waiting for" in process.stderr.readline()
        assert accounts(tmp_path)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    wait_until(lambda: not accounts(tmp_path), "the wish is gone")


def test_nonsense_is_told_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    In a line, with the exit code of wrong use; of programs, that of a shell.
    """
    for arguments, told in (
        *(([size, "true"], "SIZE must be bytes") for size in ("50%", "abc", "5")),
        (["1GiB"], "name the program to run"),
        (["1GiB", "--"], "name the program to run"),
        (["1GiB", "--timeout", "soon", "true"], "--timeout"),
        (["1GiB", "--device", "gpu7", "true"], "gpu7"),
        (["1GiB", "--coordinate-dir", "here", "true"], "absolute path"),
    ):
        assert main(["reserve", *arguments]) == 2
        assert told in capsys.readouterr().err
    assert run(tmp_path, "1MiB", "no-such-program").returncode == 127
    assert run(tmp_path, "9000GiB", "true").returncode == 125


def test_where_there_is_no_fork_a_thread_keeps_the_room(tmp_path: Path) -> None:
    """
    In this process, until it ends.
    """
    asked = reserve._Asked(100 * MIB, "cpu", 0, tmp_path)
    reserve._with_thread(asked)
    assert list(accounts(tmp_path)) == [os.getpid()]
    [thread] = [t for t in threading.enumerate() if t.name == "whispercache-reserve"]
    assert thread.daemon
