"""
Comparisons for tests: of files of noise, with micro models, as quick as it gets.
"""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING

import numpy as np
import pytest
from real import micro

from whispercache.comparison import compare
from whispercache.engine.naming import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from whispercache import ModelCache
    from whispercache.comparison import Comparison, Progress, Reference

__all__ = [
    "ONE_THREAD",
    "compared",
    "files_of_noise",
    "noise",
    "noises",
    "specs_of",
]

ONE_THREAD = {"cpu_threads": 1}


def noise(path: Path, seed: int, seconds: float = 0.5) -> str:
    """
    Writes a file of noise, which is the same for the same *seed*.
    """
    samples = np.random.default_rng(seed).integers(-99, 99, int(16_000 * seconds))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.astype("<i2").tobytes())
    return str(path)


def noises(folder: Path) -> list[str]:
    """
    Writes three files of noise.
    """
    return [noise(folder / f"{seed}.wav", seed) for seed in range(3)]


def files_of_noise() -> object:
    """
    The fixture of three files of noise.
    """

    @pytest.fixture
    def files(tmp_path: Path) -> list[str]:
        """
        Three files of noise.
        """
        return noises(tmp_path)

    return files


def specs_of(*texts: str) -> object:
    """
    The fixture of models that say *texts*, each named after its first word.
    """

    @pytest.fixture
    def specs() -> list[ModelSpec]:
        """
        Models, which say different things.
        """
        return [ModelSpec(text.partition(" ")[0], str(micro(text))) for text in texts]

    return specs


def compared(
    files: Sequence[str],
    models: Sequence[str | ModelSpec],
    *,
    references: dict[str, Reference | str] | None = None,
    out: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    cache: ModelCache | None = None,
    beam_size: int = 1,
    resume: bool = True,
) -> Comparison:
    """
    Returns a comparison.
    """
    return compare(
        files,
        models=models,
        references=references,
        device="cpu",
        out=out,
        progress=progress,
        cache=cache,
        beam_size=beam_size,
        resume=resume,
        load_options=ONE_THREAD,
        resamples=200,
    )
