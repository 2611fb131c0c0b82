"""
The turns of a comparison: each model on each file, model by model.

A model is leased once for all of its files and unloaded when they are done, so that the
models do not disturb each other's figures. Each result is kept at once.
"""

from __future__ import annotations

import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from whispercache.engine.calls.prepare import workload_of
from whispercache.errors import AudioError, CacheClosed
from whispercache.transcripts import Cue

from .gauge import Gauge
from .plan import one_line
from .store import LoadRecord, Store, fingerprint
from .values import Failure, ModelFailure, Progress, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from whispercache.cache import ModelCache
    from whispercache.lease import Lease

    from .plan import Entrant, Input

_RATE_HZ = 16_000
_WARM_TOKENS = 8


class _ModelFailed(Exception):
    """
    A failure that ends a model's turn; its text is the reason.
    """


@dataclass(frozen=True, slots=True)
class Findings:
    """
    The findings of a run, before they are scored: for each model its load, in this run
    or an earlier one, and its results. *loaded* are the models that this run loaded.
    """

    entrants: tuple[Entrant, ...]
    loads: dict[str, LoadRecord]
    results: tuple[Result, ...]
    failures: tuple[Failure, ...]
    loaded: frozenset[str]


@dataclass(slots=True)
class Run:
    """
    A comparison on its way; *spent* of the estimated *work* is done.
    """

    cache: ModelCache
    call: dict[str, object]
    load_options: dict[str, object]
    entrants: Sequence[Entrant]
    inputs: Sequence[Input]
    failures: list[Failure]
    store: Store
    progress: Callable[[Progress], None] | None = None
    failed: list[ModelFailure] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    done: int = 0  # pairs of a model and a file
    spent: float = 0.0
    work: float = 0.0
    _told: BaseException | None = None  # the listener's own error

    def run(self) -> None:
        """
        Finds the results that are missing.
        """
        # Counted before the first model, so that progress has a total.
        self.done = len(self.entrants) * len(self.inputs)
        for entrant in self.entrants:
            missing = self._missing(entrant)
            self.done -= len(missing)
            self.work += _work(entrant, missing)
        for entrant in self.entrants:
            if missing := self._missing(entrant):
                try:
                    self._session(entrant, missing)
                except _ModelFailed as failed:
                    # The other models go on. Its results are kept for another run, but
                    # compared with nothing, since it has other files than the rest.
                    self.failed.append(ModelFailure(entrant.name, str(failed)))
                    missing = self._missing(entrant)
                    self.spent += _work(entrant, missing)
                    self.done -= len(self.inputs) - len(missing)

    def findings(self) -> Findings:
        """
        Returns all findings, of this run and of earlier ones.
        """
        bad = {failure.file for failure in self.failures}
        out = {failure.model for failure in self.failed}
        entrants = [entrant for entrant in self.entrants if entrant.name not in out]
        results = []
        for entrant in entrants:
            for each in self.inputs:
                found = self.store.results.get(self._key(entrant, each))
                if found is not None and each.file not in bad:
                    # An earlier run may have used other names.
                    found = replace(found, model=entrant.name, file=each.file)
                    results.append(found)
        none = LoadRecord(0.0, 0.0, 0, None)
        return Findings(
            entrants=tuple(entrants),
            loads={
                entrant.name: self.store.loads.get(entrant.identity) or none
                for entrant in entrants
            },
            results=tuple(results),
            failures=tuple(self.failures),
            loaded=frozenset(self.loaded),
        )

    def _missing(self, entrant: Entrant) -> list[Input]:
        bad = {failure.file for failure in self.failures}
        return [
            each
            for each in self.inputs
            if each.file not in bad
            and self._key(entrant, each) not in self.store.results
        ]

    def _key(self, entrant: Entrant, each: Input) -> str:
        return fingerprint(each.content, entrant.identity, self.call)

    def _session(self, entrant: Entrant, missing: Sequence[Input]) -> None:
        key = entrant.key
        place = (key.model, key.device, key.compute_type)
        self._tell("loading", entrant)
        self.cache.evict(*place)
        try:
            with Gauge(self.cache.probe, key.device) as gauge:
                self._hold(entrant, missing, gauge)
        finally:
            self.cache.evict(*place)

    def _hold(self, entrant: Entrant, missing: Sequence[Input], gauge: Gauge) -> None:
        from whispercache.engine.audio.decoder import read_audio

        spec, key = entrant.spec, entrant.key
        with self._blaming():
            lease = self.cache.lease(
                spec.model,
                key.device,
                spec.compute_type,
                workload=workload_of(self.call, None),
                # Its figures would be those of another model.
                fallback=(),
                **self.load_options,  # type: ignore[arg-type]
            )
        with lease as whisper:
            self.loaded.append(entrant.name)
            self._tell("warming up", entrant)
            with self._blaming():
                load = self._warm(entrant, whisper, gauge)
            self.store.add_load(entrant.identity, load)
            for each in missing:
                try:
                    audio = read_audio(each.file)
                except (AudioError, OSError) as error:
                    reason = getattr(error, "reason", None) or str(error)
                    # For all models: the file is passed over from now on.
                    self.failures.append(Failure(each.file, reason))
                    continue
                # Forgets the growth by decoding.
                gauge.take_peak()
                with self._blaming(each.file):
                    heard = self._try_to_hear(entrant, each, lease, audio.samples)
                damage = str(audio.damage or "")
                heard = replace(heard, peak_bytes=gauge.take_peak(), damage=damage)
                self._keep(entrant, each, heard)

    @contextmanager
    def _blaming(self, file: str = "") -> Iterator[None]:
        """
        Turns any error into the model's own, but for one of the progress listener, a
        parameter that no model has, and the end of the cache.
        """
        try:
            yield
        except (CacheClosed, TypeError):
            raise
        except Exception as error:
            if error is self._told:
                raise
            reason = one_line(error)
            raise _ModelFailed(f"{reason} (at {file})" if file else reason) from error

    def _try_to_hear(
        self, entrant: Entrant, each: Input, lease: Lease, samples: NDArray[np.float32]
    ) -> Result:
        try:
            heard = self._hear(entrant, each, lease.whisper, samples)
        except Exception as error:
            # After a shortage of memory, what is idle makes room.
            if not lease.recover(error):
                raise
            traceback.clear_frames(error.__traceback__)
            heard = self._hear(entrant, each, lease.whisper, samples)
        if not lease.loaded.is_multilingual:
            # It knows one language, and is always sure.
            heard = replace(heard, certainty=None)
        return heard

    def _warm(
        self, entrant: Entrant, whisper: WhisperModel, gauge: Gauge
    ) -> LoadRecord:
        """
        Makes the first call, which allocates buffers and opens libraries. A few words
        at most: some models tell long stories about silence.
        """
        import numpy as np

        # Leased, so it is there.
        (info,) = (each for each in self.cache.models() if each.key == entrant.key)
        started_s = time.perf_counter()
        call = {**self.call, "max_new_tokens": _WARM_TOKENS}
        silence = np.zeros(_RATE_HZ, np.float32)
        segments, _ = whisper.transcribe(silence, **call)
        # Lazy: nothing is computed before.
        for _ in segments:
            pass
        return LoadRecord(
            load_s=info.load_s,
            warm_up_s=time.perf_counter() - started_s,
            weights_bytes=info.weights_bytes,
            peak_bytes=gauge.take_peak(),
        )

    def _hear(
        self,
        entrant: Entrant,
        each: Input,
        whisper: WhisperModel,
        samples: NDArray[np.float32],
    ) -> Result:
        self._tell("listening", entrant, each)
        latency_s, told_s = None, 0.0
        started_s = time.perf_counter()
        segments, info = whisper.transcribe(samples, **self.call)
        cues = []
        for segment in segments:
            if latency_s is None:
                latency_s = time.perf_counter() - started_s
            cues.append(Cue(segment.start, segment.end, segment.text))
            heard_s = time.perf_counter()
            # Of the audio; silence at its end makes no segment.
            share = segment.end * _RATE_HZ / len(samples)
            self._tell("listening", entrant, each, share)
            told_s += time.perf_counter() - heard_s
        # The listener takes time too, which is not the model's.
        work_s = time.perf_counter() - started_s - told_s
        is_told = self.call["language"] is not None
        certainty = None if is_told else float(info.language_probability)
        return Result(
            model=entrant.name,
            file=each.file,
            language=info.language,
            certainty=certainty,
            text="".join(cue.text for cue in cues).strip(),
            cues=tuple(cues),
            duration_s=len(samples) / _RATE_HZ,
            work_s=work_s,
            latency_s=latency_s,
            peak_bytes=None,
        )

    def _keep(self, entrant: Entrant, each: Input, result: Result) -> None:
        self.store.add_result(self._key(entrant, each), result)
        self.spent += entrant.cost * each.size_bytes
        self.done += 1
        self._tell("done", entrant, each, result=result)

    def _tell(
        self,
        stage: str,
        entrant: Entrant,
        each: Input | None = None,
        share: float = 0.0,
        result: Result | None = None,
    ) -> None:
        if self.progress is None:
            return
        total = (len(self.entrants) - len(self.failed)) * len(self.inputs)
        size_bytes = 0 if each is None else each.size_bytes
        spent = self.spent + entrant.cost * size_bytes * min(1.0, share)
        step = Progress(
            stage=stage,
            model=entrant.name,
            file="" if each is None else each.file,
            done=self.done,
            total=total,
            fraction=min(1.0, spent / self.work) if self.work else 1.0,
            share=1.0 if result else min(1.0, share),
            result=result,
        )
        try:
            self.progress(step)
        except Exception as error:
            self._told = error
            raise


def _work(entrant: Entrant, inputs: Sequence[Input]) -> int:
    return sum(entrant.cost * each.size_bytes for each in inputs)
