"""
The signatures of another library's functions, and calls bound to them. Pure.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def bound(
    signature: inspect.Signature,
    args: tuple[object, ...],
    options: Mapping[str, object],
) -> dict[str, object]:
    """
    Returns the parameters of a call by name, positional ones too.

    Raises:
        TypeError: there is no such parameter, there are too many, or one came twice.
    """
    names, known = _names(signature)
    if known is not None:
        for name in options:
            if name not in known:
                import difflib

                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else " in faster-whisper"
                raise TypeError(f"there is no parameter {name!r}{hint}")
    if len(args) > len(names):
        raise TypeError(f"{len(args)} parameters by position, of {len(names)} at all")
    given: dict[str, object] = dict(zip(names, args, strict=False))
    for name in given:
        if name in options:
            raise TypeError(f"parameter {name!r} was given by position and by name")
    return {**given, **options}


# By identity: to hash a signature takes as long as to read it. They are few, and kept.
_read: dict[int, tuple[inspect.Signature, list[str], list[str] | None]] = {}


def _names(signature: inspect.Signature) -> tuple[list[str], list[str] | None]:
    """
    Returns the parameters that may be given by position, and all; None if those may
    have any name.
    """
    found = _read.get(id(signature))
    if found is None:
        parameters = signature.parameters.values()
        kinds = {each.kind for each in parameters}
        plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
        keyword = inspect.Parameter.KEYWORD_ONLY
        names = [each.name for each in parameters if each.kind is plain]
        known = [*names, *(each.name for each in parameters if each.kind is keyword)]
        # A wrapper takes anything, and passes the audio on first.
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            names = names or ["audio"]
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        found = _read[id(signature)] = signature, names, None if takes_any else known
    return found[1:]


@functools.cache
def signature_of(
    function: Callable[..., object], *, follow_wrapped: bool = True
) -> inspect.Signature:
    """
    Returns the signature of a function of a class without ``self``; of a decorated one
    that of what was decorated, if *follow_wrapped*.
    """
    signature = inspect.signature(function, follow_wrapped=follow_wrapped)
    first, *others = signature.parameters.values()
    if first.kind is first.VAR_POSITIONAL:
        return signature
    return signature.replace(parameters=others)


@functools.cache
def default_lists(
    function: Callable[..., object],
) -> tuple[tuple[str, list[object]], ...]:
    """
    Returns the lists among the defaults of a function of a class, by name.
    """
    parameters = signature_of(function, follow_wrapped=False).parameters.values()
    return tuple((p.name, p.default) for p in parameters if type(p.default) is list)
