"""
Traps of CTranslate2's models in a long-running process, which the cache avoids.

Each test is one trap. Where it is cheap, the trap itself is shown first, without a
cache; what may end in a crash, or is measured in memory, runs in a child process.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ctranslate2.models
import numpy as np
import pytest
from caches import cache_of
from effort import tries
from faster_whisper.transcribe import get_ctranslate2_storage
from real import (
    FEATURES,
    SILENCE,
    TEXT,
    at_once,
    child,
    micro,
    micro_copy,
    model_of,
    packaged,
    plain_model,
    text_of,
)

from whispercache import (
    LeaseDeadlock,
    LeaseTimeout,
    ModelCache,
    ModelEvicted,
    ModelGranted,
    ModelLoaded,
    ModelLoading,
    ModelStillReferenced,
)
from whispercache.engine import process
from whispercache.testing import settle

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

# Longer than a window of 30 s, so that segments come one after the other.
LONG = np.zeros(65 * 16_000, np.float32)

# Read from anywhere else, these freeze the interpreter or crash it.
LOADER_S_OWN = {"load_model", "unload_model", "model_is_loaded", "compute_type"}

HEAVY = (
    "av",
    "ctranslate2",
    "faster_whisper",
    "huggingface_hub",
    "numpy",
    "onnxruntime",
    "pynvml",
    "rich",
    "tokenizers",
)

cache = cache_of()


def measure(code: str, *arguments: str | Path, timeout_s: float = 90) -> list[float]:
    """
    Run *code* in a child after a prelude for measuring, and return what it prints.
    """
    result = child(PRELUDE + code, *arguments, timeout_s=timeout_s)
    assert result.returncode == 0, result.stderr
    numbers: list[float] = json.loads(result.stdout)
    return numbers


# Everything is loaded and used once before the baseline is taken.
PRELUDE = """
import gc, json, sys
import numpy as np
from faster_whisper import WhisperModel
from whispercache import ModelCache
from whispercache.devices.host import anonymous_bytes, return_free_memory

def settled():
    gc.collect()
    return_free_memory()
    return anonymous_bytes()

def held():
    return anonymous_bytes() / 2**20

def options(**more):
    return {"device": "cpu", "cpu_threads": 1, "compute_type": "float32", **more}

silence = np.zeros(16000, np.float32)
"""


class TestUnload:
    """
    ``unload_model`` says nothing when it does nothing.
    """

    def test_right_after_a_call_the_library_does_not_unload(self) -> None:
        """
        The trap: the worker counts as busy for a moment after its result is there.
        """
        model = plain_model(micro()).model
        features = get_ctranslate2_storage(FEATURES[np.newaxis])
        for _ in range(3000):
            model.load_model()
            model.encode(features)
            model.unload_model()
            if model.model_is_loaded:
                return
        pytest.skip("it did unload, 3000 times")

    @pytest.mark.slow
    def test_eviction_right_after_a_call_unloads_every_time(self) -> None:
        """
        300 times: the weights have left, and their bytes are given back once.
        """
        events: list[object] = []
        with ModelCache() as cache:
            cache.subscribe(events.append)
            model: Any = model_of(cache, micro())
            for count in range(1, 301):
                model.encode(FEATURES)
                with model.lease() as whisper:
                    ctranslate2_model = whisper.model
                del whisper
                assert cache.evict() == 1
                assert not ctranslate2_model.model_is_loaded
                assert cache.models() == ()
                assert cache.devices()[0].charged_bytes == 0
                assert cache.stats().evictions == cache.stats().loads == count
        # Such as the one above, which is looked at after its unload on purpose.
        kinds = [type(event) for event in events]
        # Whoever waited for the load is told, too.
        kinds = [kind for kind in kinds if kind is not ModelGranted]
        per_round = [ModelLoading, ModelLoaded, ModelEvicted, ModelStillReferenced]
        assert kinds[: len(per_round)] == per_round
        assert [kind for kind in kinds if kind in per_round[:3]] == per_round[:3] * 300
        assert cache.stats().unconfirmed == 0

    def test_models_are_touched_by_their_device_s_thread_only(
        self, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Asked elsewhere during a load, ``model_is_loaded`` freezes all of Python.
        """
        touched: set[tuple[str, str]] = set()

        class Watched(ctranslate2.models.Whisper):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                touched.add(("__init__", threading.current_thread().name))
                super().__init__(*args, **options)

            def __getattribute__(self, name: str) -> Any:
                if name in LOADER_S_OWN:
                    touched.add((name, threading.current_thread().name))
                return super().__getattribute__(name)

        monkeypatch.setattr(process, "whisper", lambda: Watched)
        model = model_of(cache, micro())

        def use() -> None:
            for _ in range(5):
                assert text_of(model.transcribe(SILENCE)[0]) == TEXT
                with model.lease() as whisper:
                    assert whisper.max_length == model.max_length
                assert model.is_multilingual
                cache.evict()
                repr(cache)
                cache.models()

        at_once([use] * 3)
        assert {name for name, _ in touched} == {"__init__", *LOADER_S_OWN}
        assert {thread for _, thread in touched} == {"whispercache-cpu"}

    def test_facts_are_not_asked_of_the_model(self, cache: ModelCache) -> None:
        """
        CTranslate2 guards its properties against nothing; they were read at the load.
        """
        model = model_of(cache, micro())
        with model.lease():
            (entry,) = cache._core.entries.values()
            assert entry.loaded is not None
            whisper = entry.loaded.whisper
            entry.loaded.whisper = SimpleNamespace()
            try:
                assert model.is_multilingual
                assert len(model.supported_languages) == 99
                assert model.key.compute_type == "float32"
                assert "resident" in repr(cache)
            finally:
                entry.loaded.whisper = whisper

    @pytest.mark.process
    def test_a_hammer_of_calls_and_evictions_does_not_crash(self) -> None:
        """
        Use after unload is memory-unsafe: without leases one such run in three died.
        """
        result = child(HAMMER, micro())
        assert result.returncode == 0, result.stderr
        calls, evictions, errors = json.loads(result.stdout)
        assert errors == []
        assert calls > 50
        assert evictions > 10


