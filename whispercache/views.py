"""
Views: a WhisperModel of one's own over weights that are shared.

faster-whisper keeps what a call asked for in the model: ``chunk_length`` stays in its
feature extractor, where the next call, and one that is under way, find it. So each
lease gets a view, and each call on a view another one; what they write is their own.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import TYPE_CHECKING, Any, cast

from .parameters import own_values
from .rebound import rebound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from faster_whisper import WhisperModel

__all__ = ["lending", "view_of"]


class _Lending:
    """
    What a WhisperModel needs, so that views can be made of it.

    Attributes:
        n_tokens: How many tokens it has, if somebody has said so.
    """

    n_tokens: int | None = None
    _lender: _Lending | None = None

    def lend(self) -> _Lending:
        """
        A view: all that this one has, until something else is set on it.
        """
        view = object.__new__(type(self))
        # A copy: what is set on this one may stand before what its class has.
        mine = vars(view)
        mine.update(vars(self))
        mine.pop("model", None)
        mine.pop("feature_extractor", None)
        view._lender = self
        return view

    # Looked up where it was lent: whoever takes the model away at the interpreter's
    # end, or takes note of who still refers to it, must find all who use it.
    @property
    def model(self) -> Any:  # noqa: ANN401 - CTranslate2 has no types
        """
        CTranslate2's part of it.
        """
        mine = vars(self)
        if "model" not in mine and self._lender is not None:
            return self._lender.model
        return _present(mine, "model")

    @model.setter
    def model(self, value: object) -> None:
        vars(self)["model"] = value

    @property
    def feature_extractor(self) -> Any:  # noqa: ANN401 - nor has faster-whisper
        """
        What turns samples into features; copied when it is first looked at.
        """
        mine = vars(self)
        if "feature_extractor" not in mine and self._lender is not None:
            mine["feature_extractor"] = copy.copy(self._lender.feature_extractor)
        return _present(mine, "feature_extractor")

    @feature_extractor.setter
    def feature_extractor(self, value: object) -> None:
        vars(self)["feature_extractor"] = value


def _present(attributes: Mapping[str, object], name: str) -> object:
    if name not in attributes:
        raise AttributeError(f"a WhisperModel that was not built has no {name!r}")
    return attributes[name]


def view_of(whisper: WhisperModel, n_tokens: int | None = None) -> WhisperModel:
    """
    A view of a model that can be lent; another one itself, as in tests.

    Args:
        whisper: The model.
        n_tokens: How many tokens it has, if that is known.
    """
    if not isinstance(whisper, _Lending):
        return whisper
    view = whisper.lend()
    view.n_tokens = n_tokens
    return cast("WhisperModel", view)


@functools.cache
def lending(
    base: type[WhisperModel], **names: Callable[..., object]
) -> type[WhisperModel]:
    """
    The class *base* of models that can be lent.

    Args:
        base: faster-whisper's.
        names: What its calls should find behind these names; see `rebound`.
    """

    def called(method: str) -> Callable[..., object]:
        @functools.wraps(getattr(base, method))
        def call(self: _Lending, *args: object, **options: object) -> object:
            # Looked up now: programs, and tests, put others in its place.
            plain = getattr(base, method)
            if not isinstance(plain, types.FunctionType):
                return plain(self.lend(), *args, **options)
            own_args, values = own_values(plain, args, options, self.n_tokens)
            if names.keys() & plain.__globals__.keys():
                plain = rebound(plain, **names)
            return plain(self.lend(), *own_args, **values)

        return call

    methods = ("transcribe", "detect_language")
    attributes = {"__doc__": base.__doc__, **{each: called(each) for each in methods}}
    return cast("type[WhisperModel]", type(base.__name__, (_Lending, base), attributes))
