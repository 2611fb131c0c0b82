"""
Kept models: reloads from them, and their memory, which never delays anything else.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import sys
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import ctranslate2
import faster_whisper
import numpy as np
import pytest
import tokenizers
from children import in_child
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st
from real import (
    SILENCE,
    TEXT,
    at_once,
    child,
    clip,
    decode_audio,
    micro,
    micro_copy,
    model_of,
    packaged,
    plain_model,
    text_of,
)
from tokenizers import Tokenizer

from whispercache import (
    CacheForked,
    Event,
    EvictionCause,
    ModelCache,
    ModelEvicted,
    ModelKey,
    ModelLoaded,
    ModelLoading,
    Workload,
)
from whispercache.engine import process
from whispercache.engine.kept import MOST_KEPT, KeptModel, KeptModels
from whispercache.testing import (
    FakeClock,
    FakeLoader,
    FakeMachine,
    check,
    settle,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import MakeCache
    from faster_whisper import WhisperModel

GIB = 1024**3
PATIENCE_S = 20
OTHER = " another text of others"


@pytest.fixture
def real() -> Iterator[ModelCache]:
    """
    A cache with real models; its books are checked in the end.
    """
    with ModelCache(variants=False) as made:
        yield made
        made._core.check()


def load(cache: ModelCache, directory: Path) -> None:
    """
    Load a real model.
    """
    cache.preload(directory, "cpu", cpu_threads=1)


def said(cache: ModelCache, directory: Path) -> str:
    """
    What a real model answers.
    """
    return text_of(model_of(cache, directory).transcribe(SILENCE)[0])


def tokenizer_of(cache: ModelCache, directory: Path) -> Tokenizer:
    """
    The tokenizer that a real model has now.
    """
    with model_of(cache, directory).lease() as whisper:
        tokenizer = whisper.hf_tokenizer
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer


def kept_bytes(cache: ModelCache, device: str = "cpu") -> int:
    """
    The bytes that are counted for kept models.
    """
    return {each.device: each.shell_bytes for each in cache.devices()}[device]


def heard(cache: ModelCache) -> list[Event]:
    """
    All events from now on.
    """
    events: list[Event] = []
    cache.subscribe(events.append)
    return events


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """
    Tokenizers that are parsed, and models that are constructed.
    """
    done: list[str] = []

    def counted(word: str, call: Callable[..., object], *given: object) -> object:
        done.append(word)
        return call(*given)

    parse = partial(counted, "parsed", Tokenizer.from_buffer)
    counting = types.SimpleNamespace(from_buffer=parse)
    monkeypatch.setattr(tokenizers, "Tokenizer", counting)
    plain = ctranslate2.models.Whisper

    def construct(*given: object, **options: object) -> object:
        return counted("constructed", partial(plain, **options), *given)

    monkeypatch.setattr(process, "whisper", lambda: construct)
    return done


# Real models --------------------------------------------------------------------------


class TestComingBack:
    """
    A model that left is back for the price of its weights.
    """

    def test_nothing_is_parsed_or_constructed(
        self, real: ModelCache, parsed: list[str]
    ) -> None:
        """
        Only the weights are read, and the event says so.
        """
        events = heard(real)
        assert said(real, micro()) == TEXT
        assert sorted(parsed) == ["constructed", "parsed"]
        parsed.clear()
        for _ in range(3):
            assert real.evict() == 1
            assert said(real, micro()) == TEXT
        assert not parsed
        loads = [each.reloaded for each in events if isinstance(each, ModelLoaded)]
        assert loads == [False, True, True, True]

    def test_a_copy_needs_its_weights_constructed_only(
        self, tmp_path: Path, real: ModelCache, parsed: list[str]
    ) -> None:
        """
        The tokenizer is that of the other model, be it in memory or gone.
        """
        load(real, micro())
        load(real, micro_copy(tmp_path / "one"))
        real.evict()
        parsed.clear()
        load(real, micro_copy(tmp_path / "two"))
        assert parsed == ["constructed"]

    def test_a_kept_model_with_other_options_is_not_used(
        self, real: ModelCache
    ) -> None:
        """
        They have other threads, or another compute type.
        """
        events = heard(real)
        for compute_type, workers in (("default", 1), ("default", 2), ("int8", 1)):
            real.preload(
                micro(), "cpu", compute_type, cpu_threads=1, num_workers=workers
            )
            real.evict()
        loads = [each.reloaded for each in events if isinstance(each, ModelLoaded)]
        assert loads == [False, False, False]

    def test_changed_files_get_a_new_tokenizer(
        self, tmp_path: Path, real: ModelCache
    ) -> None:
        """
        New weights, or a new tokenizer.json, are never combined with an old kept model.
        """
        directory = micro_copy(tmp_path / "model")
        assert said(real, directory) == TEXT
        for text in (OTHER, TEXT):
            real.evict()
            micro_copy(directory, text.strip())
            assert said(real, directory) == text
        real.evict()
        path = directory / "tokenizer.json"
        words = path.read_text(encoding="utf-8").replace("hello", "adieu")
        (directory / "new").write_text(words, encoding="utf-8")
        (directory / "new").replace(path)
        assert said(real, directory) == TEXT.replace("hello", "adieu")
        assert real.stats().reloads == 0

    def test_a_kept_model_is_counted(self, real: ModelCache) -> None:
        """
        From the unload until its model comes back, or the cache is closed.
        """
        with model_of(real, micro()).lease():
            assert kept_bytes(real) == 0
        real.evict()
        assert kept_bytes(real) > 0
        (host,) = real.devices()
        assert host.charged_bytes == 0
        load(real, micro())
        assert kept_bytes(real) == 0
        real.evict()
        assert kept_bytes(real) > 0
        real.close()
        assert kept_bytes(real) == 0

    def test_equal_tokenizers_are_counted_once(
        self, tmp_path: Path, real: ModelCache
    ) -> None:
        """
        A second kept model with the same one takes next to nothing.
        """
        load(real, micro())
        real.evict()
        one_bytes = kept_bytes(real)
        load(real, micro_copy(tmp_path / "copy"))
        real.evict()
        assert one_bytes < kept_bytes(real) < 1.6 * one_bytes

    @pytest.mark.process
    @pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
    @pytest.mark.parametrize("name", ["tiny.en", "base"])
    def test_what_is_counted_is_about_what_is_taken(self, name: str) -> None:
        """
        Within 40 % of the growth of anonymous memory, in a process of its own.

        Threads that the system lets wait leave holes in heaps of their own, so that of
        three tries at most the least is looked at.
        """
        grown: list[int] = []
        for _ in range(3):
            done = child(MEASURE, micro(), packaged(name))
            assert done.returncode == 0, done.stderr
            counted_bytes, grown_bytes = map(int, done.stdout.split())
            grown.append(grown_bytes)
            if counted_bytes == pytest.approx(min(grown), rel=0.4):
                break
        assert counted_bytes == pytest.approx(min(grown), rel=0.4)


MEASURE = """
import gc, sys
from whispercache import ModelCache
from whispercache.devices.host import anonymous_bytes, return_free_memory

