"""
Directories that cannot be read, also where tests are run by root.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

__all__ = ["forbid"]

_CALLS = ((os, "stat"), (os, "listdir"), (os, "scandir"), (io, "open"))


def forbid(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Let nobody look at what is in *directory*, as without its permissions.
    """
    for module, name in _CALLS:
        monkeypatch.setattr(module, name, _refusing(getattr(module, name), directory))
    monkeypatch.setattr(builtins, "open", _refusing(builtins.open, directory))


def _refusing(call: Callable[..., Any], directory: Path) -> Callable[..., Any]:
    inside = f"{directory}{os.sep}"

    def refuse(path: Any = ".", *args: Any, **options: Any) -> Any:
        if not isinstance(path, int):
            name = os.fsdecode(path)
            is_listed = call.__name__ in ("listdir", "scandir")
            if name.startswith(inside) or (is_listed and name == str(directory)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return call(path, *args, **options)

    return refuse
