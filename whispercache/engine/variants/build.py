"""
Builds of variants in the background, by a process of the lowest priority.

A thread would take the share of a core that the models could use, and the GIL now and
then. Beside work on all cores the process is felt all the same, for the second that it
takes: OpenMP's threads meet thousands of times a second, and one that sleeps meanwhile
has to get its core back (benchmarks/overlap.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.engine.sizes.header import read_header
from whispercache.errors import WhisperCacheError

from .convert import Origin
from .store import IN_USE_S, LOCK_S, MIN_SOURCE_BYTES, VariantRefused, Variants

if TYPE_CHECKING:
    from typing import NoReturn

_log = logging.getLogger("whispercache")

# Most seconds for one build, its wait for others included.
BUILD_S = 2 * LOCK_S

_REFUSED = 3
_LOWEST_PRIORITY = 19


class Builder:
    """
    Starts builds of variants, one after the other.
    """

    def __init__(self, variants: Variants) -> None:
        self.variants: Variants = variants
        self._lock = threading.Lock()
        # All that follows is guarded by _lock.
        self._tried: dict[tuple[Origin, str], float] = {}  # until when, at the least
        self._wanted: deque[tuple[Origin, str]] = deque()
        self._is_building = False

    def forked(self) -> None:
        """
        Forgets, in a forked child, what the parent builds.
        """
        self._lock = threading.Lock()
        self._wanted.clear()
        self._is_building = False

    def build_soon(self, source: Origin, kind: str) -> None:
        """
        Has a variant built, if it is worth it and was not tried before. Returns at
        once.

        The process that builds it goes on if this one ends. The outcome is logged.
        """
        if source.header.file_bytes < MIN_SOURCE_BYTES or not _has_python():
            return
        task = (source, kind)
        with self._lock:
            if time.monotonic() < self._tried.get(task, -math.inf):
                return
            self._tried[task] = math.inf
            self._wanted.append(task)
            if self._is_building:
                return
            self._is_building = True
        # A daemon: the interpreter does not wait for it when it ends.
        thread = threading.Thread(
            target=self._build_wanted, name="whispercache-variants", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # too many threads, or the interpreter ends
            _log.warning("no %s variant of %s: %s", kind, source.model, error)
            with self._lock:
                self._is_building = False
                self._wanted.clear()

    def _build_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._is_building = False
                    return
                source, kind = self._wanted.popleft()
            try:
                pause_s = self._build(source, kind)
            except (OSError, subprocess.SubprocessError) as error:
                _log.warning("no %s variant of %s: %s", kind, source.model, error)
                continue
            with self._lock:
                self._tried[source, kind] = time.monotonic() + pause_s

    def _build(self, source: Origin, kind: str) -> float:
        """
        Builds a variant; returns the seconds until it may be tried again.
        """
        if self.variants.is_rejected(source, kind):
            return math.inf
        started_s = time.monotonic()
        done = self._run(source, kind)
        if done.returncode == 0:
            took_s = time.monotonic() - started_s
            _log.info(
                "wrote the %s variant of %s in %.1f s", kind, source.model, took_s
            )
            return 0.0  # it may be wanted again once it has been removed
        is_refused = done.returncode == _REFUSED
        level = logging.INFO if is_refused else logging.WARNING
        told = done.stderr.strip().rpartition("\n")[2] or f"exit {done.returncode}"
        _log.log(level, "no %s variant of %s: %s", kind, source.model, told)
        return IN_USE_S if is_refused else math.inf

    def _run(self, source: Origin, kind: str) -> subprocess.CompletedProcess[str]:
        task = {
            "model": source.model,
            "path": str(source.header.path),
            "kind": kind,
            "engine": self.variants.engine,
            "limit_bytes": self.variants.limit_bytes,
            "directory": str(self.variants.directory),
        }
        # Others than texts may be in it, which the import system passes over; an empty
        # text is the current directory, from which others are counted.
        texts = [each for each in sys.path if isinstance(each, str) and each]
        paths = [str(Path(each).absolute()) for each in texts]
        # Python looks for modules in its current directory, too. There are none here.
        self.variants.directory.mkdir(parents=True, exist_ok=True)
        # In the session of its parent: Linux weighs sessions before it looks at
        # priorities, and one of its own got most of a core beside two busy threads
        # (6.18).
        return subprocess.run(  # noqa: S603 - this very Python
            [sys.executable, "-B", "-m", __name__, json.dumps(task)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=BUILD_S,
            cwd=self.variants.directory,
            env={
                **os.environ,
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(paths),
            },
        )


def run_task(text: str) -> NoReturn:
    """
    Builds what a `Builder` asked for, and ends this process.
    """
    import psutil

    # Ctrl-C is meant for the parent, in whose session this is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = json.loads(text)
    me = psutil.Process()
    # Some sandboxes have no such calls.
    with suppress(OSError, psutil.Error):
        me.nice(getattr(psutil, "IDLE_PRIORITY_CLASS", _LOWEST_PRIORITY))
    # Gives way at once, not at the end of its slice; on Linux only.
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        with suppress(OSError, psutil.Error):
            me.ionice(psutil.IOPRIO_CLASS_IDLE)
    directory = Path(task["directory"])
    variants = Variants(task["engine"], task["limit_bytes"], directory)
    try:
        source = Origin(task["model"], read_header(task["path"]))
        variants.build(source, task["kind"])
    except (WhisperCacheError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_REFUSED if isinstance(error, VariantRefused) else 1)
    sys.exit(0)


def _has_python() -> bool:
    # A frozen one, or one that has Python inside, would start itself once more.
    name = Path(sys.executable or "").name.lower()
    return not getattr(sys, "frozen", False) and name.startswith(("python", "pypy"))


if __name__ == "__main__":
    run_task(sys.argv[1])
