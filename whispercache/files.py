"""
Files of models: where they are, on this disk or after a download from the model hub.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CorruptModel, LoadFailed, UnknownModel, WhisperCacheError
from .header import SMALL_FILES, read_header
from .keys import MODELS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .header import ModelHeader
    from .keys import OptionValue
    from .weights import Source

__all__ = ["ModelFiles", "downloaded", "files_in", "is_whole", "snapshot", "stamp_of"]

_log = logging.getLogger("whispercache")

_HUB_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.bin",
    "tokenizer.json",
    "vocabulary.*",
)

_STAMPED = ("model.bin", *SMALL_FILES)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """
    Where a model's files are, and what its header says.

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
    Size, time and inode of each file; another one when somebody has changed them.

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
            stamp.append(0)
        except OSError as error:
            raise LoadFailed(directory, f"{name} cannot be read: {error}") from error
        else:
            stamp += status.st_size, status.st_mtime_ns, status.st_ino
    return tuple(stamp)


@functools.lru_cache(maxsize=64)
def _header(directory: str, _stamp: tuple[int, ...]) -> ModelHeader:
    """
    The header of a model, read again when its files have changed.
    """
    return read_header(directory)


def files_in(directory: str) -> ModelFiles:
    """
    The model in *directory*.

    Blocks: for some system calls; for milliseconds of small reads if it is new.

    Raises:
        CorruptModel, UnknownModel, LoadFailed: there is no whole model.
    """
    stamp = stamp_of(directory)
    header = _header(directory, stamp)
    if not Path(directory, "config.json").is_file():
        raise CorruptModel(directory, "config.json is missing")
    return ModelFiles(directory, header.saved_compute_type, stamp, header)


def downloaded(model: str, options: Mapping[str, OptionValue]) -> str:
    """
    Directory of a repository, after a download if need be.
    """
    # Somebody else may have fetched it while this caller waited.
    here = snapshot(model, options, local_files_only=True)
    if here is not None and (is_whole(here) or options.get("local_files_only")):
        return here
    if options.get("local_files_only"):
        raise LoadFailed(
            model,
            "it is not on this disk and local_files_only is set; allow the download, "
            "or give the directory of a model",
        )
    _log.info("downloading %s", model)
    try:
        fetched = snapshot(model, options, local_files_only=False)
    except LoadFailed:
        if here is None:
            raise
        return here
    assert fetched is not None
    return fetched


def is_whole(directory: str) -> bool:
    """
    Whether no file is missing, as after an interrupted download.

    huggingface-hub tells by itself from 2.0 on only. A few repositories have no
    tokenizer; they look interrupted for ever, which costs a question to the hub each
    time.
    """
    found = set(os.listdir(directory))
    return {"config.json", "model.bin", "tokenizer.json"} <= found and any(
        name.startswith("vocabulary.") for name in found
    )


def snapshot(
    model: str, options: Mapping[str, OptionValue], *, local_files_only: bool
) -> str | None:
    """
    Directory of a repository in the hub's local cache, after a download if allowed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    token = options.get("use_auth_token")
    try:
        directory = snapshot_download(
            MODELS.get(model, model),
            revision=_text(options.get("revision")),
            cache_dir=_text(options.get("download_root")),
            token=token if isinstance(token, bool) else _text(token),
            local_files_only=local_files_only,
            allow_patterns=list(_HUB_FILES),
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = "the model hub has no such repository or revision, or it is private"
        raise UnknownModel(model, reason) from error
    except Exception as error:  # also those of its HTTP library, whichever that is
        if local_files_only:
            return None
        raise _unreachable(model, error) from error
    # An interrupted download leaves a snapshot without its largest file.
    if not Path(directory, "model.bin").is_file():
        if local_files_only:
            return None
        raise UnknownModel(model, "the repository has no model.bin for CTranslate2")
    return str(directory)


def _text(value: OptionValue) -> str | None:
    return None if value is None else str(value)


def _unreachable(model: str, error: Exception) -> WhisperCacheError:
    first = str(error).strip().partition("\n")[0]
    return LoadFailed(
        model,
        f"it is not on this disk and the download failed ({first}); check the network, "
        "or give the directory of a model",
    )
