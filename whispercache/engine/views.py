"""
Views of a WhisperModel: objects of their own over shared weights.

faster-whisper stores some parameters of a call in the model: ``chunk_length`` stays in
its feature extractor, where the next call, and one that is under way, find it. So each
lease gets a view, and each call on a view another one; what they write is their own.

Views reach the model over a `Bridge`, which is cut when the model is unloaded. So a
view that outlives its lease holds no model and touches no freed memory: one that an
iterator, a running thread or the frames of an error still refer to, say.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

from whispercache.devices import heap

from .calls.parameters import checked
from .calls.signatures import bound, default_lists, signature_of
from .rebound import plain_of, swapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from faster_whisper import WhisperModel

    from whispercache.lease import Lease

    from .rebound import Swaps

    Check: TypeAlias = Callable[[Mapping[str, object]], None]


class _Lending:
    """
    The base of WhisperModels of which views can be made.

    A view looks up what was not set on it, at each use, in the object that it is a view
    of. So a model that is replaced when the interpreter ends is replaced for all its
    views.

    Attributes:
        refusals: What makes the error of a method of CTranslate2's model for which the
            files lack something, by its name.
    """

    refusals: Mapping[str, Callable[[], Exception]] = types.MappingProxyType({})
    _lender: _Lending | Bridge | Seat | None = None
    _check: Check | None = None

    def _lend(self) -> _Lending:
        view: _Lending = object.__new__(type(self))
        if self._lender is not None:
            # Copied: for a name that the class has, too, `__getattr__` is not asked.
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
        # It keeps the chunk_length of a call, so each view has a copy.
        if name == "feature_extractor":
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


class Bridge:
    """
    The one way from views to the attributes of their model.
    """

    __slots__ = ("_whisper",)

    def __init__(self, whisper: WhisperModel) -> None:
        self._whisper: WhisperModel | None = whisper

    def cut(self) -> None:
        """
        Ends it: whatever is looked up from now on is a RuntimeError.
        """
        self._whisper = None

    def kept(self) -> dict[str, object]:
        """
        Returns the attributes that the model set, but its weights.
        """
        whole = vars(self._whisper)
        return {name: value for name, value in whole.items() if name != "model"}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as of a WhisperModel
        if self._whisper is None:
            raise RuntimeError(
                "the model was unloaded after its lease had ended; use it within the "
                "lease, and iterate over its segments there"
            )
        return getattr(self._whisper, name)

    def __dir__(self) -> Iterable[str]:
        return () if self._whisper is None else dir(self._whisper)


class Seat:
    """
    The place of a model behind a view: see `results.Seat`. In the view it stands for
    the bridge to the model, and without one it still has all but its weights.
    """

    def __init__(self, view: _Lending, bridge: Bridge) -> None:
        self._bridge: Bridge | None = bridge
        self._kept: Mapping[str, object] = {}
        self._refill: Callable[[], None] | None = None
        view._lender = self

    def empty(self, refill: Callable[[], None]) -> None:
        """
        Takes the model away until somebody needs it and calls *refill*.
        """
        assert self._bridge is not None
        self._kept = self._bridge.kept()
        self._refill, self._bridge = refill, None

    def put(self, lease: Lease) -> None:
        """
        Puts the model of another lease here.
        """
        bridge = cast("_Lending", lease.whisper)._lender
        assert isinstance(bridge, Bridge)
        self._bridge, self._kept, self._refill = bridge, {}, None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as of a WhisperModel
        if name in self._kept:
            return self._kept[name]
        if self._refill is not None:
            self._refill()
        return getattr(self._bridge, name)

    def __dir__(self) -> Iterable[str]:
        return {*self._kept, *(() if self._bridge is None else dir(self._bridge))}


def seat_of(view: object) -> Seat | None:
    """
    Returns the seat of a lease's *view*; None for models that cannot be lent.
    """
    bridge = view._lender if isinstance(view, _Lending) else None
    if isinstance(view, _Lending) and isinstance(bridge, Bridge):
        return Seat(view, bridge)
    return None


def lends(
    kind: type[WhisperModel], bridge: Bridge, check: Check
) -> Callable[[WhisperModel], WhisperModel]:
    """
    Returns a function that makes views over *bridge*, whose calls *check* their
    parameters; of a class that cannot be lent, as in tests, it returns the model that
    it is given.
    """
    if not issubclass(kind, _Lending):
        return lambda whisper: whisper
    new = object.__new__

    # On the path of each hit, so nothing is looked up here.
    def lend(_whisper: WhisperModel) -> WhisperModel:
        view = new(kind)
        # Set directly: a constructor would cost each hit more time.
        view._lender = bridge
        view._check = check
        return view

    return lend


def is_view(whisper: object) -> bool:
    """
    Returns True for the model of a lease.
    """
    return isinstance(whisper, _Lending)


def own_values(
    function: Callable[..., object],
    args: tuple[object, ...],
    options: Mapping[str, object],
    check: Check | None = None,
) -> tuple[tuple[object, ...], dict[str, object]]:
    """
    Returns the parameters of a call, by position and by name as they were given,
    checked and copied. Those by position are not checked where the method takes any
    number.

    Raises:
        TypeError, ValueError: one of them is nonsense, or *check* refuses it.
    """
    # A decorator may take other parameters than the method that it wraps.
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
    for name, own in own_lists(function).items():
        values.setdefault(name, own)
    return tuple(values.pop(name) for name in names) if names else args, values


def own_lists(function: Callable[..., object]) -> dict[str, list[object]]:
    """
    Returns copies of the lists among the defaults of *function*: each is one object for
    all calls, and callers get it in the info.
    """
    return {name: list(default) for name, default in default_lists(function)}


def in_heap(
    device: str, call: Callable[..., object], *, keeps: bool = True
) -> Callable[..., object]:
    """
    Returns a *call* of a model there after which, and after the last of its segments,
    what it has freed goes back to the system; see `heap.calling`.

    Args:
        device: The kind of device: ``"cpu"`` or ``"cuda"``.
        call: Any function.
        keeps: Until then, what is freed is kept. Blocks of batches differ too much in
            size to be used again.
    """
    if not heap.is_shared() or device != "cpu":
        return call

    def called(*args: object, **options: object) -> object:
        with heap.calling(keeps=keeps):
            result = call(*args, **options)
        if type(result) is tuple and isinstance(result[0], types.GeneratorType):
            return segments(result[0]), *result[1:]
        return result

    def segments(items: Iterable[object]) -> Iterator[object]:
        with heap.calling(keeps=keeps):
            yield from items

    return called


@functools.cache
def lending(base: type[WhisperModel], swaps: Swaps = ()) -> type[WhisperModel]:
    """
    Returns a subclass of faster-whisper's *base* whose models can be lent, and whose
    calls find *swaps*.
    """

    def called(method: str) -> Callable[..., object]:
        @functools.wraps(getattr(base, method))
        def call(self: _Lending, *args: object, **options: object) -> object:
            # Looked up now: programs, and tests, put others in its place.
            plain = getattr(super(made, self._lend()), method)
            if type(plain) is not types.MethodType:
                return plain(*args, **options)
            plain = types.MethodType(plain_of(plain.__func__), plain.__self__)
            args, values = own_values(plain.__func__, args, options, self._check)
            return in_heap(self.model.device, swapped(plain, swaps))(*args, **values)

        return call

    names = ("__doc__", "__module__", "__qualname__")
    attributes = {name: getattr(base, name) for name in names}
    methods = {name: called(name) for name in ("transcribe", "detect_language")}
    made = type(base.__name__, (_Lending, base), {**attributes, **methods})
    return cast("type[WhisperModel]", made)
