"""
Rebound: another module's function with other things behind the names that it looks up.

faster-whisper has no hook for some of what it does. A copy of its function with a view
of its own of some names is one, and leaves its module as it is for everybody else.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Swaps", "rebound", "swapped"]

Swaps: TypeAlias = tuple[tuple[Callable[..., object], Callable[..., object]], ...]
"""
Functions of another module, each with what should be found in its place.
"""


def rebound(function: Callable[..., object], **names: object) -> types.FunctionType:
    """
    A copy of a Python *function* for which some global *names* mean something else.

    A name that the function does not look up changes nothing.

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
    made.__kwdefaults__ = function.__kwdefaults__
    made.__doc__ = function.__doc__
    return made


def swapped(method: Callable[..., object], swaps: Swaps) -> Callable[..., object]:
    """
    A bound *method* that finds others in place of some functions.

    What a program has put in the place of one of them stays there, and so does a method
    that is not plainly written in Python.
    """
    if type(method) is not types.MethodType:
        return method
    function = method.__func__
    if type(function) is not types.FunctionType:
        return method
    names: dict[str, object] = {}
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        for original, other in swaps:
            if found is original:
                names[name] = other
    if not names:
        return method
    return types.MethodType(rebound(function, **names), method.__self__)
