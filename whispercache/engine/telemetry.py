"""
The telemetry of onnxruntime, which finds speech for faster-whisper, kept off.

From 1.29 on it starts a thread for that at its first import, and writes an id and a
database into the user's cache directory. Only a variable that is set before keeps it
from doing so. whispercache sets that, unless the user has.
"""

from __future__ import annotations

import functools
import os
from typing import Literal

VARIABLE = "ORT_DISABLE_TELEMETRY"

# Values that disable it, in any case and between spaces; "2" does not. Source: tried
# with onnxruntime 1.32.0 for Linux; its Privacy.md names "1".
_DISABLING = frozenset({"1", "true", "yes", "on"})


@functools.cache
def keep_off() -> bool:
    """
    Sets the variable for this process and its children, unless the user has set it.

    Returns:
        True if it was set here. Asked once: a later call changes nothing.
    """
    if VARIABLE in os.environ:
        return False
    os.environ[VARIABLE] = "1"
    return True


def setting() -> tuple[bool, Literal["whispercache", "the environment"]]:
    """
    Tells whether telemetry is off, and what set it so.
    """
    # Set first: asked before any import, the answer would be wrong.
    is_ours = keep_off()
    is_off = os.environ.get(VARIABLE, "").strip().lower() in _DISABLING
    return is_off, "whispercache" if is_ours else "the environment"
