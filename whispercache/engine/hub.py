"""
The model hub's cache on this disk: the files of repositories, and missing ones.

They are looked up here, not by huggingface-hub: its versions differ in what they take
for complete, and none sees a link whose file is gone. What cannot be read, or found
out, raises `LoadFailed`.
"""

from __future__ import annotations

import errno
import fnmatch
import itertools
import os
import stat
from pathlib import Path

from whispercache.errors import LoadFailed

# The patterns of the files that are downloaded.
HUB_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.bin",
    "tokenizer.json",
    "vocabulary.*",
)

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

_NEEDED = ("config.json", "model.bin")
_VOCABULARIES = ("vocabulary.json", "vocabulary.txt")
_WANTED = (*_NEEDED, "tokenizer.json", "vocabulary.*")


def repository_folder(repository: str, cache_dir: str | None) -> Path:
    """
    Returns the folder of a repository in the hub's cache, whether it is there or not.
    """
    from huggingface_hub import constants

    root = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    return root / f"models--{repository.replace('/', '--')}"


def snapshot_in(folder: Path, revision: str | None = None) -> Path | None:
    """
    Returns the snapshot of a branch, a tag or a commit in a repository's folder,
    complete or not; None if there is none.
    """
    try:
        commit = (folder / "refs" / (revision or "main")).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        # A commit's hash has no file among the branches and tags.
        commit = revision or ""
    except OSError as error:
        raise _unreadable(folder, error) from error
    except ValueError:
        # The file holds no text, or the revision is no possible name of one.
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and is_there(snapshot) else None


def snapshots_in(folder: Path) -> list[Path]:
    """
    Returns all snapshots in a repository's folder; none if it is no such folder.
    """
    return sorted(folder / "snapshots" / name for name in _names(folder / "snapshots"))


def missing_files(directory: Path) -> list[str]:
    """
    Returns the files of a model that are not in *directory*, broken links included.

    A few repositories have no tokenizer; they look interrupted for ever, which costs a
    question to the hub each time. Without preprocessor_config.json nothing is missing.
    """
    names = _names(directory)
    found = (fnmatch.filter(names, pattern) for pattern in HUB_FILES)
    ours = sorted(itertools.chain.from_iterable(found))
    # Links into the blobs, which may have been deleted.
    missing = [name for name in ours if not is_there(directory / name)]
    missing += [name for name in _WANTED if not fnmatch.filter(names, name)]
    return missing


def is_usable(directory: Path) -> bool:
    """
    Tells whether the files in *directory* are enough to load a model.
    """
    # Earlier converters wrote vocabulary.txt.
    has_words = any(is_there(directory / name) for name in _VOCABULARIES)
    return has_words and all(is_there(directory / name) for name in _NEEDED)


def is_interrupted(folder: Path) -> bool:
    """
    Tells whether a download of the repository began, and did not end.
    """
    return any(name.endswith(".incomplete") for name in _names(folder / "blobs"))


def is_there(path: str | Path) -> bool:
    """
    Tells whether a file or directory is there, not only a link to it.
    """
    return _status(path) is not None


def is_file(path: str | Path) -> bool:
    """
    Tells whether a file is there.
    """
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def _status(path: str | Path) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except ValueError:
        # No possible path, as with a NUL in it.
        return None
    except OSError as error:
        # All else, such as a missing permission, is no proof that it is not there.
        if error.errno in _NOT_THERE:
            return None
        raise _unreadable(path, error) from error


def _names(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise _unreadable(directory, error) from error


def _unreadable(path: str | Path, error: OSError) -> LoadFailed:
    reason = f"it cannot be read ({error.strerror}); check its permissions"
    return LoadFailed(os.fspath(path), reason)
