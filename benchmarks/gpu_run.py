"""
How `gpu.py` runs its parts: each in a process of its own, which prints records.
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
from typing import TYPE_CHECKING

from gpu_records import revive

from whispercache.engine.sizes.architecture import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gpu_records import Record

__all__ = ["SIZES", "Child", "Outcome", "Setup", "spawn"]

SIZES = ("tiny", "base", "small", "medium", "large-v3-turbo", "large-v3")
"""
Models, the smallest first.
"""

PROGRAM = Path(__file__).with_name("gpu.py")

_TOLD_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Setup:
    """
    What all parts go by.

    Attributes:
        home: Directory for whispercache's caches, and those of other users.
        models: Directory with a model for each size.
        sizes: Which of `SIZES` there are, in that order.
        device: The card.
        pretends: There is none; everything is made up.
        batch: Windows in a batch.
        cycles: Loads and unloads in a row.
        rounds: How often a way into the card is taken.
        full_bytes: What is left of a card that counts as full: less than one window of
            the smallest model takes.
        beside: The device that exits are compared with; empty for none.
        switches: In one process; the first to each model does not count.
        turns: Most processes of each contender.
        answers: How often each of two cards answers beside the other.
        crossing_bytes: What is copied to learn the rates.
        nobody: Another user, without privileges; None if this one is none either.
        kernels: Where CUDA keeps the kernels that it has compiled.
    """

    home: str
    models: str
    sizes: tuple[str, ...] = SIZES
    device: str = "cuda:0"
    pretends: bool = False
    batch: int = 8
    cycles: int = 100
    rounds: int = 2
    full_bytes: int = 16 << 20
    beside: str = "cpu"
    switches: int = 6
    turns: int = 2
    answers: int = 20
    crossing_bytes: int = 1 << 30
    nobody: int | None = None
    kernels: str = ""

    @classmethod
    def of(cls, text: str) -> Setup:
        """
        The setup that `dump` wrote.
        """
        found = json.loads(text)
        return cls(**{**found, "sizes": tuple(found["sizes"])})

    def dump(self) -> str:
        """
        The setup in a line.
        """
        return json.dumps(asdict(self))

    def model(self, size: str) -> Path:
        """
        Where the model of a size is.
        """
        return Path(self.models, size)

    def nearest(self, size: str) -> str:
        """
        *size*, or the one of ours that comes closest.
        """
        place = SIZES.index(size)
        return min(self.sizes, key=lambda each: abs(SIZES.index(each) - place))


assert set(SIZES) <= set(ARCHITECTURES)


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What came of a process.

    Attributes:
        records: What it printed, up to its end.
        error: What went wrong, in one line; empty if nothing.
        started_s: When it began; of the system's monotonic clock.
        ended_s: When it was over.
        code: Its exit code.
    """

    records: tuple[Record, ...]
    error: str
    started_s: float
    ended_s: float
    code: int


class Child:
    """
    A process of ours that runs.

    Args:
        role: What it does; one of `gpu.ROLES`.
        setup: What it goes by.
        argument: For the role.
        user: Whom it belongs to, and the group of the same number; this process's if
            None.
        leads: Whether what it starts itself ends with it, if it has to be ended.
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

    def records(self) -> Iterator[Record]:
        """
        What it prints, as it comes.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (record := revive(line)) is not None:
                yield record

    def go_on(self) -> None:
        """
        Write it a line.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """
        End it, if it still runs; the end of what it said on the way.
        """
        self._kill()
        return self._process.communicate()[1][-_TOLD_CHARACTERS:].strip()

    def outcome(self, timeout_s: float | None = None) -> Outcome:
        """
        What comes of it, within so many seconds.
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
            last = said.strip().splitlines()[-1:] or ["without a word"]
            problem = f"it ended with {_name_of(code)}: {last[0][-_TOLD_CHARACTERS:]}"
        found = map(revive, output.splitlines())
        records = tuple(record for record in found if record is not None)
        return Outcome(records, problem, self.started_s, time.monotonic(), code)

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
    """
    Have a process play a role, to its end.
    """
    return Child(role, setup, argument, leads=leads).outcome(timeout_s)


def _name_of(code: int) -> str:
    if code >= 0:
        return str(code)
    return signal.Signals(-code).name
