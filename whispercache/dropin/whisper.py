"""
LeasedWhisper: CTranslate2's model, as a view that takes a lease for each call.

CTranslate2 guards nothing against use after unload. So programs get no reference to its
model; a call reaches it through a lease, that of its own or that of a longer call
around it.
"""

from __future__ import annotations

import functools
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

from whispercache.devices import heap
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD, Workload
from whispercache.engine.views import in_heap
from whispercache.planning.priority import INTERACTIVE
from whispercache.results import Breaks, call_in_parts, call_leased

from .call import BatchCall, Bound, Here

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ctranslate2 import StorageView
    from ctranslate2.models import (
        WhisperAlignmentResult,
        WhisperGenerationResult,
    )

    from whispercache.engine.api import LoadedModel
    from whispercache.engine.calls.prepare import Prepared
    from whispercache.engine.facts import Facts
    from whispercache.keys import ModelKey
    from whispercache.lease import Lease
    from whispercache.source import ModelSource

    from .made import Made


class LeasedWhisper:
    """
    A view of a model that may be unloaded between two calls on it, and is back for the
    next one. It has what `ctranslate2.models.Whisper` has.

    ``encode``, ``generate``, ``align`` and ``detect_language`` block until the model is
    in memory, and raise what `ModelCache.lease` does. Facts are read from the files.

    Calls go on with results of each other, so all are on the model that the first one
    got, even if that was a ``fallback``. While what ``encode`` returned is in use, the
    model is the last to be evicted, for one second after the call.

    Attributes:
        source: Where leases come from.
        served_by: The model that the last call got; None before the first.
        here: The call that a thread is in, whose lease its calls on this use.
        made: The parts that its object has of the files, once they were made.
    """

    # Of calls by themselves, once there was one.
    _pinned: ModelSource | None = None

    def __init__(self, source: ModelSource) -> None:
        self.source: ModelSource = source
        self.served_by: ModelKey | None = None
        self.here: Here = Here()
        self.made: Made | None = None

    # Leases ---------------------------------------------------------------------------

    def lease(self, workload: Workload) -> Lease:
        """
        Returns a lease on the model. Blocks until it is granted.
        """
        return self._fitting(self.source.lease(workload))

    def _fitting(self, lease: Lease) -> Lease:
        # Not under a lock: with several threads it is any of their last ones.
        self.served_by = lease.key
        if self.made is not None and self.made.fit(lease.loaded):
            vars(self).pop("_facts", None)
        return lease

    def run(self, function: Callable[..., object], ready: Prepared) -> object:
        """
        Calls *function*, which makes calls on this view, with one lease over all of
        them. A lazy result holds it until it is exhausted, closed or collected.
        """
        options = ready.options
        if ready.batch_size is not None:
            options = {**options, "batch_size": ready.batch_size}
        lease = self._fitting(self.source.lease(ready.workload))
        if heap.is_shared():
            keeps = ready.batch_size is None
            function = in_heap(lease.key.device, function, keeps=keeps)
        bound = Bound(self.here, lease, function, ready.samples, options)
        if (level := self.source.terms.priority) >= INTERACTIVE:
            return call_leased(lease, bound)
        bound.kind = BatchCall
        renew = partial(self._renewed, workload=ready.workload)
        return call_in_parts(Breaks(level, bound, renew), lease, bound)

    def _renewed(self, key: ModelKey, *, workload: Workload) -> Lease:
        return self.source.resumed(key).lease(workload)

    # Calls ----------------------------------------------------------------------------

    def encode(
        self,
        features: StorageView,
        to_cpu: bool = False,  # noqa: FBT001, FBT002
    ) -> StorageView:
        """
        Encodes features (batch, mels, frames).
        """
        # No cast() on the way of each call: it is a call, too.
        encoded: StorageView
        call = self.here.call
        if call is not None:
            encoded = _method(call.loaded, "encode")(features, to_cpu)
        else:
            encoded = self._call("encode", (features, to_cpu), {})
        return encoded

    def generate(
        self,
        features: StorageView,
        prompts: Sequence[Sequence[int]] | Sequence[Sequence[str]],
        *,
        asynchronous: bool = False,
        **options: object,
    ) -> list[WhisperGenerationResult] | list[_Done]:
        """
        Generates text from features, or from what `encode` returned.

        With *asynchronous* too it is done when this returns: nothing of the model may
        go on without a lease.
        """
        found: Any
        call = self.here.call
        if call is not None:
            found = _method(call.loaded, "generate")(features, prompts, **options)
        else:
            found = self._call("generate", (features, prompts), options)
        return [_Done(each) for each in found] if asynchronous else found

    def align(
        self,
        features: StorageView,
        start_sequence: Sequence[int],
        text_tokens: Sequence[Sequence[int]],
        num_frames: int | Sequence[int],
        **options: object,
    ) -> list[WhisperAlignmentResult]:
        """
        Aligns tokens with the audio.
        """
        args = (features, start_sequence, text_tokens, num_frames)
        aligned: list[WhisperAlignmentResult] = self._call("align", args, options)
        return aligned

    def detect_language(self, features: StorageView) -> list[list[tuple[str, float]]]:
        """
        Returns the probability of each language, for each of a batch.
        """
        found: list[list[tuple[str, float]]]
        found = self._call("detect_language", (features,), {})
        return found

    def _call(
        self, name: str, args: tuple[object, ...], options: Mapping[str, object]
    ) -> Any:  # noqa: ANN401 - of CTranslate2's types
        call = self.here.call
        if call is not None:
            return _method(call.loaded, name)(*args, **options)
        # Its end may let others have the model before this call.
        self.source.catch_up()
        lease = self._pinned_lease(_workload(name, args, options))
        if name != "encode":
            return call_leased(lease, _Late(lease, name), *args, **options)
        return call_leased(lease, _Sparing(lease), *args)

    def _pinned_lease(self, workload: Workload) -> Lease:
        while True:
            before = self._pinned
            source = before or self.source.lasting()
            lease = self._fitting(source.lease(workload))
            if before is not None:
                return lease
            own = source.pinned_to(lease.key)
            # In one step: another thread may have got another one meanwhile.
            if vars(self).setdefault("_pinned", own) is own:
                return lease
            lease.release()

    # Loading is up to the cache -------------------------------------------------------

    def load_model(self, keep_cache: bool = False) -> None:  # noqa: FBT001, FBT002
        """
        Loads the model now. Blocks until it is in memory. It stays there as long as the
        cache has room for it.
        """
        del keep_cache
        (self._pinned or self).lease(DEFAULT_WORKLOAD).release()

    def unload_model(self, to_cpu: bool = False) -> None:  # noqa: FBT001, FBT002
        """
        Has the model unloaded soon if nobody else uses it; a hint. With *to_cpu* it
        stays where it is, until its memory is needed.
        """
        if not to_cpu:
            (self._pinned or self.source).let_go()

    @property
    def model_is_loaded(self) -> bool:
        """
        True if the model is in memory now, where it may not stay.
        """
        return self._resident() is not None

    def _resident(self) -> LoadedModel | None:
        call = self.here.call
        if call is not None:
            return call.loaded
        return (self._pinned or self.source).resident()

    def _count(self, name: str) -> int:
        # Other facts may not be read of a model that is being unloaded; these need none
        # of its replicas. Source: CTranslate2 python/cpp/replica_pool.h @ 0ea0c41.
        whisper = getattr(self._resident(), "whisper", None)
        return 0 if whisper is None else int(getattr(whisper.model, name))

    @property
    def num_active_batches(self) -> int:
        """
        Number of batches that are queued or at work, those of all users.
        """
        return self._count("num_active_batches")

    @property
    def num_queued_batches(self) -> int:
        """
        Number of batches that are queued.
        """
        return self._count("num_queued_batches")

    # Facts ----------------------------------------------------------------------------

    @functools.cached_property
    def _facts(self) -> Facts:
        from whispercache.engine.facts import facts_of

        return facts_of(self.source.files())

    @property
    def key(self) -> ModelKey:
        """
        The model that the next call is on, as far as that is known.
        """
        call = self.here.call
        return (self._pinned or self.source).key if call is None else call.loaded.key

    @property
    def is_multilingual(self) -> bool:
        """
        True if the model knows other languages than English.
        """
        call = self.here.call
        if call is not None:
            return call.loaded.is_multilingual
        return self._facts.is_multilingual

    @property
    def n_mels(self) -> int:
        """
        Mel bands that the model takes.
        """
        return self._facts.n_mels

    @property
    def num_languages(self) -> int:
        """
        Number of languages that Whisper's tokens are for.
        """
        return self._facts.num_languages

    @property
    def device(self) -> str:
        """
        The kind of device: ``"cpu"`` or ``"cuda"``.
        """
        return self.key.device.partition(":")[0]

    @property
    def device_index(self) -> list[int]:
        """
        The one device of that kind.
        """
        return [int(self.key.device.partition(":")[2] or 0)]

    @property
    def compute_type(self) -> str:
        """
        The type that the model computes in.
        """
        return self.key.compute_type

    @property
    def num_workers(self) -> int:
        """
        Number of calls that run at once.
        """
        return self.key.num_workers

    @property
    def tensor_parallel(self) -> bool:
        """
        False: a cached model is on one device.
        """
        return False

    def __copy__(self) -> LeasedWhisper:
        return LeasedWhisper(self.source)

    def __deepcopy__(self, _memo: object) -> LeasedWhisper:
        return LeasedWhisper(self.source)

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            "a model of a cache cannot be pickled: it belongs to this process. Send "
            "its name, and call get_model() in the other process"
        )

    def __repr__(self) -> str:
        return f"<LeasedWhisper {self.source}>"


