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
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

from .calls.parameters import checked
from .calls.signatures import bound, signature_of
from .rebound import swapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from faster_whisper import WhisperModel

    from .rebound import Swaps

    Check: TypeAlias = Callable[[Mapping[str, object]], None]

__all__ = ["lending", "lends", "own_values"]


class _Lending:
    """
    The part of a WhisperModel that lets views be made of it.

    A view has what was set on it, and all else from where it was lent, looked up at
    each use: whoever takes the model away at the interpreter's end, or takes note of
    who still refers to it, finds all who use it there.
    """

    _lender: _Lending | None = None
    _check: Check | None = None

    def _lend(self) -> _Lending:
        view: _Lending = object.__new__(type(self))
        if self._lender is not None:
            # A copy: what is set on this one may stand before what its class has.
            mine = vars(view)
            mine.update(vars(self))
            mine.pop("feature_extractor", None)
        view._lender = self
        return view

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as of a WhisperModel
        lender = self._lender
        if lender is None:
            kind = type(self).__name__
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        value = getattr(lender, name)
        if name == "feature_extractor":  # keeps what a call asked for
            value = vars(self)[name] = copy.copy(value)
        return value

    def __dir__(self) -> Iterable[str]:
        lender = self._lender
        return {*super().__dir__(), *([] if lender is None else dir(lender))}

    def __copy__(self) -> _Lending:
        return self._lend()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            "a WhisperModel of a lease cannot be pickled or copied deeply: its weights "
            "are in this process. Send its name, and lease it in the other process"
        )


def lends(
    kind: type[WhisperModel], check: Check
) -> Callable[[WhisperModel], WhisperModel]:
    """
    A function that makes a view of a model that can be lent, and leaves another one as
    it is, as in tests.

    Args:
        kind: The class of the model.
        check: Raises what is wrong with the parameters of a call, given by name.
    """
    if not issubclass(kind, _Lending):
        return lambda whisper: whisper
    new = object.__new__

    # Each hit comes by here; so nothing is looked up.
    def lend(whisper: WhisperModel) -> WhisperModel:
        view = new(kind)
        view._lender = whisper
        view._check = check
        return view

    return lend


def own_values(
    function: Callable[..., object],
    args: tuple[object, ...],
    options: Mapping[str, object],
    check: Check | None = None,
) -> tuple[tuple[object, ...], dict[str, object]]:
    """
    The parameters of a call of a method, by position and by name as they were given,
    checked and copied.

    Those by position are left as they are where the method takes any number of them.

    Args:
        function: The method of the class.
        args: Those by position.
        options: Those by name.
        check: Raises what is wrong with them, by name, for one model.

    Raises:
        TypeError, ValueError: one of them is nonsense.
    """
    # What a decorator takes and passes on is its own affair.
    signature = signature_of(function, follow_wrapped=False)
    parameters = signature.parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        values = checked(options)
        names = []
    else:
        values = checked(bound(signature, args, options))
        names = [each.name for each in parameters][: len(args)]
    if check is not None:
        check(values)
    for each in parameters:
        # The one list of all calls of the process would leave with the info.
        if isinstance(each.default, list):
            values.setdefault(each.name, list(each.default))
    return tuple(values.pop(name) for name in names) if names else args, values


@functools.cache
def lending(base: type[WhisperModel], swaps: Swaps = ()) -> type[WhisperModel]:
    """
    The class *base* of models that can be lent.

    Args:
        base: faster-whisper's.
        swaps: What its calls should find in place of some functions; see `swapped`.
    """

    def called(method: str) -> Callable[..., object]:
        @functools.wraps(getattr(base, method))
        def call(self: _Lending, *args: object, **options: object) -> object:
            # Looked up now: programs, and tests, put others in its place.
            plain = getattr(super(made, self._lend()), method)
            if type(plain) is not types.MethodType:
                return plain(*args, **options)
            args, values = own_values(plain.__func__, args, options, self._check)
            return swapped(plain, swaps)(*args, **values)

        return call

    names = ("__doc__", "__module__", "__qualname__")
    attributes = {name: getattr(base, name) for name in names}
    methods = {name: called(name) for name in ("transcribe", "detect_language")}
    made = type(base.__name__, (_Lending, base), {**attributes, **methods})
    return cast("type[WhisperModel]", made)