HAMMER = """
import json, sys, threading, time
import numpy as np
from whispercache import ModelCache

features = np.zeros((80, 100), np.float32)
calls, errors = [0] * 4, []
with ModelCache() as cache:
    model = cache.get_model(sys.argv[1], "cpu", cpu_threads=1, num_workers=2)
    began_s = time.monotonic()

    def goes_on():  # for so long, and for so many calls, however busy the machine is
        took_s = time.monotonic() - began_s
        return not errors and (took_s < 2 or (sum(calls) <= 50 and took_s < 60))

    def use(place):
        try:
            while goes_on():
                shape = list(model.encode(features).shape)
                assert shape == [1, 50, 32], shape
                assert model.is_multilingual and len(model.supported_languages) == 99
                with model.lease() as whisper:
                    assert whisper.model.n_mels == 80
                calls[place] += 1
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=use, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    while goes_on():
        cache.evict()
    for thread in threads:
        thread.join()
    cache._core.check()
    print(json.dumps([sum(calls), cache.stats().evictions, errors]))
"""


class TestLazySegments:
    """
    ``transcribe`` returns before the work is done.
    """

    def test_the_library_unloads_in_mid_transcription(self) -> None:
        """
        The trap: the next segment fails, and the one after that is a silent end.
        """
        model = plain_model(micro())
        segments, _ = model.transcribe(LONG)
        assert next(segments).text == TEXT
        while model.model.model_is_loaded:
            model.model.unload_model()
        with pytest.raises(RuntimeError, match=r"No model replica|unloaded"):
            next(segments)
        assert list(segments) == []

    def test_a_model_in_mid_transcription_is_not_unloaded(
        self, cache: ModelCache
    ) -> None:
        """
        Eviction waits for the last segment, or gives up.
        """
        segments, _ = model_of(cache, micro()).transcribe(LONG)
        texts = [next(segments).text]
        with pytest.raises(LeaseTimeout):
            cache.evict(timeout_s=0)
        evicted: list[int] = []
        thread = threading.Thread(target=lambda: evicted.append(cache.evict()))
        thread.start()
        texts += [segment.text for segment in segments]
        thread.join(30)
        assert texts == [TEXT] * 3
        assert evicted == [1]

    def test_an_idle_timeout_does_not_end_a_transcription(self) -> None:
        """
        The clock of the keep-alive starts when the last segment was read.
        """
        with ModelCache(keep_alive=0) as cache:
            segments, _ = model_of(cache, micro()).transcribe(LONG)
            for _ in range(3):
                assert next(segments).text == TEXT
                assert [info.leases for info in cache.models()] == [1]
            assert list(segments) == []
            settle(cache)
            assert cache.models() == ()

    def test_room_is_not_made_by_ending_a_transcription(self) -> None:
        """
        A model that has to wait for room does so until the last segment.
        """
        with ModelCache(max_models=1) as cache:
            segments, _ = model_of(cache, micro()).transcribe(LONG)
            next(segments)
            other = model_of(cache, micro("the other one"), timeout_s=0.01)
            # The holder is this very thread, which a busy machine may see first.
            with pytest.raises((LeaseTimeout, LeaseDeadlock)):
                other.transcribe(SILENCE)
            assert text_of(segments) == TEXT * 2
            patient = model_of(cache, micro("the other one"))
            assert text_of(patient.transcribe(SILENCE)[0]) == " the other one"

    def test_segments_that_failed_do_not_end_in_silence(
        self, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A generator that raised just ends the next time: half a text, and no error.
        """
        model = model_of(cache, micro())
        segments, _ = model.transcribe(LONG)
        assert next(segments).text == TEXT
        monkeypatch.setattr(type(model), "encode", failing, raising=False)
        with pytest.raises(RuntimeError, match="the card fell off the bus"):
            next(segments)
        monkeypatch.undo()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"ended early.*fell off the bus"):
                next(segments)
        assert cache.stats().leases == 0
        assert cache.evict() == 1


def failing(*_: object) -> None:
    """
    What a model's encoder may do.
    """
    raise RuntimeError("the card fell off the bus")


class TestMemory:
    """
    Memory that was freed, and is not returned.
    """

    @pytest.mark.process
    def test_memory_comes_back_after_eviction(self) -> None:
        """
        Of tiny.en, 148 MiB; 50 times over, without any growth.
        """
        base, loaded, first, last = measure(CYCLES, packaged("tiny.en"))
        assert loaded - base > 130
        assert first - base < 10
        assert last - first < 4

    @pytest.mark.process
    def test_a_stored_exception_does_not_keep_the_weights(self) -> None:
        """
        Nor does its traceback, whose frames refer to the model.
        """
        base, loaded, evicted = measure(STORED, packaged("tiny.en"))
        assert loaded - base > 130
        assert evicted - base < 40

    @pytest.mark.process
    def test_a_failed_load_does_not_keep_the_weights(self, tmp_path: Path) -> None:
        """
        The tokenizer is read last: all of the weights were there when it failed.
        """
        shutil.copytree(packaged("tiny.en"), tmp_path / "model")
        tokenizer = tmp_path / "model" / "tokenizer.json"
        whole = tokenizer.read_bytes()
        tokenizer.unlink()
        tokenizer.write_bytes(whole[:-9])  # further up, it is refused before a load
        base, failed = measure(FAILED, tmp_path / "model")
        assert failed - base < 20

    def test_spellings_of_one_model_are_loaded_once(
        self, cache: ModelCache, tmp_path: Path
    ) -> None:
        """
        Paths, links and compute types that come to the same.
        """
        model = micro_copy(tmp_path / "model")
        (tmp_path / "link").symlink_to(model)
        spellings: list[tuple[str | Path, str]] = [
            (str(model), "int8"),
            (model, "int8_float32"),
            (f"{model}/", "auto"),
            (tmp_path / "link", "int8"),
        ]
        leases = [
            cache.lease(path, "cpu", compute_type, cpu_threads=1)
            for path, compute_type in spellings
        ]
        assert len({id(lease.loaded.whisper) for lease in leases}) == 1
        assert (cache.stats().loads, len(cache.models())) == (1, 1)
        for lease in leases:
            lease.release()

    @pytest.mark.process  # a variant of it is built
    def test_threads_that_want_one_model_load_it_once(self, cache: ModelCache) -> None:
        """
        ``lru_cache`` around a constructor loads it once for each.
        """
        events: list[object] = []
        cache.subscribe(events.append)

        def use() -> int:
            model = model_of(cache, packaged("tiny.en"))
            with model.lease() as whisper:
                return id(whisper.model)

        assert len(set(at_once([use] * 8))) == 1
        assert sum(isinstance(event, ModelLoading) for event in events) == 1
        assert cache.stats().loads == 1


CYCLES = """
with ModelCache() as cache:
    model = cache.get_model(sys.argv[1], **options())
    model.lease().release()
    cache.evict()
    base = settled() / 2**20
    after = []
    for _ in range(50):
        with model.lease():
            loaded = held()
        cache.evict()
        after.append(held())
    print(json.dumps([base, loaded, min(after[:5]), min(after[-5:])]))
"""

STORED = """
def broken(*_):
    raise RuntimeError("stop")

stored = []
with ModelCache() as cache:
    warm = cache.get_model(sys.argv[1], **options())
    list(warm.transcribe(silence, beam_size=1)[0])
    cache.evict()
    base = settled() / 2**20
    segments, _ = warm.transcribe(silence, beam_size=1)
    loaded = held()
    try:
        WhisperModel.encode = broken
        next(segments)
    except RuntimeError as error:
        stored.append(error)
    cache.evict()
    print(json.dumps([base, loaded, held()]))
"""

FAILED = """
stored = []
with ModelCache() as cache:
    model = cache.get_model(sys.argv[1], **options())
    for _ in range(2):
        base = settled() / 2**20
        try:
            model.lease()
        except Exception as error:
            stored.append(error)
    assert len(stored) == 2 and cache.stats().load_failures == 2
    print(json.dumps([base, held()]))
"""


@pytest.mark.process
class TestExit:
    """
    The end of a process that has models in memory.
    """

    @pytest.mark.parametrize(
        ("size", "state"),
        [
            *itertools.product(
                ("micro",),
                ("idle", "unconsumed", "begun", "leased", "loading", "evicting"),
            ),
            # What takes a while: work, loads and unloads of real weights.
            *itertools.product(("tiny.en",), ("begun", "loading", "evicting")),
            ("base", "used"),
        ],
    )
    def test_a_process_ends_soon_and_cleanly(self, size: str, state: str) -> None:
        """
        Exit code 0 and no traceback, whatever its models are doing; twice at a time.

        If the interpreter ends while a thread is inside CTranslate2, it aborts.
        """
        directory = micro() if size == "micro" else packaged(size)

        def run() -> tuple[float, subprocess.CompletedProcess[str]]:
            result = child(EXIT, directory, state)
            return time.time(), result

        for ended_s, result in at_once([run] * tries(2)):
            # CTranslate2 warns that float16 becomes float32 here.
            errors = re.sub(r"(?m)^\[.*\[ctranslate2\].*$", "", result.stderr)
            assert (result.returncode, errors.strip()) == (0, "")
            assert ended_s - float(result.stdout) < 15


EXIT = """
import sys, threading, time
from contextlib import suppress
import numpy as np
from whispercache import CacheClosed, default_cache, get_model

path, state = sys.argv[1:]
silence = np.zeros(16000, np.float32)
options = {"language": "en", "beam_size": 1, "temperature": 0, "max_new_tokens": 4}
model = get_model(path, "cpu")

def load():
    with suppress(CacheClosed):
        model.lease()

if state != "loading":
    model.lease().release()
if state == "used":
    list(model.transcribe(silence, language="en")[0])
elif state == "unconsumed":
    segments, _ = model.transcribe(silence, **options)
elif state == "begun":
    segments, _ = model.transcribe(np.tile(silence, 65), **options)
    next(segments, None)
elif state == "leased":
    lease = model.lease()
elif state == "loading":
    begun = threading.Event()
    default_cache().subscribe(lambda event: begun.set())
    threading.Thread(target=load, daemon=True).start()
    assert begun.wait(30)
elif state == "evicting":
    threading.Thread(target=default_cache().evict, daemon=True).start()
print(time.time())
"""


@pytest.mark.process
class TestImport:
    """
    What `import whispercache` takes.
    """

    def test_importing_the_package_imports_nothing_heavy(self) -> None:
        """
        Not until a model is asked for.
        """
        result = child(
            "import sys, whispercache\n"
            f"print(sorted({set(HEAVY)!r} & set(sys.modules)))"
        )
        assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr

    def test_importing_the_package_is_quick(self, record_property: Any) -> None:
        """
        The ratio to faster-whisper's own import goes into the report.
        """
        code = "import time; a = time.perf_counter(); import {}; "
        code += "print(time.perf_counter() - a)"
        names = ("whispercache", "faster_whisper")
        seconds = [float(child(code.format(name)).stdout) for name in names]
        record_property("import_ratio", seconds[0] / seconds[1])
        assert all(seconds)
