"""
CTranslate2's side of CUDA on a machine without a card, over the fake drivers.

For child processes: `install` changes the module ``ctranslate2`` for good. Models on a
card are run by the real CTranslate2 on the CPU, from the same files; what they would
take of the card is written where the fake drivers look.
"""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ctranslate2

from .card import OUT_OF_MEMORY, CardBooks, CardMemory, visible_cards
from .conduct import (
    CALLS,
    ILLEGAL_ACCESS,
    NO_CUBLAS,
    NOT_SUPPORTED,
    Conduct,
    behave,
    behaviour,
    break_next_call,
    note,
    starve_next_load,
)
from .whisper import CardWhisper, RealWhisper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fakes import FakeGpus

__all__ = [
    "CALLS",
    "ILLEGAL_ACCESS",
    "NOT_SUPPORTED",
    "NO_CUBLAS",
    "OUT_OF_MEMORY",
    "CardBooks",
    "CardMemory",
    "CardWhisper",
    "Conduct",
    "behave",
    "books",
    "break_next_call",
    "install",
    "note",
    "run_on_cards",
    "starve_next_load",
]

_SUPPORT = Path(__file__).resolve().parents[1]

_PROLOGUE = """
import os
import standin
standin.install(**json.loads(os.environ["STANDIN"]))
"""

_real_types = ctranslate2.get_supported_compute_types


def install(**conduct: Any) -> None:
    """
    Let CTranslate2 see the cards of the fake drivers; with the fields of `Conduct`.
    """
    behave(**conduct)
    ctranslate2.get_cuda_device_count = _count
    ctranslate2.get_supported_compute_types = _types
    ctranslate2.models.Whisper = _whisper


def books(ordinal: int = 0) -> CardBooks:
    """
    What this process holds of a card, by CUDA's number.
    """
    return CardMemory(visible_cards()[ordinal]).books()


def run_on_cards(
    gpus: FakeGpus,
    code: str,
    *,
    conduct: Mapping[str, object] = MappingProxyType({}),
    without: tuple[str, ...] = (),
    **environment: str,
) -> object:
    """
    What *code* left in ``answer``, run in a child with this installed.

    It finds what `FakeGpus.answer` gives it, and the modules ``standin`` and ``os``.

    Args:
        gpus: The machine. Its cards are set already.
        code: To run.
        conduct: Fields of `Conduct`.
        without: Libraries that are missing: ``"cuda"``, ``"nvml"``, ``"cublas"``.
        environment: Variables for the child, such as paths of models.
    """
    paths = [str(_SUPPORT.parents[1]), str(_SUPPORT), os.environ.get("PYTHONPATH", "")]
    child = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "STANDIN": json.dumps(dict(conduct)),
        # Threads that spin while they wait take the others' time on a busy machine.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # What one test's cards teach must not be known to another's.
        "XDG_CACHE_HOME": str(gpus.folder / "cache"),
        **environment,
    }
    return gpus.answer(_PROLOGUE + textwrap.dedent(code), without=without, **child)


def _count() -> int:
    seen = behaviour().cards
    return len(visible_cards()) if seen is None else seen


def _types(device: str, device_index: int = 0) -> set[str]:
    if device != "cuda":
        types: set[str] = _real_types(device, device_index)
        return types
    if device_index >= _count():
        raise RuntimeError("CUDA failed with error invalid device ordinal")
    return set(behaviour().compute_types)


def _whisper(model_path: str, device: str = "cpu", **options: Any) -> Any:
    """
    In the place of the class: one of *device*.
    """
    if device == "auto":
        device = "cuda" if _count() else "cpu"
    if device == "cuda":
        return CardWhisper(model_path, **options)
    return RealWhisper(model_path, device=device, **options)
