"""
The names of models: the canonical one of a request, and those of command lines.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whispercache.errors import LoadFailed, UnknownModel
from whispercache.keys import (
    ALIASES,
    COMPUTE_TYPES,
    MODELS,
    OTHER_NAMES,
    ModelKey,
    is_directory,
)

if TYPE_CHECKING:
    from pathlib import Path

_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")

_BY_OTHER_NAME = {other.lower(): name for other, name in OTHER_NAMES.items()}

_TYPES = frozenset({*COMPUTE_TYPES, "auto", "default", "int8"})


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """
    A model as a command line names it.

    Attributes:
        name: Its name in all output: the part before ``=``, else the text itself; of a
            directory its last part.
        model: A size, a repository of the model hub, or a directory.
        compute_type: As for `ModelCache.get_model`.
    """

    name: str
    model: str
    compute_type: str = "default"


def parse_spec(text: str) -> ModelSpec:
    """
    Returns the model of a text such as ``"base"``, ``"base:int8"``,
    ``"mine=/models/mine"``.

    Raises:
        ValueError: a part of it is missing or not known, in one line.
    """
    name, rest = _named(text.strip())
    model, kind = _typed(rest)
    # Checked here, so that a command line fails at once.
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
    # Paths, too, may hold an "=", or a colon.
    name, equals, rest = text.partition("=")
    is_path = "\\" in name or ("/" in name and not _REPOSITORY.fullmatch(name))
    if not equals or is_path or directory_at(_typed(text)[0]):
        return None, text
    return name.rstrip(), rest.lstrip()


def _typed(text: str) -> tuple[str, str]:
    model, colon, kind = text.rpartition(":")
    if not colon or any(mark in kind for mark in "/\\") or directory_at(text):
        return text, "default"
    return model, kind


def short_name(model: str | ModelKey) -> str:
    """
    Returns a name for people: of a directory its last part, of a key with its type.
    """
    if isinstance(model, ModelKey):
        return f"{short_name(model.model)}:{model.compute_type}"
    if not is_directory(model) and not model.startswith((".", "~")):
        return model
    from pathlib import Path

    path = Path(model)
    return _of_snapshot(path) or path.name or model


def _of_snapshot(path: Path) -> str:
    """
    Returns the repository in whose folder of the hub's cache *path* is, if in any.
    """
    folder = path.parent.parent if path.parent.name == "snapshots" else path
    prefix, *names = folder.name.split("--")
    return names[-1] if prefix == "models" and names else ""


def canonical_model(name_or_path: str | os.PathLike[str]) -> str:
    """
    Returns the one name of a model: a known size, a hub repository, or a real path.

    A directory of that name wins over the hub, as in faster-whisper, provided that
    there is a model in it. A repository's folder in the hub's cache is its snapshot.

    Raises:
        UnknownModel: no such size, or the directory is missing or holds no model.
        LoadFailed: the directory cannot be read.
    """
    name = _text_of(name_or_path)
    if not name.strip():
        raise UnknownModel(name, "give a size such as 'base', or a directory")
    # Imported late: it needs more than importing the package should take.
    from .hub import is_file

    path = os.path.expanduser(name)
    # The model.bin decides: a directory that happens to be called "base" is no model.
    known = ALIASES.get(name) or _BY_OTHER_NAME.get(name.lower(), name)
    try:
        # A real path: the same model by a link and by its name is one.
        if is_file(os.path.join(path, "model.bin")):
            return os.path.realpath(path)
    except LoadFailed:
        # A directory of that name that cannot be read must not hide a known size.
        if known not in MODELS:
            raise
    if known in MODELS:
        return known
    if os.path.isdir(path):
        return os.path.realpath(_cached_snapshot(name, path))
    if os.path.exists(path):
        raise UnknownModel(name, "this is a file; give the directory of the model")
    if _REPOSITORY.fullmatch(name):
        return name
    raise UnknownModel(name, _why_unknown(name))


def _text_of(name_or_path: str | os.PathLike[str]) -> str:
    if not isinstance(name_or_path, (str, os.PathLike)):
        wanted = "a name such as 'base', or the path of a directory"
        raise TypeError(f"a model is {wanted}, not {name_or_path!r}")
    return os.fspath(name_or_path)


def _why_unknown(name: str) -> str:
    if name.startswith((os.sep, ".", "~")):
        return "no such directory"
    if os.sep in name:
        return "no such directory; a repository of the model hub is 'owner/name'"
    import difflib

    spelled = name.strip().lower().replace("_", "-")
    near = [spelled] if spelled in _BY_OTHER_NAME else []
    # For typing errors such as "larg".
    near += difflib.get_close_matches(spelled, [*MODELS, *ALIASES], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{hint}known sizes are {', '.join([*MODELS, *ALIASES])}; or give a hub "
        "repository ('owner/name') or a directory"
    )


def _cached_snapshot(name: str, path: str) -> Path:
    from pathlib import Path

    from .hub import is_file, snapshot_in, snapshots_in

    directory = Path(path)
    is_among = directory.name == "snapshots"
    folder = directory.parent if is_among else directory
    snapshots = snapshots_in(folder)
    if not snapshots:
        raise UnknownModel(name, _why_no_model(directory))
    whole = [each for each in snapshots if is_file(each / "model.bin")]
    current = snapshot_in(folder)
    # Asked for by its folder, a repository is its main branch.
    if current in whole and not is_among:
        return current
    if len(whole) == 1:
        return whole[0]
    if not whole:
        raise UnknownModel(name, _NOT_WHOLE)
    names = ", ".join(map(str, whole))
    raise UnknownModel(name, f"several models are in it; give one of {names}")


_NOT_WHOLE = (
    "this folder of the model hub's cache has no model.bin: its download is not whole, "
    "or the model is not converted for CTranslate2; ask for it by its name, "
    "'owner/name'"
)


def _why_no_model(directory: Path) -> str:
    file = directory / "model.bin"
    if directory.absolute().parent.name == "snapshots":
        return _NOT_WHOLE
    if file.is_symlink():
        return (
            f"its model.bin is a link to {file.readlink()}, which is not there; mend "
            "the link, or download the model again"
        )
    return (
        "the directory holds no model.bin; convert the model for CTranslate2 with "
        "ct2-transformers-converter"
    )


def anchored(name_or_path: str | os.PathLike[str]) -> str:
    """
    Returns the absolute path of a directory, so that it means the same after
    `os.chdir`, and any other name as it is. A link stays a link, which may change.
    """
    name = _text_of(name_or_path)
    path = directory_at(name)
    # A directory that only has the name of a size is none of ours; see above.
    is_known = name in MODELS or name in ALIASES or name.lower() in _BY_OTHER_NAME
    if is_known and not os.path.isfile(os.path.join(path, "model.bin")):
        return name
    # A path even if nothing is there yet.
    if not path and name.startswith((".", "~")):
        path = os.path.abspath(os.path.expanduser(name))
    return path or name


def directory_at(name: str) -> str:
    """
    Returns the absolute path of the directory that *name* is; nothing if it is none.
    """
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else ""
