"""
The command ``whispercache reserve``: a program of others, with room on a device that
whispercache's processes make and leave.

The program takes the place of this process. A process of its own, which the program
does not know, keeps the room in the ledger for as long as the program runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from whispercache.console import error_line, explain
from whispercache.errors import WhisperCacheError
from whispercache.keys import canonical_device
from whispercache.settings.arguments import add_config, add_settings, settings_of
from whispercache.units import parse_bytes, parse_duration

from .programs import become, program_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from whispercache.peers.reserve import Reservation

_HELP = """\
examples:
  whispercache reserve 6GiB -- python train.py
  whispercache reserve 12GiB --device cuda:1 --timeout 10m -- ./render.sh

Processes of whispercache with --coordinate (or coordinate=True) evict idle models until
there is room, and then leave it: what PROGRAM does not hold yet, or gives back, stays
free for it until it ends. Models that are in use leave when their work is done; pinned
ones stay. The exit code is PROGRAM's, or 125 if there was no room.
"""

NO_ROOM = 125
"""
Exit code of tools that run others, for their own failure. Source: env, timeout and
docker run use it.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds the command's parameters to *parser*.
    """
    parser.description = "Run a program with room on a device that is kept for it."
    parser.usage = "whispercache reserve SIZE [OPTIONS] [--] PROGRAM [ARGUMENT ...]"
    explain(parser, _HELP)
    parser.add_argument("size", metavar="SIZE", help="memory needed: 6GiB, 800MiB")
    _add_rest(parser)
    # Options may come after the size, too, where argparse takes them for the program.
    rest = type(parser)(prog=parser.prog, usage=parser.usage, add_help=False)
    _add_rest(rest)
    parser.set_defaults(run=run, rest=rest)


def _add_rest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    # The rest of the line, whatever it looks like.
    add("command", nargs="...", metavar="PROGRAM", help="with its arguments")
    add(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)",
    )
    add(
        "--timeout",
        default="60s",
        metavar="TIME",
        help="for the room to be made; 0 does not wait (default: %(default)s)",
    )
    add_config(add)
    add_settings(add, "coordinate_dir")


def run(options: argparse.Namespace) -> int:
    """
    Makes room and becomes the program. Returns only if there is none, if the program
    does not start, or on Windows.
    """
    if options.command[:1] != ["--"]:
        options.rest.parse_args(options.command, options)
    program = program_of(options, "reserve")
    n_bytes = parse_bytes(options.size, "SIZE")
    timeout_s = parse_duration(options.timeout, "--timeout")
    device = canonical_device(options.device)
    place = _place(settings_of(options)["coordinate_dir"].value)
    started: Callable[[_Asked], None] = (
        _with_keeper if hasattr(os, "fork") else _with_thread
    )
    try:
        started(_Asked(n_bytes, device, timeout_s, place))
    except WhisperCacheError as error:
        sys.stderr.write(f"{error_line(error)}\n")
        return NO_ROOM
    return become(program, os.environ)


def _place(given: object) -> Path:
    from whispercache.peers.places import default_directory, given_directory

    return default_directory() if given is None else given_directory(str(given))


class _Asked:
    """
    What was asked for, and the process that it is for: this one.
    """

    def __init__(
        self, n_bytes: int, device: str, timeout_s: float, place: Path
    ) -> None:
        self.n_bytes = n_bytes
        self.timeout_s = timeout_s
        self._device = device
        self._place = place
        self._pid = os.getpid()

    def reservation(self) -> Reservation:
        """
        Returns the reservation, of which nothing is made yet.
        """
        from whispercache.devices.probe import SystemProbe
        from whispercache.peers.ledger import Ledger
        from whispercache.peers.reserve import Reservation

        probe = SystemProbe()
        device = self._device
        if device in ("auto", "cuda"):
            cards = probe.cuda_devices()
            device = cards[0] if cards else "cpu" if device == "auto" else "cuda:0"
        ledger = Ledger(self._place, probe.device_id(device), pid=self._pid)
        return Reservation(
            self.n_bytes,
            device,
            ledger=ledger,
            probe=probe,
            held_bytes=lambda: probe.process_bytes(device, _family(self._pid)),
        )


def _family(pid: int) -> set[int]:
    """
    Returns a process and all that descend from it.
    """
    import psutil

    with suppress(psutil.Error):
        return {
            pid,
            *(each.pid for each in psutil.Process(pid).children(recursive=True)),
        }
    return {pid}


def _say(line: str) -> None:
    sys.stderr.write(f"whispercache: {line}\n")
    sys.stderr.flush()


# A process beside the program ---------------------------------------------------------


def _with_keeper(asked: _Asked) -> None:
    """
    Starts the process that makes the room and keeps it. Blocks until it is made.

    Raises:
        WhisperCacheError: It cannot be made.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        # Twice, so that it is no child of the program's, which knows nothing of it.
        if os.fork():
            os._exit(0)
        _keep(asked, writer)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, encoding="utf-8") as lines:  # noqa: PTH123 - a pipe
        for line in lines:
            kind, text = json.loads(line)
            if kind == "made":
                return
            if kind == "failed":
                raise WhisperCacheError(text)
            _say(text)
    raise WhisperCacheError("the process that was to keep the room has ended")


def _keep(asked: _Asked, writer: int) -> None:
    """
    Makes the room and keeps it, as a process of its own, which ends here.
    """
    code = 1
    try:
        # Neither the terminal's signals are for it, nor the program's pipes: who reads
        # from those waits until all who have them are gone.
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.dup2(writer, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open(3, "w", encoding="utf-8") as lines:

            def tell(kind: str, text: str = "") -> None:
                lines.write(f"{json.dumps([kind, text])}\n")
                lines.flush()

            try:
                reservation = asked.reservation()
                reservation.make(asked.timeout_s, lambda text: tell("say", text))
                tell("made")
            except (OSError, ValueError, WhisperCacheError) as error:
                tell("failed", str(error))
                raise
        reservation.keep()
        code = 0
    finally:
        # Past what the process that it was forked from would do at its end.
        os._exit(code)


# A thread of this process, where there is no fork -------------------------------------


def _with_thread(asked: _Asked) -> None:
    """
    Makes the room, and keeps it on a thread for as long as this process waits for the
    program. Raises as `_with_keeper` does.
    """
    reservation = asked.reservation()
    reservation.make(asked.timeout_s, _say)
    threading.Thread(
        target=reservation.keep,
        name="whispercache-reserve",
        daemon=True,
    ).start()
