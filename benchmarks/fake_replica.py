"""
A replica whose models take time and no processor: the real cache, over a card that is
only counted.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import ray
from cluster_models import CARD_BYTES, GIB, SIZES, WORKSPACE_BYTES, load_s
from faster_whisper.transcribe import (
    Segment,
    TranscriptionInfo,
    TranscriptionOptions,
    VadOptions,
)

from whispercache.ray.engine import EngineReplica
from whispercache.testing import FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faster_whisper import WhisperModel

    from whispercache.engine.api import LoadedModel
    from whispercache.engine.files import ModelFiles
    from whispercache.keys import ModelKey
    from whispercache.options import CacheOptions
    from whispercache.server import ServerOptions

# A request with this prompt ends the process.
LETHAL = "die"

# One with this prompt and the path of a file ends once that file is there.
UNTIL = "until "

# A call is heard in as many segments.
SEGMENTS = 5


class TimedLoader(FakeLoader):
    """
    Models that take their time to load and to hear, one call at a time.
    """

    # The share of the time that a load really takes.
    pace = 1.0

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        time.sleep(load_s(key.model) * self.pace)
        loaded = super().load(key, files)
        whisper = TimedWhisper(SIZES[key.model][1])
        loaded.whisper = cast("WhisperModel", whisper)
        return loaded


class TimedWhisper:
    """
    Hears its own numbers.
    """

    def __init__(self, call_s: float) -> None:
        self._call_s = call_s

    def transcribe(
        self, audio: object, **asked: object
    ) -> tuple[Iterator[Segment], TranscriptionInfo]:
        del audio
        prompt = str(asked.get("initial_prompt"))
        if prompt == LETHAL:
            os._exit(1)
        nothing: Any = None
        options = cast("TranscriptionOptions", nothing)
        info = TranscriptionInfo(
            "en", 1.0, 10.0, 10.0, [], options, cast("VadOptions", nothing)
        )
        # The root is always there.
        path = prompt.removeprefix(UNTIL) if prompt.startswith(UNTIL) else "/"
        return self._speak(Path(path)), info

    def _speak(self, path: Path) -> Iterator[Segment]:
        for i in range(SEGMENTS):
            while i == SEGMENTS - 1 and not path.exists():
                time.sleep(0.02)
            with _CARD:
                time.sleep(self._call_s / SEGMENTS)
            yield Segment(
                i, 0, 2.0 * i, 2.0 * i + 2, f" word{i}", [], 0.0, 1.0, 0.0, [], 0.0
            )


# A card computes one thing at a time.
_CARD = threading.Lock()


class Counted(NamedTuple):
    """
    A replica: its name, process and node, its loads, the most bytes that were on its
    card, and what is there.
    """

    name: str
    pid: int
    node: str
    loads: int
    peak_bytes: int
    models: list[str]


class FakeReplica(EngineReplica):
    """
    A replica with a card of 6.5 GiB.
    """

    def __init__(self, options: ServerOptions, cache: CacheOptions) -> None:
        self.machine = self.new_machine()
        sizes = {name: int(gib * GIB) for name, (gib, _) in SIZES.items()}
        self.loader = TimedLoader(
            self.machine, sizes=sizes, workspace_bytes=WORKSPACE_BYTES
        )
        parts: CacheOptions = {"loader": self.loader, "probe": self.machine}
        super().__init__(options, {**cache, **parts})

    def new_machine(self) -> FakeMachine:
        """
        Its host and card.
        """
        return FakeMachine({"cpu": "64GiB", "cuda:0": CARD_BYTES})

    async def counted(self) -> Counted:
        """
        What it has done.
        """
        return Counted(
            self._name,
            os.getpid(),
            ray.get_runtime_context().get_node_id(),
            self._cache.stats().loads,
            self.machine.peak_bytes["cuda:0"],
            sorted(key.model for key in self.loader.resident),
        )
