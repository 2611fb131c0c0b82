"""
A program that other people wrote, and what tests of several of them share: stand-ins
for what they import and do not compute with here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "PLACE",
    "Hear",
    "Program",
    "without_pyannote",
    "without_torch",
    "without_torchaudio",
]

# A function of a clip's path and its language, if that is to be told.
Hear: TypeAlias = "Callable[[str, str | None], str]"

PLACE: Any = {"device": "cpu", "compute_type": "int8"}
# Before anything stands for it.
_HAS_TORCH = importlib.util.find_spec("torch") is not None


@dataclass(frozen=True)
class Program:
    """
    A program, or one way to use it.

    Attributes:
        build: Makes what hears with the model of a directory.
        distribution: What it is called in package indexes.
        needs_torch: True if it computes with torch.
        is_process: True if it has a process for itself: its command line, say.
        is_real: True if it asks of a model what a micro model has not.
        is_raw: True if it makes models of CTranslate2's own class.
        is_endless: True if it hears a clip again and again, until it is told to stop.
    """

    build: Callable[[str], Hear]
    distribution: str
    needs_torch: bool = False
    is_process: bool = False
    is_real: bool = False
    is_raw: bool = False
    is_endless: bool = False

    @property
    def missing(self) -> str | None:
        """
        What is not installed of it, in words.
        """
        try:
            importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.distribution} is not installed: see `make apps`"
        if self.needs_torch and not _HAS_TORCH:
            return f"{self.distribution} needs torch: see `make apps TORCH=1`"
        return None


def without_torch() -> None:
    """
    Stands for torch, of programs that only ask it for a card.
    """
    if not _HAS_TORCH:
        _stand_for("torch", cuda=types.SimpleNamespace(is_available=lambda: False))


def without_torchaudio() -> None:
    """
    Stands for torchaudio, whose builds need the torch of a card: of programs that only
    import it.
    """
    if importlib.util.find_spec("torchaudio") is None:
        _stand_for("torchaudio")


def without_pyannote() -> None:
    """
    Stands for pyannote.audio, gigabytes, of programs that hear without its voice
    detector and its speakers.
    """
    for name, members in {
        "pyannote.audio": ("Model", "Pipeline"),
        "pyannote.audio.core": (),
        "pyannote.audio.core.io": ("AudioFile",),
        "pyannote.audio.pipelines": ("VoiceActivityDetection",),
        "pyannote.audio.pipelines.utils": ("PipelineModel",),
    }.items():
        _stand_for(name, **{member: type(member, (), {}) for member in members})


def _stand_for(name: str, **members: object) -> None:
    # Once, so that what somebody has found in it stays the same.
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(module).update(members)
        sys.modules[name] = module
