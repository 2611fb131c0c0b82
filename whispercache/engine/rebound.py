"""
Copies of another module's functions, with other globals behind some names.

faster-whisper has no hook for some of what it does. A copy of its function, with a view
of its own of some names, serves as one, and leaves the module as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TypeAlias

# Functions of another module, each with its replacement.
Swaps: TypeAlias = tuple[tuple[Callable[..., object], Callable[..., object]], ...]


def rebound(function: Callable[..., object], **names: object) -> types.FunctionType:
    """
    Returns a copy of a Python *function* for which some global *names* mean something
    else. Names that it does not look up change nothing.

    Raises:
        TypeError: *function* is not written in Python.
    """
    # Not isinstance(): a wrapper may pass itself off as what it wraps.
    if type(function) is not types.FunctionType:
        raise TypeError(f"{function!r} is no function written in Python")
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    # The constructor of functions takes all but these.
    made.__kwdefaults__ = function.__kwdefaults__
    made.__doc__ = function.__doc__
    return made


def swapped(method: Callable[..., object], swaps: Swaps) -> Callable[..., object]:
    """
    Returns a bound *method* that finds replacements for some functions, but for those
    that a program has replaced. One that is not plainly Python is returned as it is.
    """
    # A mock or a wrapper of a test, say.
    if type(method) is not types.MethodType:
        return method
    function = method.__func__
    if type(function) is not types.FunctionType:
        return method
    names: dict[str, object] = {}
    for name in function.__code__.co_names:
        # By identity, so that a function that was replaced is left alone.
        found = function.__globals__.get(name)
        for original, other in swaps:
            if found is original:
                names[name] = other
    if not names:
        return method
    return types.MethodType(rebound(function, **names), method.__self__)
