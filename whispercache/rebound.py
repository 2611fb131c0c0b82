"""
Rebound: another module's function with other things behind the names that it looks up.

faster-whisper has no hook for some of what it does. A copy of its function with a view
of its own of some names is one, and leaves its module as it is for everybody else.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["rebound"]


def rebound(function: Callable[..., object], **names: object) -> types.FunctionType:
    """
    A copy of a Python *function* for which some global *names* mean something else.

    A name that the function does not look up changes nothing.

    Raises:
        TypeError: *function* is not written in Python.
    """
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{function!r} is no function written in Python")
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__doc__ = function.__doc__
    return made
