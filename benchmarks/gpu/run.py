"""
Parts of the GPU benchmark run in processes of their own, which print rows.

A crash, a leak or a broken CUDA context ends one part and no other. A process prints
each row as a line of JSON as soon as it is measured, so that one which is killed keeps
what it had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# Models, the smallest first.
SIZES = ("tiny", "base", "small", "medium", "large-v3-turbo", "large-v3")

PROGRAM = Path(__file__).parent
_SHOWN_CHARACTERS = 300

# Rows ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """
    A row of a table of the report, by the heads of its columns.

    An int is bytes, a float is seconds, a bool a verdict, and None what nothing could
    tell. Counts are text. Rows of the table `ASIDE` are messages between processes.
    """

    table: str
    cells: dict[str, Any]


Rows: TypeAlias = "Iterator[Row]"

ASIDE = ""


def revive(line: str) -> Row | None:
    """
    Returns the row in a line; None where libraries printed it, or it was cut off.
    """
    try:
        table, cells = json.loads(line)
    except (ValueError, TypeError):
        return None
    return Row(table, cells) if isinstance(cells, dict) else None


def cells_of(rows: Iterable[Row], table: str) -> list[dict[str, Any]]:
    return [row.cells for row in rows if row.table == table]


# Processes ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    home: str  # directory for caches
    models: str  # directory with a model for each size
    sizes: tuple[str, ...] = SIZES
    device: str = "cuda:0"
    pretends: bool = False
    batch: int = 8  # windows
    cycles: int = 100
    rounds: int = 2  # of each way into the card
    # Left of a full card: less than what a window of the smallest model takes.
    full_bytes: int = 16 << 20
    beside: str = "cpu"  # device that exits are compared with, or ""
    switches: int = 6  # in a process; the first to each model does not count
    turns: int = 2  # most processes of a contender
    answers: int = 20  # of each of two cards beside the other
    crossing_bytes: int = 1 << 30
    nobody: int | None = None  # a user without privileges, where this one has some
    kernels: str = ""  # where CUDA keeps what it has compiled

    @classmethod
    def of(cls, text: str) -> Setup:
        found = json.loads(text)
        return cls(**{**found, "sizes": tuple(found["sizes"])})

    def dump(self) -> str:
        return json.dumps(asdict(self))

    def model(self, size: str) -> Path:
        return Path(self.models, size)

    def nearest(self, size: str) -> str:
        """
        Returns *size*, or the closest one that there is.
        """
        place = SIZES.index(size)
        return min(self.sizes, key=lambda each: abs(SIZES.index(each) - place))


class Outcome(NamedTuple):
    """
    The outcome of a process. Its times are of the system's monotonic clock.
    """

    rows: tuple[Row, ...]
    error: str  # in one line
    started_s: float
    ended_s: float
    code: int


class Child:
    """
    A running process of the benchmark.

    Args:
        role: One of `gpu.command.ROLES`.
        setup: The settings.
        argument: For the role.
        user: User and group number to run as; this process's if None.
        leads: Whether its own children are ended with it.
        environment: More variables.
    """

    def __init__(
        self,
        role: str,
        setup: Setup,
        argument: str = "",
        *,
        user: int | None = None,
        leads: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._leads = leads
        self.started_s = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--role", role, setup.dump(), argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            start_new_session=leads,
            env={**os.environ, **environment},
        )
        self.pid = self._process.pid

    def rows(self) -> Rows:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (row := revive(line)) is not None:
                yield row

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """
        Ends it, if it still runs, and returns the end of its standard error.
        """
        self._kill()
        return self._process.communicate()[1][-_SHOWN_CHARACTERS:].strip()

    def outcome(self, timeout_s: float | None = None) -> Outcome:
        """
        Waits for its end, or brings that about when the time is over.
        """
        problem = ""
        try:
            output, said = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            problem = f"it did not end within {timeout_s:.0f} s"
            self._kill()
            output, said = self._process.communicate()
        except BaseException:
            self._kill()
            raise
        code = self._process.returncode
        if code and not problem:
            name = signal.Signals(-code).name if code < 0 else str(code)
            last = said.strip().splitlines()[-1:] or ["without a word"]
            problem = f"it ended with {name}: {last[0][-_SHOWN_CHARACTERS:]}"
        found = map(revive, output.splitlines())
        rows = tuple(row for row in found if row is not None)
        return Outcome(rows, problem, self.started_s, time.monotonic(), code)

    def _kill(self) -> None:
        if self._process.poll() is None:
            if self._leads:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self._process.kill()


def spawn(
    role: str,
    setup: Setup,
    argument: str = "",
    *,
    timeout_s: float | None = None,
    leads: bool = False,
) -> Outcome:
    return Child(role, setup, argument, leads=leads).outcome(timeout_s)