class _Late:
    """
    A method of a leased model, looked up when it is called.
    """

    def __init__(self, lease: Lease, name: str) -> None:
        self._lease = lease
        self._name = name

    def __call__(self, *args: object, **options: object) -> object:
        return _method(self._lease.loaded, self._name)(*args, **options)


class _Sparing(_Late):
    """
    ``encode`` of a leased model, whose result needs that model again.
    """

    def __init__(self, lease: Lease) -> None:
        super().__init__(lease, "encode")

    def __call__(self, *args: object, **options: object) -> object:
        output = super().__call__(*args, **options)
        # Before the lease ends, or the model would leave with it.
        end = self._lease.spare()
        weakref.finalize(output, end).atexit = False
        return output


class _Done:
    """
    The result of an asynchronous call that is over.
    """

    def __init__(self, result: object) -> None:
        self._result = result

    def done(self) -> bool:
        """
        True.
        """
        return True

    def result(self) -> object:
        """
        Returns the result.
        """
        return self._result


def _method(loaded: LoadedModel, name: str) -> Callable[..., object]:
    """
    Returns a method of a leased model.

    Raises:
        CorruptModel: its files lack something for that, where CTranslate2 would end the
            process.
    """
    # No name for the model here: the frames of an error would refer to it.
    held: Any = loaded
    if (error := held.whisper.refusals.get(name)) is not None:
        raise error()
    method: Callable[..., object] = getattr(held.whisper.model, name)
    return method


def _workload(
    name: str, args: tuple[object, ...], options: Mapping[str, object]
) -> Workload:
    """
    Returns the work of one call on CTranslate2's model.
    """

    def count(option: str, default: int) -> int:
        value = options.get(option, default)
        # CTranslate2 refuses nonsense itself.
        return value if isinstance(value, int) and value > 0 else default

    windows = args[2] if name == "align" else args[1] if name == "generate" else None
    if windows is None:
        shape: Sequence[int] = getattr(args[0], "shape", ())
        n_windows = int(shape[0]) if len(shape) == 3 else 1  # noqa: PLR2004
    else:
        n_windows = len(cast("Sequence[object]", windows))
    hypotheses = count("num_hypotheses", 1)
    return _known_workload(
        count("beam_size", 5) if name == "generate" else 1,
        hypotheses,
        max(1, n_windows),
        hypotheses > 1,
    )


@functools.lru_cache(maxsize=256)
def _known_workload(
    beam_size: int,
    best_of: int,
    batch_size: int,
    fallback: bool,  # noqa: FBT001
) -> Workload:
    # The audio is the program's own, in memory already.
    return Workload(beam_size, best_of, batch_size, fallback, audio_s=1)
