"""
Specs: a model as a command line names it, ``[NAME=]MODEL[:TYPE]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .keys import COMPUTE_TYPES, ModelKey, directory_at, is_directory

__all__ = ["ModelSpec", "parse_spec", "short_name"]

_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")

_TYPES = frozenset({*COMPUTE_TYPES, "auto", "default", "int8"})


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """
    A model, and what to call it.

    Attributes:
        name: What it goes by: the part before ``=``, else the text itself; of a
            directory its last part.
        model: A size, a repository of the model hub, or a directory.
        compute_type: As for `ModelCache.get_model`.
    """

    name: str
    model: str
    compute_type: str = "default"


def parse_spec(text: str) -> ModelSpec:
    """
    The model that *text* names: ``"base"``, ``"base:int8"``, ``"mine=/models/mine"``.

    Raises:
        ValueError: a part of it is missing or not known, in one line.
    """
    name, rest = _named(text.strip())
    model, kind = _typed(rest)
    if kind not in _TYPES:
        known = ", ".join(sorted(_TYPES))
        raise ValueError(f"{text!r}: {kind!r} is no compute type; use one of {known}")
    if not model or name == "":
        raise ValueError(f"{text!r} must be [NAME=]MODEL[:TYPE], as in base:int8")
    if name is None:
        # A relative path looks like a repository, but for what is there.
        name = short_name(directory_at(model) or model)
        name += "" if model == rest else f":{kind}"
    return ModelSpec(name, model, kind)


def _named(text: str) -> tuple[str | None, str]:
    """
    The name in *text*, if it has one, and the rest. Paths, too, may hold an ``=``.
    """
    name, equals, rest = text.partition("=")
    is_path = "\\" in name or ("/" in name and not _REPOSITORY.fullmatch(name))
    if not equals or is_path or directory_at(_typed(text)[0]):
        return None, text
    return name.rstrip(), rest.lstrip()


def _typed(text: str) -> tuple[str, str]:
    """
    The model in *text*, and its type. Paths, too, may hold a colon.
    """
    model, colon, kind = text.rpartition(":")
    if not colon or any(mark in kind for mark in "/\\") or directory_at(text):
        return text, "default"
    return model, kind


def short_name(model: str | ModelKey) -> str:
    """
    A name for people: of a directory its last part, of a key with its compute type.
    """
    if isinstance(model, ModelKey):
        return f"{short_name(model.model)}:{model.compute_type}"
    if not is_directory(model) and not model.startswith((".", "~")):
        return model
    path = Path(model)
    return _of_snapshot(path) or path.name or model


def _of_snapshot(path: Path) -> str:
    """
    The name of the repository in whose folder in the hub's cache a directory is.
    """
    folder = path.parent.parent if path.parent.name == "snapshots" else path
    prefix, *names = folder.name.split("--")
    return names[-1] if prefix == "models" and names else ""
