"""
Real models and real speech, for the tests that run CTranslate2.

Models are made or put together once for all tests, and tests that change files work on
copies. All run with ``cpu_threads=1``: OpenMP's threads spin while they wait, so on a
busy machine more of them are up to 25 times slower.
"""

from __future__ import annotations

import atexit
import csv
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
import pytest
from micro import build_micro

from examples.weights import WeightsMissing, packaged_model
from whispercache.engine.rebound import rebound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from faster_whisper import WhisperModel
    from faster_whisper.transcribe import Segment
    from numpy.typing import NDArray

    from whispercache import CachedModel, ModelCache

__all__ = [
    "FEATURES",
    "MIB",
    "SILENCE",
    "TEXT",
    "at_once",
    "child",
    "child_environment",
    "clip",
    "decode_audio",
    "micro",
    "micro_copy",
    "model_of",
    "packaged",
    "pcm",
    "plain_model",
    "reference",
    "text_of",
]

T = TypeVar("T")

MIB = 1024**2
TEXT = " micro says hello"
SILENCE: NDArray[np.float32] = np.zeros(16_000, np.float32)
FEATURES: NDArray[np.float32] = np.zeros((80, 100), np.float32)
"""
Features (mels, frames) of one second, for `encode`: the quickest work there is.
"""

_ROOT = Path(__file__).resolve().parents[2]
_CLIPS = _ROOT / "examples" / "clips"


@functools.cache
def _directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="whispercache-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def micro(
    text: str = TEXT.strip(), *, english: bool = False, quantization: str | None = None
) -> Path:
    """
    Directory of a micro model that answers *text*. Do not change what is in it.
    """
    name = f"{text.replace(' ', '-')}-{english}-{quantization}"
    return build_micro(
        _directory() / name, text, english=english, quantization=quantization
    )


def micro_copy(directory: Path, text: str = TEXT.strip(), **options: Any) -> Path:
    """
    A micro model in *directory*, in place of what was there, to be changed at will.

    model.bin is a new file, as it is after an update.
    """
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(micro(text, **options), directory)
    return directory


@functools.cache
def packaged(name: str) -> Path:
    """
    Directory of tiny.en or base; skips the test where their packages are missing.
    """
    try:
        return packaged_model(name)
    except WeightsMissing as missing:
        pytest.skip(str(missing))


def plain_model(directory: Path, **options: Any) -> WhisperModel:
    """
    The WhisperModel of *directory* without any cache.
    """
    from faster_whisper import WhisperModel

    return WhisperModel(str(directory), device="cpu", cpu_threads=1, **options)


def model_of(cache: ModelCache, directory: Path, **options: Any) -> CachedModel:
    """
    The cached model of *directory*, on the CPU.
    """
    return cache.get_model(directory, "cpu", cpu_threads=1, **options)


def text_of(segments: Iterable[Segment]) -> str:
    """
    All that was said.
    """
    return "".join(segment.text for segment in segments)


def clip(name: str) -> str:
    """
    Path of an example clip, ``"en-bread"`` for example.
    """
    return str(_CLIPS / f"{name}.flac")


def decode_audio(source: str | BinaryIO) -> NDArray[np.float32]:
    """
    The samples of faster-whisper's ``decode_audio``, which by itself fails with PyAV
    19: an option that it passes is there no more.
    """
    import av
    from faster_whisper import audio

    def opened(file: str | BinaryIO, mode: Literal["r"], **_: str) -> object:
        return av.open(file, mode)

    decode: Callable[..., NDArray[np.float32]] = audio.decode_audio
    if int(av.__version__.partition(".")[0]) >= 19:
        decode = rebound(decode, av=SimpleNamespace(**{**vars(av), "open": opened}))
    return decode(source)


def pcm(source: str) -> bytes:
    """
    The samples of a file as bytes: 16,000 a second, of 16 bits, one channel.
    """
    return (decode_audio(source) * 32767).astype(np.int16).tobytes()


def reference(name: str) -> str:
    """
    What is said in a clip.
    """
    with (_CLIPS / "references.tsv").open(encoding="utf-8") as file:
        rows = {
            row["file"]: row["text"] for row in csv.DictReader(file, delimiter="\t")
        }
    return rows[f"{name}.flac"]


def at_once(calls: Iterable[Callable[[], T]]) -> list[T]:
    """
    Run all *calls* at the same time, each on a thread; their results in order.
    """
    waiting = list(calls)
    barrier = threading.Barrier(len(waiting))

    def run(call: Callable[[], T]) -> T:
        barrier.wait(30)
        return call()

    with ThreadPoolExecutor(len(waiting)) as pool:
        return list(pool.map(run, waiting))


def child_environment(
    environment: Mapping[str, str | Path] = MappingProxyType({}),
) -> dict[str, str]:
    """
    Environment of a child process, with the package and these tests to import from.
    """
    support = str(Path(__file__).parent)
    paths = [str(_ROOT), support, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **{name: str(value) for name, value in environment.items()},
    }


def child(
    code: str,
    *arguments: str | Path,
    environment: Mapping[str, str | Path] = MappingProxyType({}),
    timeout_s: float = 60,
    covered: bool = True,
) -> subprocess.CompletedProcess[str]:
    """
    Run *code* in a Python of its own, for what may crash or is there once per process.

    Not *covered*: without coverage, whose own lock is taken for ever by what a signal
    handler raises, and in a child that is forked while another thread has it.
    """
    inherited = child_environment(environment)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={
            name: value
            for name, value in inherited.items()
            if covered or not name.startswith("COV")
        },
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