def held_bytes():
    gc.collect()
    return_free_memory()
    return anonymous_bytes()

with ModelCache(variants=False) as cache:
    def come_and_go(model):
        cache.preload(model, "cpu", cpu_threads=1)
        cache.evict()

    come_and_go(sys.argv[1])  # libraries, and their threads
    cache._core.loader.shrink_kept(0)
    before_bytes = held_bytes()
    come_and_go(sys.argv[2])
    print(cache.devices()[0].shell_bytes, held_bytes() - before_bytes)
"""


class TestTokenizers:
    """
    One tokenizer for all models that have the same tokenizer.json.
    """

    def test_copies_share_one(self, tmp_path: Path, real: ModelCache) -> None:
        """
        As long as one of them is in memory or is kept.
        """
        shared = tokenizer_of(real, micro())
        assert tokenizer_of(real, micro_copy(tmp_path / "copy")) is shared
        real.evict()
        assert tokenizer_of(real, micro_copy(tmp_path / "another")) is shared

    @pytest.mark.parametrize("change", ["words", "format"])
    def test_others_have_their_own(
        self, tmp_path: Path, real: ModelCache, change: str
    ) -> None:
        """
        What is the same in another format counts as another: it costs some memory only.
        """
        directory = micro_copy(tmp_path / "copy")
        path = directory / "tokenizer.json"
        content = path.read_text(encoding="utf-8")
        if change == "format":
            content = json.dumps(json.loads(content), indent=1)
        else:
            content = content.replace("hello", "adieu")
        path.write_text(content, encoding="utf-8")
        assert tokenizer_of(real, directory) is not tokenizer_of(real, micro())
        expected = TEXT.replace("hello", "adieu") if change == "words" else TEXT
        assert (said(real, directory), said(real, micro())) == (expected, TEXT)

    def test_none_stays_that_no_model_has(self, real: ModelCache) -> None:
        """
        It is freed with the last of them, and parsed anew after that.
        """
        alive = weakref.ref(tokenizer_of(real, micro()))
        real.evict()
        gc.collect()
        assert alive() is not None  # the kept model has it
        load(real, micro())
        real._core.loader.shrink_kept(0)
        gc.collect()
        assert alive() is not None  # the model has it
        real.evict()
        real._core.loader.shrink_kept(0)
        gc.collect()
        assert alive() is None
        assert said(real, micro()) == TEXT

    def test_a_closed_cache_keeps_none(self, real: ModelCache) -> None:
        """
        Neither those of its models nor of its kept ones.
        """
        alive = weakref.ref(tokenizer_of(real, micro()))
        real.evict()
        real.close()
        gc.collect()
        assert alive() is None

    def test_who_parses_the_same_at_once_gets_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Though two devices may load at a time.
        """
        both = threading.Barrier(2)

        def parse(content: bytes) -> Tokenizer:
            both.wait(PATIENCE_S)
            return plain(content)

        plain = Tokenizer.from_buffer
        counting = types.SimpleNamespace(from_buffer=parse)
        monkeypatch.setattr(tokenizers, "Tokenizer", counting)
        store, path = KeptModels(), str(micro() / "tokenizer.json")
        one, two = at_once([partial(store.tokenizer, path)] * 2)
        assert one is two


