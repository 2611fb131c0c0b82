"""
Specs: a model as a command line names it, ``[NAME=]MODEL[:TYPE]``. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .keys import COMPUTE_TYPES, ModelKey, is_directory

__all__ = ["ModelSpec", "parse_spec", "short_name"]

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
    name, equals, rest = text.strip().partition("=")
    if not equals or any(mark in name for mark in "/\\"):  # of a path
        name, equals, rest = "", "", text.strip()
    model, colon, kind = rest.rpartition(":")
    if not colon or any(mark in kind for mark in "/\\"):  # likewise, as in C:\models
        model, kind = rest, "default"
    elif kind not in _TYPES:
        known = ", ".join(sorted(_TYPES))
        raise ValueError(f"{text!r}: {kind!r} is no compute type; use one of {known}")
    if not model or (equals and not name):
        raise ValueError(f"{text!r} must be [NAME=]MODEL[:TYPE], as in base:int8")
    if not name:
        name = short_name(model) if model == rest else f"{short_name(model)}:{kind}"
    return ModelSpec(name, model, kind)


def short_name(model: str | ModelKey) -> str:
    """
    A name for people: of a directory its last part, of a key with its compute type.
    """
    if isinstance(model, ModelKey):
        return f"{short_name(model.model)}:{model.compute_type}"
    if is_directory(model) or model.startswith((".", "~")):
        return Path(model).name or model
    return model
