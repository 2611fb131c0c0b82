"""
What this package has put in the place of another library's methods and classes.

Not kept as attributes of the replacements: whoever wraps one of them, as programs do,
copies its attributes.
"""

from __future__ import annotations

from typing import Any

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