class TestKept:
    """
    The store of kept models itself.
    """

    def test_the_least_recently_left_goes_first(self) -> None:
        """
        One that left again counts from then.
        """
        store = KeptModels()
        for name in [*range(MOST_KEPT), 0]:
            store.keep(key(name), rest())
        kept = store.all()
        store.keep(key("one more"), rest())
        assert len(store.all()) == MOST_KEPT
        assert store.take(key(1)) is None
        assert store.take(key(0)) is kept[-1]
        assert store.take(key(0)) is None

    def test_as_many_go_as_are_too_much(self) -> None:
        """
        The oldest first; the one that is about to be used neither counts nor goes.
        """
        store = KeptModels()
        for name in range(4):
            store.keep(key(name), rest())
        each_bytes = store.n_bytes // 4
        assert store.shrink(3 * each_bytes, {key(0)}) == 0
        assert store.shrink(2 * each_bytes, {key(0)}) == 1
        assert store.take(key(1)) is None
        assert store.shrink(0, {key(0)}) == 2
        assert store.n_bytes == each_bytes
        assert store.shrink(0) == 1
        assert store.n_bytes == 0


def key(name: object) -> ModelKey:
    """
    Of some model.
    """
    return ModelKey(str(name), "cpu", "int8", ())


def rest() -> KeptModel:
    """
    One with a tokenizer of its own, of no model.
    """
    tokenizer = Tokenizer.from_str(json.dumps(EMPTY))
    return KeptModel(None, tokenizer, 1000, None)


EMPTY = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


# One tokenizer, many threads ----------------------------------------------------------


ALPHABET = (
    "abcdefghijklmnopqrstuvwxyz ABC.,!?'0123456789\n\t"
    "äöüßéçñøåžшчяжλπ日本語中文한국어हिन्दीעברية👍🏽🎉\u200d\x00\x7f"
)
PIECES = ("<|endoftext|>", "<|en|>", "<|notimestamps|>", " the", " and", "ing", "  ")


def random_texts(count: int, seed: int) -> list[str]:
    """
    Words and nonsense of many scripts, special tokens among them.
    """
    dice = random.Random(seed)  # noqa: S311 - dice
    choices = [*ALPHABET, *PIECES, *map(chr, range(256))]
    return ["".join(dice.choices(choices, k=dice.randint(0, 40))) for _ in range(count)]


