"""
The places of ledgers: directories, and who may use what is made in them.

One user's processes share a directory that is private. Those of several users, as in
containers, are given one that was made for a group of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

_log = logging.getLogger("whispercache")


def default_directory() -> Path:
    """
    Returns the directory through which one user's processes on this machine share.

    It is private to the user: in ``$XDG_RUNTIME_DIR`` if that is set and the user's
    own, else in the directory for temporary files. Processes with different
    environments, such as a service and a shell, must be given the same directory.

    Raises:
        OSError: Neither can be used.
    """
    # Not what platformdirs takes without the variable: /run/user/<uid> exists only
    # while the user is logged in, and a service's workers would not find each other.
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and Path(session).is_absolute():
        try:
            _check_own(Path(session))
            return _private(Path(session) / "whispercache")
        except OSError as error:
            _log.debug("XDG_RUNTIME_DIR is not used: %s", error)
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    return _private(Path(tempfile.gettempdir()) / f"whispercache{user}")


def _private(path: Path) -> Path:
    """
    Returns *path*, made if missing, if no other user can read or write there.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = _check_own(path)
    if os.name == "posix" and status.st_mode & 0o077:
        raise PermissionError(f"{path} is open to others; run: chmod 700 {path}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")
    return path


def _check_own(path: Path) -> os.stat_result:
    # Without following a link, which in a public directory any user may have made.
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{path} is not a directory")
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    return status


def given_directory(directory: str | os.PathLike[str]) -> Path:
    """
    Returns a directory that all who share it were given; made, and private, if missing.

    Raises:
        ValueError: It depends on the directory that a process happens to be in.
        OSError: It cannot be used.
    """
    path = Path(directory).expanduser()
    if not path.is_absolute():
        raise ValueError(f"{path} is no absolute path, so each process has another one")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and path.stat().st_mode & stat.S_ISVTX:
        # Source: fs.protected_regular in Linux's sysctl documentation: there, a lock
        # that another user made cannot be opened.
        raise PermissionError(
            f"{path} is for files that only their owners change (the sticky bit); make "
            f"one in it: install -d -m 2770 -g GROUP {path / 'whispercache'}"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written by this user, or its groups")
    return path


def share(made: Path) -> None:
    """
    Lets those who may use the directory around it use *made*, which this process made.
    """
    around = made.parent.stat()
    others = around.st_mode & 0o077
    if os.name != "posix" or not others:
        return
    if made.stat().st_gid != around.st_gid:
        os.chown(made, -1, around.st_gid)
    # What is made in it has the same group, whoever makes it.
    made.chmod(stat.S_IRWXU | stat.S_ISGID | others)


def permissions(directory: Path) -> int:
    """
    Returns the permission bits of *directory*.
    """
    return stat.S_IMODE(directory.stat().st_mode) & 0o777
