"""
Copies of another module's functions, with other globals behind some names, and what is
put in the place of its functions and classes.

faster-whisper has no hook for some of what it does. A copy of its function, with a view
of its own of some names, serves as one, and leaves the module as it is. Where a program
must find something else in the module itself, this remembers what was there.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from typing import Any, TypeAlias

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
    found = list(map(function.__globals__.get, _looked_up(function.__code__)))
    before, made = _made.get((function, swaps), ((), function))
    # One with globals of its own each time would run slower, too.
    if len(before) != len(found) or not all(map(operator.is_, before, found)):
        made = _swapped(function, found, swaps)
        if len(_made) >= _MOST_MADE:
            _made.clear()
        _made[function, swaps] = found, made
    return types.MethodType(made, method.__self__)


# What was made of a function, and the globals that it looks up, as they were then.
_made: dict[
    tuple[types.FunctionType, Swaps], tuple[list[object], types.FunctionType]
] = {}
_MOST_MADE = 64


@functools.cache
def _looked_up(code: types.CodeType) -> tuple[str, ...]:
    # Comprehensions are functions of their own.
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return (*code.co_names, *(name for each in inner for name in _looked_up(each)))


def _swapped(
    function: types.FunctionType, found: list[object], swaps: Swaps
) -> types.FunctionType:
    names: dict[str, object] = {}
    for name, value in zip(_looked_up(function.__code__), found, strict=True):
        for original, other in swaps:
            # By identity, so that a function that was replaced is left alone.
            if value is original:
                names[name] = other
    return rebound(function, **names) if names else function


# Not attributes of the replacements: whoever wraps one of them, as programs do, copies
# its attributes.
_plain: dict[object, Any] = {}


def replaces(made: object, plain: object) -> None:
    """
    Notes that *made* stands, or will stand, in the place of *plain*.
    """
    _plain[made] = plain


def is_replacement(found: object) -> bool:
    """
    Returns True if *found* was put in its place by this package.
    """
    return found in _plain


def plain_of(found: Any) -> Any:  # noqa: ANN401 - functions and classes of any kind
    """
    Returns what *found* replaces; *found* itself if it is nothing of ours.
    """
    return _plain.get(found, found)
