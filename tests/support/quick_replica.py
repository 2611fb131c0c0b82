"""
Replicas of fakes for tests: their models load in a moment.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

from cluster_models import CARD_BYTES
from fake_replica import FakeReplica
from psutil import pid_exists

from whispercache.ray import application
from whispercache.testing import FakeMachine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ray.serve import Application

    from whispercache.options import CacheOptions
    from whispercache.server import ServerOptions

__all__ = ["Card", "QuickReplica", "SharingReplica", "build"]


class QuickReplica(FakeReplica):
    """
    A replica whose loads take a tenth of the usual time.
    """

    def __init__(self, options: ServerOptions, cache: CacheOptions) -> None:
        super().__init__(options, cache)
        self.loader.pace = 0.1


class Card(NamedTuple):
    """
    A card as a process sees it: the process, what Ray says that the card is, the bytes
    that the process holds there and all do, and how often there were too few.
    """

    pid: int
    visible: str | None
    held_bytes: int
    used_bytes: int
    refused: int


class SharingReplica(QuickReplica):
    """
    A replica whose card has other processes on it.
    """

    machine: SharedMachine

    def new_machine(self) -> FakeMachine:
        """
        The card that Ray gave it, with all others that it was given to.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        folder = Path(tempfile.gettempdir(), "shared-card", f"{visible}")
        return SharedMachine({"cpu": "64GiB", "cuda:0": CARD_BYTES}, folder)

    async def card(self) -> Card:
        """
        Its card.
        """
        return Card(
            os.getpid(),
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            self.machine.held_bytes["cuda:0"],
            self.machine.used_bytes("cuda:0"),
            self.machine.refused,
        )


class SharedMachine(FakeMachine):
    """
    A card that several processes are on: what each holds of it is in a file.
    """

    def __init__(self, devices: Mapping[str, int | str], folder: Path) -> None:
        super().__init__(devices)
        self.refused = 0
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def free_bytes(self, device: str) -> int:
        """
        What no process holds.
        """
        free_bytes = super().free_bytes(device)
        return free_bytes - self._elsewhere() if device != "cpu" else free_bytes

    def take(self, device: str, n_bytes: int) -> None:
        """
        Allocates memory, unless all processes together hold too much.
        """
        with self._alone():
            try:
                super().take(device, n_bytes)
            except RuntimeError:
                self.refused += 1
                raise

    def give_back(self, device: str, n_bytes: int) -> None:
        """
        Frees memory that was allocated.
        """
        with self._alone():
            super().give_back(device, n_bytes)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
            fresh = self._folder / f"{os.getpid()}.fresh"
            fresh.write_text(str(self.held_bytes["cuda:0"]))
            fresh.replace(self._folder / f"{os.getpid()}.held")

    def _elsewhere(self) -> int:
        pids = {int(each.stem): each for each in self._folder.glob("*.held")}
        return sum(
            int(path.read_text())
            for pid, path in pids.items()
            if pid != os.getpid() and pid_exists(pid)
        )


def build(args: Mapping[str, str]) -> Application:
    """
    What ``whispercache.ray:build`` does, with replicas of fakes.
    """
    bound = partial(application.bound, kind=SharingReplica)
    with patch.object(application, "bound", bound):
        return application.build(args)
