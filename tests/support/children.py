"""
Forked children of a test, and what they have to say.
"""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

__all__ = ["in_child"]


def in_child(check: Any, timeout_s: int = 20) -> str:
    """
    What *check* returns in a forked child, which then ends like any program.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads and forks
        pid = os.fork()
    if pid == 0:
        signal.alarm(timeout_s)  # or a child that hangs would hang the tests
        try:
            text = str(check())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}"
    return told
