"""
The environment of the tests and of all that they start.

They have a home of their own: nothing is read from the user's, whatever its caches and
settings hold, and nothing is left there.
"""

from __future__ import annotations

import os
import site
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["move_to"]

_FOLDERS = {
    "HOME": "",
    "USERPROFILE": "",
    "XDG_CACHE_HOME": ".cache",
    "XDG_CONFIG_HOME": ".config",
    "XDG_DATA_HOME": ".local/share",
    "XDG_STATE_HOME": ".local/state",
    "XDG_RUNTIME_DIR": "run",
}
# What tells where the user's files are, speaks to the model hub in the user's name, or
# sets up the cache.
_USERS = ("XDG_", "HF_", "HUGGINGFACE_", "MPLCONFIGDIR", "WHISPERCACHE_")
# What is said to the tests themselves.
_TESTS = ("WHISPERCACHE_EFFORT", "WHISPERCACHE_GPU_MODELS")


def move_to(home: Path) -> None:
    """
    Let this process, and all that it starts, live in *home*, which nobody else uses.
    """
    # Packages that were installed for the user alone stay where they are.
    packages = site.getuserbase()
    for name in list(os.environ):
        if name.startswith(_USERS) and name not in _TESTS:
            del os.environ[name]
    for name, folder in _FOLDERS.items():
        path = home / folder
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[name] = str(path)
    os.environ["PYTHONUSERBASE"] = packages
    # Hundreds of interpreters need not all compile the same.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Threads that share a calculation spin while they wait for each other: where other
    # tests want the processor, it takes up to thirty times as long as on one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