def answers(tokenizer: Tokenizer, text: str) -> tuple[object, ...]:
    """
    All that faster-whisper asks a tokenizer, and some more.
    """
    found = tokenizer.encode(text, add_special_tokens=False)
    number = found.ids[0] if found.ids else 0
    token = tokenizer.id_to_token(number)
    return (
        found.ids,
        found.tokens,
        found.offsets,
        tokenizer.decode(found.ids),
        tokenizer.decode(found.ids, skip_special_tokens=False),
        token,
        tokenizer.token_to_id(token) if token else None,
        tokenizer.token_to_id(text),
        tokenizer.get_vocab_size(),
    )


@pytest.fixture
def _hasty() -> Iterator[None]:
    """
    Threads change places as often as they can.
    """
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


class TestThreads:
    """
    A shared tokenizer answers each thread as it would answer it alone.
    """

    @pytest.mark.usefixtures("_hasty")
    @pytest.mark.parametrize("model", ["base", "micro"])
    def test_each_answer_is_that_of_a_private_one(self, model: str) -> None:
        """
        Eight threads, each with texts of its own and texts that all have.
        """
        directory = micro() if model == "micro" else packaged(model)
        path = str(directory / "tokenizer.json")
        shared, private = KeptModels().tokenizer(path), Tokenizer.from_file(path)
        common = random_texts(200, seed=99)
        texts = [[*common, *random_texts(300, seed)] for seed in range(8)]
        expected = [[answers(private, text) for text in own] for own in texts]

        def ask(own: list[str]) -> list[tuple[object, ...]]:
            return [answers(shared, text) for text in own]

        assert at_once([partial(ask, own) for own in texts]) == expected

    def test_nothing_that_changes_a_tokenizer_is_called(self) -> None:
        """
        By faster-whisper, whatever it is asked for: three methods, none of which does.
        """
        whisper = plain_model(micro())
        used: set[str] = set()
        whisper.hf_tokenizer = Recorder(whisper.hf_tokenizer, used)
        voice = np.zeros(16_000 * 40, np.float32)
        transcribe(
            whisper,
            voice,
            word_timestamps=True,
            initial_prompt="what was said",
            hotwords="bread",
            multilingual=True,
            hallucination_silence_threshold=1.0,
            suppress_tokens=[-1],
        )
        transcribe(whisper, voice, prefix="so", language="en", task="translate")
        whisper.detect_language(voice)
        batched = faster_whisper.BatchedInferencePipeline(whisper)
        clips = [{"start": 0.0, "end": 20.0}, {"start": 20.0, "end": 40.0}]
        words = {"word_timestamps": True, "clip_timestamps": clips, "hotwords": "bread"}
        assert TEXT in text_of(batched.transcribe(voice, **words)[0])
        assert used == {"encode", "decode", "token_to_id"}

    @pytest.mark.slow
    @pytest.mark.usefixtures("_hasty")
    def test_models_that_share_one_say_what_each_alone_says(
        self, tmp_path: Path, real: ModelCache
    ) -> None:
        """
        In four threads, word by word, each with a prompt of its own.
        """
        directories = [micro(), micro_copy(tmp_path / "copy")]
        assert len({id(tokenizer_of(real, each)) for each in directories}) == 1

        def tell(number: int) -> list[object]:
            model = model_of(real, directories[number % 2])
            told: list[object] = []
            for text in random_texts(6, seed=number):
                segments, _ = model.transcribe(
                    SILENCE, initial_prompt=text, word_timestamps=True, hotwords=text
                )
                told.extend(
                    (each.tokens, each.words, each.text, text) for each in segments
                )
            return told

        alone = [tell(number) for number in range(4)]
        assert at_once([partial(tell, number) for number in range(4)]) == alone

    @pytest.mark.slow
    def test_speech_is_heard_alike_with_a_shared_one(
        self, tmp_path: Path, real: ModelCache
    ) -> None:
        """
        By two real models in four threads.
        """
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in packaged("tiny.en").iterdir():
            (copy / path.name).symlink_to(path)
        directories = [packaged("tiny.en"), copy]
        assert len({id(tokenizer_of(real, each)) for each in directories}) == 1
        voice = decode_audio(clip("en-bread"))

        def tell(directory: Path) -> str:
            model = model_of(real, directory)
            return text_of(model.transcribe(voice, beam_size=1, language="en")[0])

        alone = [tell(each) for each in directories]
        assert "bread" in alone[0]
        assert at_once([partial(tell, each) for each in directories * 2]) == alone * 2


