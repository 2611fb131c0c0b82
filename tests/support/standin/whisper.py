"""
A CTranslate2 model on an imaginary card: a real one on the CPU, charged to the card.

How loads and unloads behave is that of python/cpp/replica_pool.h, CTranslate2 4.8:
unload_model may do nothing without a word, a copy on the host is made once and read as
often as it is kept, and each worker gets a copy of its own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ctranslate2

from whispercache.engine.sizes.footprint import Workload, workspace_bytes
from whispercache.engine.sizes.header import read_header
from whispercache.engine.sizes.weights import output_copy_bytes, weights_bytes
from whispercache.errors import UnsupportedComputeType
from whispercache.keys import COMPUTE_TYPES, effective_compute_type

from .conduct import behaviour, card_at, note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache.engine.sizes.header import ModelHeader

__all__ = ["CardWhisper", "RealWhisper"]

RealWhisper = ctranslate2.models.Whisper

_NO_REPLICA = "No model replica is available in this thread"
_UNLOADED = "The model for this translator was unloaded"


class CardWhisper:
    """
    What ``ctranslate2.models.Whisper`` makes for a card, with the same parameters.

    The card is that of *device_index*, only one, and *files* in memory there are none.
    It answers as the CPU does in float32, whatever the compute type.
    """

    def __init__(
        self,
        model_path: str,
        *,
        device_index: int | list[int] = 0,
        compute_type: str = "default",
        inter_threads: int = 1,
        intra_threads: int = 0,
        max_queued_batches: int = 0,
        files: None = None,
        **_options: object,
    ) -> None:
        note("build")
        self._is_built = False  # for __del__, whatever fails here
        self.device = "cuda"
        self.device_index = [_place(device_index)]
        self.num_workers = inter_threads
        self.tensor_parallel = False
        self._cpu = RealWhisper(
            model_path,
            device="cpu",
            compute_type="float32",
            inter_threads=inter_threads,
            intra_threads=intra_threads,
            max_queued_batches=max_queued_batches,
            files=files,
        )
        header = read_header(model_path)  # after the errors of the real one
        self._architecture = header.architecture
        self._compute_type = _effective(compute_type, header)
        self._weights_bytes = weights_bytes(header, self._compute_type, "cuda:0")
        self._held_bytes = self._pad_bytes = self._handles_bytes = 0
        self._has_loaded = self._is_detached = False
        self._copy: bytearray | None = None
        # Of load_model and unload_model, as the original's mutex.
        self._loading = threading.Lock()
        self._counts = threading.Lock()
        self._active = self._refusals = 0
        self._card = card_at(self.device_index[0])
        self._card.start()
        self._take_weights(self._weights_bytes)
        self._is_built = True

    def __del__(self) -> None:
        # What is left at the interpreter's end goes with the process.
        if self._is_built and not sys.is_finalizing():
            note("drop")
            self._give_back_weights()
            if not self._card.is_broken:
                self._card.memory.grow_context(-self._handles_bytes)

    @property
    def compute_type(self) -> str:
        """
        The effective one.
        """
        self._must_have_replica()
        return self._compute_type

    @property
    def is_multilingual(self) -> bool:
        """
        As of the files.
        """
        self._must_have_replica()
        return bool(self._cpu.is_multilingual)

    @property
    def n_mels(self) -> int:
        """
        As of the files.
        """
        self._must_have_replica()
        return int(self._cpu.n_mels)

    @property
    def num_languages(self) -> int:
        """
        As of the files.
        """
        self._must_have_replica()
        return int(self._cpu.num_languages)

    @property
    def num_active_batches(self) -> int:
        """
        Calls that run; for a moment after the end of one it still counts.
        """
        return max(self._active, int(self._cpu.num_active_batches))

    @property
    def num_queued_batches(self) -> int:
        """
        Calls that wait for a worker.
        """
        return int(self._cpu.num_queued_batches)

    @property
    def model_is_loaded(self) -> bool:
        """
        Whether it is on the card. Blocks while it is loaded.
        """
        with self._loading:
            return self._has_loaded

    def encode(self, features: Any, to_cpu: bool = False) -> Any:  # noqa: FBT001, FBT002 - CTranslate2's
        """
        Encode; the first time on a card, compile before.
        """
        with self._call("encode", _NO_REPLICA, _windows(features)):
            self._card.compile(self._compute_type)
            self._take_handles()
            return self._cpu.encode(features, to_cpu)

    def generate(self, features: Any, prompts: Any, **options: Any) -> Any:
        """
        Decode; the first time after a load, copy the output layer before.
        """
        workload = Workload(
            beam_size=options.get("beam_size", 5),
            best_of=options.get("num_hypotheses", 1),
            batch_size=len(prompts),
            fallback=options.get("num_hypotheses", 1) > 1,
        )
        with self._call("generate", _UNLOADED, len(prompts), workload):
            self._take_pad()
            return self._cpu.generate(features, prompts, **options)

    def detect_language(self, features: Any) -> Any:
        """
        As on the CPU.
        """
        with self._call("detect_language", _UNLOADED, _windows(features)):
            return self._cpu.detect_language(features)

    def align(self, features: Any, *arguments: Any, **options: Any) -> Any:
        """
        As on the CPU.
        """
        with self._call("align", _UNLOADED, _windows(features)):
            return self._cpu.align(features, *arguments, **options)

    def unload_model(self, to_cpu: bool = False) -> None:  # noqa: FBT001, FBT002 - CTranslate2's
        """
        Unload, unless a call or a load runs, or it is stubborn: then do nothing.
        """
        if self.num_active_batches or not self._loading.acquire(blocking=False):
            note("unload refused")
            return
        try:
            if not self._has_loaded:
                if not to_cpu:
                    self._drop_copy()
                    self._empty_cpu()
            elif self._refusals < behaviour().stubborn:
                self._refusals += 1
                note("unload refused")
            else:
                self._unload(to_cpu=to_cpu)
        finally:
            self._loading.release()

    def load_model(self, keep_cache: bool = False) -> None:  # noqa: FBT001, FBT002 - CTranslate2's
        """
        Load from the copy, or from the files if there is none.
        """
        with self._loading:
            if self._has_loaded:
                return
            note("load" if self._copy is None else "load copy")
            self._card.start()
            if self._copy is None:
                self._cpu.load_model()
                try:
                    self._take_weights(self._weights_bytes)
                except RuntimeError:
                    self._empty_cpu()
                    raise
            else:
                self._take_weights(len(self._copy))
            if not keep_cache:
                self._drop_copy()

    def _unload(self, *, to_cpu: bool) -> None:
        if to_cpu and self._is_detached:
            os.abort()  # a null pointer, in the original
        if not to_cpu:
            self._drop_copy()
            self._empty_cpu()
        elif self._copy is None:
            if behaviour().copies_fail:
                # The weights are gone, but the flag stays.
                self._is_detached = True
                self._give_back_weights()
                raise MemoryError("std::bad_alloc")
            # Written to, or else the host would not really give the memory.
            self._copy = bytearray(b"\1") * (self._weights_bytes * self.num_workers)
        note("unload to_cpu" if to_cpu else "unload")
        self._give_back_weights()
        self._has_loaded = self._is_detached = False

    def _empty_cpu(self) -> None:
        """
        Unload the model on the CPU, which is nobody's copy now.
        """
        while self._cpu.model_is_loaded:
            self._cpu.unload_model()
            time.sleep(0.0002)

    def _drop_copy(self) -> None:
        if self._copy is not None:
            note("drop copy")
            self._copy = None

    def _take_weights(self, n_bytes: int) -> None:
        self._card.memory.take(n_bytes)
        self._held_bytes = n_bytes
        self._has_loaded = True

    def _give_back_weights(self) -> None:
        n_bytes = self._held_bytes + self._pad_bytes
        self._held_bytes = self._pad_bytes = 0
        self._card.free(max(0, n_bytes - behaviour().leaks_bytes))

    def _take_handles(self) -> None:
        with self._counts:
            n_bytes = behaviour().handles_bytes
            if n_bytes and not self._handles_bytes:
                self._card.memory.grow_context(n_bytes)
                self._handles_bytes = n_bytes

    def _take_pad(self) -> None:
        n_bytes = behaviour().pad_bytes
        if n_bytes is None:
            n_bytes = output_copy_bytes(self._architecture, self._compute_type)
        with self._counts:
            if not self._pad_bytes:
                self._card.memory.take(n_bytes)
                self._pad_bytes = n_bytes

    def _must_have_replica(self) -> None:
        if self._is_detached or not self._has_loaded:
            raise RuntimeError(_NO_REPLICA)

    @contextmanager
    def _call(
        self, name: str, refusal: str, windows: int, workload: Workload | None = None
    ) -> Iterator[None]:
        """
        Count as active, and hold what a call takes of the card.
        """
        with self._counts:
            if not self._has_loaded:
                raise RuntimeError(refusal)
            self._must_have_replica()
            self._active += 1
        try:
            note(name)
            self._card.call()
            n_bytes = self._work_bytes(
                workload or Workload(1, 1, windows, fallback=False)
            )
            self._card.memory.take(n_bytes)
            try:
                yield
            finally:
                self._card.memory.give_back(n_bytes)
        finally:
            with self._counts:
                self._active -= 1

    def _work_bytes(self, workload: Workload) -> int:
        given = behaviour().work_bytes
        if given is not None:
            return given
        return workspace_bytes(
            self._architecture, self._compute_type, "cuda:0", workload
        )


def _place(device_index: int | list[int]) -> int:
    if isinstance(device_index, int):
        return device_index
    if len(device_index) != 1:
        raise ValueError("here a model is on one card")
    return device_index[0]


def _effective(requested: str, header: ModelHeader) -> str:
    """
    What a card computes in; refused in CTranslate2's words.
    """
    if requested not in (*COMPUTE_TYPES, "default", "auto", "int8"):
        raise ValueError(f"Invalid compute type: {requested}")
    saved, supported = header.saved_compute_type, behaviour().compute_types
    try:
        return effective_compute_type(requested, saved, "cuda:0", supported)
    except UnsupportedComputeType as error:
        raise ValueError(
            f"Requested {requested} compute type, but the target device or backend do "
            f"not support efficient {requested} computation."
        ) from error


def _windows(features: Any) -> int:
    """
    How many windows there are in features, or in what came of them: the first axis.
    """
    return int(features.shape[0]) if len(features.shape) == 3 else 1
