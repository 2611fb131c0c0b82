"""
The adapter that makes a full `Loader` of one that has only some of its methods.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from whispercache.keys import TYPICAL_COMPUTE_TYPES

from .api import Engine, Loader
from .audio.samples import samples_of
from .files import ModelFiles
from .sizes.architecture import HUB_COMPUTE_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def completed(engine: Engine) -> Loader:
    """
    Returns *engine* itself if it has all methods of a `Loader`, or else an object that
    has them, and a default for each that it lacks.

    By default there is the CPU alone, all files are here, nothing is measured or kept,
    calls take any parameters, and audio is decoded as for faster-whisper.

    Raises:
        TypeError: it lacks a method of an `Engine`.
    """
    needed = [name for name in dir(Engine) if not name.startswith("_")]
    lacking = [name for name in needed if not hasattr(engine, name)]
    if lacking:
        raise TypeError(
            f"a loader needs {', '.join(needed)}; {type(engine).__name__} has no "
            f"{' or '.join(lacking)}"
        )
    if all(hasattr(engine, name) for name in _DEFAULTS):
        return cast("Loader", engine)
    methods = {name: getattr(engine, name) for name in needed}
    for name, default in _DEFAULTS.items():
        methods[name] = getattr(engine, name, default)
    return cast("Loader", SimpleNamespace(**methods))


def _nothing(*_arguments: object, **_options: object) -> None:
    pass


# The defaults of all optional methods. A test compares the names with `Loader`'s.
_DEFAULTS: Mapping[str, Callable[..., object]] = {
    "devices": lambda: ("cpu",),
    "supported_compute_types": lambda device: TYPICAL_COMPUTE_TYPES[
        device.partition(":")[0]
    ],
    "warm_up_needed": lambda _key: "",
    "warm_up": _nothing,
    "locate": lambda model, _options, **_: ModelFiles(model, HUB_COMPUTE_TYPE),
    "choose": lambda _key, files: files,
    "read_ahead": _nothing,
    "read": _nothing,
    "follow_up": _nothing,
    "remember": _nothing,
    "remember_work": _nothing,
    "host_copies": dict,
    "forget": _nothing,
    "kept_bytes": int,
    "shrink_kept": _nothing,
    "return_memory": _nothing,
    "abandon": _nothing,
    "lost": _nothing,
    "forked": _nothing,
    "quiesce": lambda *_: True,
    "signatures": lambda: dict.fromkeys(
        ("transcribe", "batched", "detect_language"),
        inspect.signature(lambda audio=None, **_: audio),
    ),
    "batched": lambda whisper: whisper.transcribe,
    "whisper_class": _nothing,
    "initialize": _nothing,
    "decode_audio": samples_of,
}