class Recorder:
    """
    A tokenizer that notes which of its attributes are used.
    """

    def __init__(self, tokenizer: Tokenizer, used: set[str]) -> None:
        self._tokenizer = tokenizer
        self._used = used

    def __getattr__(self, name: str) -> object:
        self._used.add(name)
        return getattr(self._tokenizer, name)


def transcribe(whisper: WhisperModel, voice: object, **options: object) -> None:
    """
    To the end.
    """
    assert TEXT.split()[0] in text_of(whisper.transcribe(voice, **options)[0])


# Forks --------------------------------------------------------------------------------


FORK = """
import os, signal, sys, warnings
from whispercache import ModelCache
warnings.simplefilter("ignore", DeprecationWarning)  # of threads and forks
cache = ModelCache(variants=False)
cache.preload(sys.argv[1], "cpu", cpu_threads=1)
cache.evict()
assert cache.devices()[0].shell_bytes
kept = cache._core.loader._kept
held = kept._lock if sys.argv[2] == "held" else __import__("threading").Lock()
with held:  # as by the thread of a device, which is not in the child
    pid = os.fork()
    if pid == 0:
        signal.alarm(15)
        sys.exit(7)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
cache.preload(sys.argv[1], "cpu", cpu_threads=1)
assert cache.stats().reloads == 1
cache.close()
"""


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.parametrize("lock", ["free", "held"])
def test_a_forked_child_ends_with_its_parents_kept_models(lock: str) -> None:
    """
    Their threads are not there, and must not be waited for; the parent keeps them.
    """
    done = child(FORK, micro(), lock)
    assert done.returncode == 0, done.stderr


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_cache_with_nothing_but_kept_models_was_used(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    A child cannot use it; the parent's kept models stay.
    """
    loader.shell_size = "1GiB"
    cache = make_cache()
    come_and_go(cache, "base")

    def use() -> str:
        try:
            cache.preload("base", "cpu")
        except CacheForked:
            return "forked"
        return "used"

    assert in_child(use) == "forked"
    assert len(loader.shells) == 1
    assert kept_bytes(cache) == GIB


# Fakes: room for anything else --------------------------------------------------------


def come_and_go(cache: ModelCache, *models: str, device: str = "cpu") -> None:
    """
    Load each model, and let it leave.
    """
    for model in models:
        cache.preload(model, device)
        assert cache.evict(model) == 1


def names(loader: FakeLoader) -> list[str]:
    """
    The models of which something is kept, the oldest first.
    """
    return [each.model for each in loader.shells]


class TestRoom:
    """
    Kept models make room for anything, and count as little as they take.
    """

    @pytest.fixture(autouse=True)
    def _kept(self, loader: FakeLoader) -> None:
        loader.shell_size = "1GiB"

    def test_a_model_that_fits_without_them_is_loaded_at_once(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Nobody leaves for it but they.
        """
        cache = make_cache(ram="8GiB")
        come_and_go(cache, "tiny", "base")
        cache.preload("small", "cpu")
        assert names(loader) == ["tiny", "base"]
        events = heard(cache)
        with loader.holding_loads("large-v3") as gate, ThreadPoolExecutor() as pool:
            loading = pool.submit(cache.preload, "large-v3", "cpu")
            gate.wait_reached()
            assert names(loader) == []
            assert kept_bytes(cache) == 0
            gate.open()
            loading.result(PATIENCE_S)
        assert [type(each) for each in events[:2]] == [ModelLoading, ModelLoaded]
        assert not any(isinstance(each, ModelEvicted) for each in events)

    def test_the_oldest_goes_first(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        And no more of them than must.
        """
        cache = make_cache(ram="8GiB")
        come_and_go(cache, "tiny", "base", "tiny.en", "tiny")
        assert names(loader) == ["base", "tiny.en", "tiny"]
        cache.preload("large-v3", "cpu")
        assert names(loader) == ["tiny.en", "tiny"]
        cache.preload("base.en", "cpu")
        assert names(loader) == ["tiny"]
        assert kept_bytes(cache) == GIB

    def test_its_own_rest_does_not_count(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        It becomes part of the model, so that another's may stay.
        """
        cache = make_cache(ram="7GiB")
        come_and_go(cache, "base", "large-v3")
        cache.preload("large-v3", "cpu")
        assert names(loader) == ["base"]

    @pytest.mark.parametrize("others", [(), ("base", "tiny")])
    def test_a_model_that_takes_all_there_is_comes_back(
        self,
        make_cache: MakeCache,
        machine: FakeMachine,
        loader: FakeLoader,
        monkeypatch: pytest.MonkeyPatch,
        others: tuple[str, ...],
    ) -> None:
        """
        Where its own rest is in the way, that is dropped, and nothing is tried twice.
        """
        machine.total_bytes["cpu"] = 12 * GIB
        most_bytes = int(12 * GIB * 0.95)
        loader.sizes = {"large-v3": most_bytes - GIB // 8}
        readings: list[str] = []
        read = FakeMachine.read

        def counted(self: FakeMachine, device: str) -> object:
            readings.append(device)
            assert len(readings) < 200, "it is put back for ever"
            return read(self, device)

        cache = make_cache()
        come_and_go(cache, "large-v3", *others)
        monkeypatch.setattr(FakeMachine, "read", counted)
        events = heard(cache)
        cache.preload("large-v3", "cpu")
        assert len(readings) < 20
        assert [type(each) for each in events[:2]] == [ModelLoading, ModelLoaded]
        assert loader.loads["large-v3"] == 2
        assert not loader.shells

    def test_work_makes_them_go(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        That of a lease on a model in memory, as far as it needs the room.
        """
        loader.workspace_bytes = GIB // 2
        cache = make_cache(ram="5GiB")
        come_and_go(cache, "tiny", "tiny.en")
        with cache.lease("base", "cpu"):
            assert names(loader) == ["tiny", "tiny.en"]
        four = Workload(batch_size=4)
        with cache.lease("base", "cpu", workload=four):
            settle(cache)
            assert names(loader) == ["tiny", "tiny.en"]
        six = Workload(batch_size=6)
        with cache.lease("base", "cpu", workload=six):
            wait_until(lambda: names(loader) == ["tiny.en"])
        assert len(cache.models()) == 1

    def test_a_model_of_a_card_is_kept_on_the_host(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Where it is counted, and where a load makes it go.
        """
        cache = make_cache(vram="6GiB", ram="6GiB")
        come_and_go(cache, "base", device="cuda:0")
        assert kept_bytes(cache, "cpu") == GIB
        assert kept_bytes(cache, "cuda:0") == 0
        cache.preload("large-v3", "cuda:0")
        assert names(loader) == ["base"]
        cache.preload("large-v3", "cpu")
        assert names(loader) == []

    def test_on_a_full_host_a_card_leaves_none(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        What the limit leaves is all that they may have.
        """
        cache = make_cache(ram="6GiB")
        cache.preload("base", "cuda:0")
        cache.preload("large-v3", "cpu")
        cache.evict("base")
        wait_until(lambda: not loader.shells, "a kept model that is dropped")
        settle(cache)
        assert kept_bytes(cache) == 0

    def test_a_lowered_limit_lets_them_go(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Before any model, and without a request.
        """
        cache = make_cache(ram="8GiB")
        come_and_go(cache, "tiny", "tiny.en")
        cache.preload("medium", "cpu")
        cache.resize(ram="4GiB")
        wait_until(lambda: names(loader) == ["tiny.en"], "a kept model that is dropped")
        cache.resize(ram="3GiB")
        wait_until(lambda: not loader.shells, "the other")
        settle(cache)
        assert kept_bytes(cache) == 0
        assert len(cache.models()) == 1

    def test_other_programs_get_them_first(
        self,
        make_cache: MakeCache,
        machine: FakeMachine,
        loader: FakeLoader,
        clock: FakeClock,
    ) -> None:
        """
        A model leaves only if there is too little without them.
        """
        cache = make_cache(pressure="watch", keep_alive="1h")
        come_and_go(cache, "tiny")
        cache.preload("large-v3", "cpu")
        headroom_bytes = 2 * GIB
        spare_bytes = machine.free_bytes("cpu") - headroom_bytes
        for others_bytes, kept, models in (
            (spare_bytes, 1, 1),
            (spare_bytes + GIB // 2, 0, 1),
            (spare_bytes + GIB, 0, 1),
            (spare_bytes + GIB + 1, 1, 0),  # its own, in the room that it left
        ):
            machine.others("cpu", others_bytes)
            for _ in "12":
                clock.tick(1)
                settle(cache)
            held = (len(loader.shells), len(cache.models()))
            assert held == (kept, models)

    def test_a_load_without_memory_drops_them(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        Before it is tried again.
        """
        cache = make_cache()
        come_and_go(cache, "tiny", "base")
        loader.fail_loads["small"] = [MemoryError("std::bad_alloc")]
        cache.preload("small", "cpu")
        assert not loader.shells
        assert kept_bytes(cache) == 0
        assert cache.stats().load_failures == 0

    def test_other_processes_may_ask_for_them(
        self, make_cache: MakeCache, loader: FakeLoader
    ) -> None:
        """
        The account counts them as idle, and what is asked for they give first.
        """
        cache = make_cache()
        come_and_go(cache, "tiny")
        cache.preload("small", "cpu")
        host = cache._core.devices["cpu"]
        account = cache._core.account(host)
        assert account["held_bytes"] == account["idle_bytes"] == 3 * GIB
        assert account["promised_bytes"] == 0
        cache._core.make_room_for_others(host, GIB)
        wait_until(lambda: not loader.shells)
        settle(cache)
        assert [info.state for info in cache.models()] == ["resident"]
        cache._core.make_room_for_others(host, 1)
        settle(cache)
        assert cache.models() == ()

    def test_a_closed_cache_has_none(
        self, make_cache: MakeCache, machine: FakeMachine, loader: FakeLoader
    ) -> None:
        """
        And all of their memory is back; a second close finds nothing to do.
        """
        cache = make_cache()
        come_and_go(cache, "tiny", "base")
        cache.preload("small", "cuda:0")
        for _ in "12":
            cache.close()
        wait_until(lambda: not loader.shells)
        assert not any(machine.held_bytes.values())
        assert kept_bytes(cache) == 0


names_of_models = st.sampled_from(["tiny", "base", "small", "medium", "large-v3"])


@given(
    steps=st.lists(
        st.tuples(names_of_models, st.sampled_from(["evict", "stay", "stay"])),
        min_size=5,
        max_size=30,
    ),
    kept_gib=st.sampled_from([0.25, 1.0]),
)
@pytest.mark.soak
@settings(max_examples=tries(25))
def test_the_machine_is_never_over_full(
    steps: list[tuple[str, str]], kept_gib: float
) -> None:
    """
    Kept models included: the fake one would raise. Nothing fails or is evicted for it
    that would not without them.
    """
    seen = []
    for n_bytes in (0, int(kept_gib * GIB)):
        machine = FakeMachine({"cpu": 9 * GIB})
        sizes = {"small": "2GiB", "medium": "3GiB", "large-v3": "6GiB"}
        loader = FakeLoader(machine, sizes=sizes, shell_size=n_bytes)
        with ModelCache(loader=loader, probe=machine, clock=FakeClock()) as cache:
            events = heard(cache)
            for model, then in steps:
                cache.lease(model, "cpu").release()
                if then == "evict":
                    cache.evict(model)
                check(cache)
                assert kept_bytes(cache) == sum(loader.shells.values())
            assert cache.stats().load_failures == 0
            assert [each for each in events if cause_of(each) == "out of memory"] == []
            seen.append([(type(each), each.key) for each in events])
        assert not any(machine.held_bytes.values())
    assert seen[0] == seen[1]


def cause_of(event: Event) -> str:
    """
    Why a model left.
    """
    if not isinstance(event, ModelEvicted):
        return ""
    return re.sub("_", " ", EvictionCause(event.cause).value)
