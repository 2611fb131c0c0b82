"""
The process that models live in: its libraries, its forks, and its end.

CTranslate2 is imported here and nowhere else. A model has threads that a forked child
lacks, and a destructor that waits for them, or ends the process where CUDA has failed.
Such a model is kept for ever instead of being freed.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
import threading
import time
from typing import TYPE_CHECKING, Literal, cast

from whispercache.errors import CacheClosed, CacheForked

from .rebound import plain_of

if TYPE_CHECKING:
    from types import ModuleType

    from ctranslate2.models import Whisper

    from .api import LoadedModel

# Looks at a model, 2 ms apart, that must find no batch before it counts as quiet.
QUIET_LOOKS = 10
# From this one on, PyAV refuses options that it does not have.
_STRICT_PYAV = 19
# Variable for the telemetry of onnxruntime, which finds speech for faster-whisper: from
# 1.29 on its first import starts a thread for that, and writes an id and a database
# into the user's cache directory, unless this is set before.
TELEMETRY = "ORT_DISABLE_TELEMETRY"
# Values that disable it, in any case and between spaces; "2" does not. Source: tried
# with onnxruntime 1.32.0 for Linux; its Privacy.md names "1".
_DISABLING = frozenset({"1", "true", "yes", "on"})

# The process that first had models; empty until one has.
_models_of: list[int] = []


@functools.cache
def ctranslate2() -> ModuleType:
    """
    Returns CTranslate2, imported in such a way that its idle threads sleep.

    GNU OpenMP's threads spin after each piece of work. Where anything else wants the
    cores, loads to int8 and transcriptions then take several times as long. A value
    that the user has set stands.

    Source: two busy cores, CTranslate2 4.8.5: base to int8 in 0.29 s against 1.12 s, a
    transcription by base in 2.0 s against 6.0 s.
    """
    # faster-whisper, imported later, brings onnxruntime, which reads this.
    keep_telemetry_off()
    # Read once, by CTranslate2's own copy of OpenMP, when it is loaded.
    name = "OMP_WAIT_POLICY"
    given = os.environ.get(name)
    os.environ.setdefault(name, "PASSIVE")
    try:
        import ctranslate2 as module
    finally:
        # Other libraries of this process, and children, need not follow it.
        if given is None:
            del os.environ[name]
    return cast("ModuleType", module)


@functools.cache
def whisper() -> type[Whisper]:
    """
    Returns CTranslate2's class of models, as it was at the first use, whatever is put
    in its place later.
    """
    # The import may itself have been what replaced it (`whispercache run`).
    return cast("type[Whisper]", plain_of(ctranslate2().models.Whisper))


@functools.cache
def keep_telemetry_off() -> bool:
    """
    Sets the variable for this process and its children, once; False if the user has.
    """
    if TELEMETRY in os.environ:
        return False
    os.environ[TELEMETRY] = "1"
    return True


def telemetry_setting() -> tuple[bool, Literal["whispercache", "the environment"]]:
    """
    Tells whether telemetry is off, and what set it so.
    """
    # Set first: asked before any import, the answer would be wrong.
    is_ours = keep_telemetry_off()
    is_off = os.environ.get(TELEMETRY, "").strip().lower() in _DISABLING
    return is_off, "whispercache" if is_ours else "the environment"


def versions() -> dict[str, str]:
    """
    Returns the versions of the libraries that run the models, by name.

    Raises:
        ImportError: one of them is missing, or cannot be loaded.
    """
    module = ctranslate2()
    import faster_whisper

    return {
        "faster-whisper": str(faster_whisper.__version__),
        "CTranslate2": str(module.__version__),
    }


def is_pyav_strict() -> bool:
    """
    Returns True if PyAV may refuse what faster-whisper asks of it; see the next one,
    which tries, and takes a garbage collection for that.
    """
    import av

    # Without PyAV the module may be an empty one.
    number = str(getattr(av, "__version__", "0")).partition(".")[0]
    return number.isdecimal() and int(number) >= _STRICT_PYAV


def decoding_problem() -> str:
    """
    Returns why faster-whisper's own ``decode_audio`` reads no file; empty if it does.

    Source: 1.2.1 passes PyAV an option that PyAV 19 does not have.
    """
    import wave

    ctranslate2()
    import faster_whisper

    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(3_200))
    file.seek(0)
    try:
        faster_whisper.decode_audio(file)
    except TypeError as error:
        return str(error)
    return ""


def enter() -> None:
    """
    Notes that models live in this process.

    Raises:
        CacheForked: they lived in the process that forked this one. The first parallel
            work would wait for ever for OpenMP's threads, which are not there.
    """
    if not _models_of:
        _models_of.append(os.getpid())
    if _models_of[0] != os.getpid():
        raise CacheForked


def keep_for_ever(whisper: object) -> None:
    """
    Takes a reference to a model of CTranslate2 that is never given back.
    """
    # Not a list: the interpreter would empty that when it ends.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(whisper))


class _Gone:
    """
    A model's stand-in once the interpreter ends: daemon threads stop there, and other
    threads get an error.
    """

    def __getattr__(self, name: str) -> object:
        if threading.current_thread().daemon:
            threading.Event().wait()
        raise CacheClosed(f"the interpreter is ending; {name!r} of a model is gone")


def quiesce(loaded: LoadedModel, timeout_s: float) -> bool:
    """
    Stops daemon threads at a model, and waits for calls in flight; see `Loader`.

    Source: a daemon thread in mid-transcription at exit was a SIGSEGV, 10 of 10 times
    (CTranslate2 4.8.5, CPU).
    """
    model = loaded.whisper.model
    loaded.whisper.model = _Gone()
    give_up_s = time.monotonic() + timeout_s
    quiet = 0
    # A call may be on its way to the model that it looked up before.
    while quiet < QUIET_LOOKS:
        if time.monotonic() > give_up_s:
            return False
        quiet = 0 if model.num_active_batches else quiet + 1
        time.sleep(0.002)
    return True
