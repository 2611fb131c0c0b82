"""
The files of models, on this disk or downloaded from the model hub.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.errors import LoadFailed, UnknownModel, WhisperCacheError
from whispercache.keys import MODELS

from .claims import check_claims
from .hub import (
    HUB_FILES,
    is_interrupted,
    is_usable,
    missing_files,
    repository_folder,
    snapshot_in,
)
from .sizes.header import SMALL_FILES, read_header

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from whispercache.keys import OptionValue

    from .claims import Claims
    from .sizes.header import ModelHeader
    from .sizes.weights import Source

_log = logging.getLogger("whispercache")

# Most seconds for a question to the hub. Source: that of huggingface-hub for its own.
_ASKING_S = 10.0

_STAMPED = ("model.bin", *SMALL_FILES)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """
    The place of a model's files, with their header.

    Attributes:
        directory: The directory with model.bin.
        saved_compute_type: The type of the weights in the file.
        stamp: Size, time and inode of each file when the header was read.
        source: The header, or the architecture of a known size whose files are not
            here; None where a loader needs neither.
        original: The files that were asked for, where these are a variant of them.
    """

    directory: str
    saved_compute_type: str
    stamp: tuple[int, ...] = ()
    source: Source | None = None
    original: ModelFiles | None = None


def stamp_of(directory: str) -> tuple[int, ...]:
    """
    Returns size, time and inode of each file; it differs once a file has changed.

    Raises:
        LoadFailed: model.bin is gone, or one of them cannot be read.
    """
    stamp: list[int] = []
    for name in _STAMPED:
        try:
            status = os.stat(os.path.join(directory, name))
        except FileNotFoundError as error:
            if name == "model.bin":
                raise LoadFailed(directory, "its model.bin is gone") from error
            # Small files may be missing; one that appears later changes the stamp.
            stamp.append(0)
        except OSError as error:
            reason = f"{name} cannot be read ({error.strerror}); check its permissions"
            raise LoadFailed(directory, reason) from error
        else:
            stamp += status.st_size, status.st_mtime_ns, status.st_ino
    return tuple(stamp)


# Both are read again when the stamp has changed.
@functools.lru_cache(maxsize=64)
def _header(directory: str, _stamp: tuple[int, ...]) -> ModelHeader:
    return read_header(directory)


@functools.lru_cache(maxsize=64)
def _claims(directory: str, stamp: tuple[int, ...]) -> Claims:
    return check_claims(directory, _header(directory, stamp))


def files_in(directory: str) -> ModelFiles:
    """
    Returns the files of the model in *directory*.

    Blocks: for some system calls; if it is new, for `read_header` and `check_claims`.

    Raises:
        CorruptModel, UnknownModel, LoadFailed: there is no whole model, or its files
            are of different ones.
    """
    stamp = stamp_of(directory)
    header = _header(directory, stamp)
    _claims(directory, stamp)
    return ModelFiles(directory, header.saved_compute_type, stamp, header)


def variant_in(directory: str, original: ModelFiles) -> ModelFiles:
    """
    Returns the files in *directory*, an intact variant of *original*. Its small files
    are those of *original*, which `files_in` has checked.

    Blocks: likewise, but for `check_claims`.

    Raises:
        CorruptModel, UnknownModel, LoadFailed: there is no whole model.
    """
    stamp = stamp_of(directory)
    header = _header(directory, stamp)
    # Requests for the default type mean that of the original.
    saved = original.saved_compute_type
    return ModelFiles(directory, saved, stamp, header, original)


def claims_of(files: ModelFiles) -> Claims:
    """
    Returns the claims of files that `files_in` has found, or of those that they are a
    variant of, mostly without a look at the disk.

    Raises:
        CorruptModel, LoadFailed: the files have changed for the worse since.
    """
    files = files.original or files
    return _claims(files.directory, files.stamp)


def local_files(model: str, options: Mapping[str, OptionValue]) -> ModelFiles | None:
    """
    Returns the usable files of a repository in the hub's local cache, if they are
    there.

    Raises:
        CorruptModel, LoadFailed: they are broken, or cannot be read.
    """
    here = _local(model, options)
    return files_in(str(here)) if here is not None and is_usable(here) else None


def is_whole(model: str, options: Mapping[str, OptionValue]) -> bool:
    """
    Tells whether nothing is missing that a download could add.
    """
    here = _local(model, options)
    return here is not None and not missing_files(here)


def downloaded(model: str, options: Mapping[str, OptionValue]) -> ModelFiles:
    """
    Returns the files of a repository, after a download if need be.

    Files that are here, and may be incomplete, are taken where the hub cannot be
    reached.

    Raises:
        UnknownModel: the hub has no such model.
        CorruptModel: its files are broken.
        LoadFailed: they are not here, and cannot be downloaded.
    """
    # Another caller may have downloaded it while this one waited.
    here = _local(model, options)
    may_load = here is not None and is_usable(here)
    # As in faster-whisper, which takes the same option.
    is_local = bool(options.get("local_files_only"))
    if is_local and not may_load:
        raise LoadFailed(
            model,
            f"{_state(model, options)} and local_files_only is set; allow the "
            "download, or give the directory of a model",
        )
    if not is_local and not (may_load and is_whole(model, options)):
        _log.info("downloading %s", model)
        try:
            here = _fetch(model, options)
        except WhisperCacheError:
            # An incomplete download is better than none, if it can be loaded.
            if not may_load:
                raise
    return files_in(str(here))


def _local(model: str, options: Mapping[str, OptionValue]) -> Path | None:
    folder = repository_folder(MODELS.get(model, model), _root(options))
    return snapshot_in(folder, _text(options.get("revision")))


def _fetch(model: str, options: Mapping[str, OptionValue]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    token = options.get("use_auth_token")
    token = token if isinstance(token, bool) else _text(token)
    repository = MODELS.get(model, model)
    revision = _text(options.get("revision"))
    try:
        directory = snapshot_download(
            repository,
            revision=revision,
            cache_dir=_root(options),
            token=token,
            allow_patterns=list(HUB_FILES),
        )
        # A repository without a tokenizer is usable, too.
        if is_usable(Path(directory)):
            return Path(directory)
        # Some versions answer without the hub where they cannot reach it.
        asked = HfApi(token=token).model_info(
            repository, revision=revision, timeout=_ASKING_S
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = "the model hub has no such repository or revision, or it is private"
        raise UnknownModel(model, reason) from error
    # Errors of its HTTP library come through, and which one that is has changed twice.
    except Exception as error:
        raise _unreachable(model, options, error) from error
    listed = [each.rfilename for each in asked.siblings or ()]
    missing = missing_files(Path(directory))
    # Those that the hub does not list will not come by another try.
    if lacking := [name for name in missing if not fnmatch.filter(listed, name)]:
        raise _unusable(model, lacking)
    raise LoadFailed(model, f"{_state(model, options)}; try again")


def _unusable(model: str, lacking: Collection[str]) -> UnknownModel:
    """
    Returns the error for a repository that has not all that it takes.
    """
    # The usual case: a repository for Transformers.
    if "model.bin" in lacking:
        return UnknownModel(
            model,
            "the repository has no model.bin for CTranslate2; ask for one that was "
            "converted, or convert it with ct2-transformers-converter",
        )
    return UnknownModel(model, f"the repository has no {', '.join(lacking)}")


def _root(options: Mapping[str, OptionValue]) -> str | None:
    root = _text(options.get("download_root"))
    return None if root is None else os.path.expanduser(root)


def _text(value: OptionValue) -> str | None:
    return None if value is None else str(value)


def _state(model: str, options: Mapping[str, OptionValue]) -> str:
    here = _local(model, options)
    if here is not None:
        missing = ", ".join(missing_files(here))
        return f"its download is not whole: {missing} is missing"
    folder = repository_folder(MODELS.get(model, model), _root(options))
    if is_interrupted(folder):
        return "its download was interrupted"
    return "it is not on this disk"


def _unreachable(
    model: str, options: Mapping[str, OptionValue], error: Exception
) -> WhisperCacheError:
    first = str(error).strip().partition("\n")[0]
    return LoadFailed(
        model,
        f"{_state(model, options)}, and the download failed ({first}); check the "
        "network, or give the directory of a model",
    )
