"""
Loads and unloads of real models: files of all kinds, and audio of all kinds.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faster_whisper.transcribe
import numpy as np
import pytest
from caches import cache_of
from real import (
    FEATURES,
    SILENCE,
    TEXT,
    clip,
    decode_audio,
    micro,
    micro_copy,
    model_of,
    text_of,
)

from whispercache import (
    AudioError,
    CorruptModel,
    LoadFailed,
    ModelCache,
    ModelKey,
    UnknownModel,
    WhisperCacheError,
)
from whispercache.devices.probe import SystemProbe
from whispercache.engine.files import ModelFiles
from whispercache.engine.kept import MOST_KEPT
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.store import ModelStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.engine.api import LoadedModel

OTHER = " another text of others"


@pytest.fixture
def loader() -> FasterWhisperLoader:
    """
    A loader of its own.
    """
    return FasterWhisperLoader(SystemProbe())


cache = cache_of()


def key_of(directory: Path, compute_type: str = "float32") -> ModelKey:
    """
    The key of a model on the CPU.
    """
    options = (("cpu_threads", 1),)
    return ModelKey(os.path.realpath(directory), "cpu", compute_type, options)


def located(loader: FasterWhisperLoader, directory: Path) -> ModelFiles:
    """
    The files of a directory.
    """
    files = loader.locate(os.path.realpath(directory), {}, download=False)
    assert files is not None
    return files


def load(loader: FasterWhisperLoader, directory: Path) -> LoadedModel:
    """
    A model of *directory*, as it is now.
    """
    return loader.load(key_of(directory), located(loader, directory))


def said(loaded: LoadedModel) -> str:
    """
    What a loaded model answers.
    """
    return text_of(loaded.whisper.transcribe(SILENCE)[0])


def replace(directory: Path, name: str, content: bytes) -> None:
    """
    Another file in the place of one, as downloads and editors do it.
    """
    (directory / "new").write_bytes(content)
    (directory / "new").replace(directory / name)


def check_harmless(cache: ModelCache) -> None:
    """
    Nothing stays charged, and the cache goes on.
    """
    cache._core.check()
    assert cache.models() == ()
    assert [device.charged_bytes for device in cache.devices()] in ([], [0])
    assert text_of(model_of(cache, micro()).transcribe(SILENCE)[0]) == TEXT


def check_line(error: BaseException, most: int = 400) -> None:
    """
    An error is one line that can be read.
    """
    text = str(error)
    assert 0 < len(text) <= most, text
    assert len(text.splitlines()) == 1, text


class TestLoad:
    """
    Models come, go, and come back.
    """

    def test_facts_are_read_right_after_the_load(
        self, loader: FasterWhisperLoader
    ) -> None:
        """
        They need not be asked of the model, which would be unsafe.
        """
        multilingual, english = load(loader, micro()), load(loader, micro(english=True))
        assert multilingual.is_multilingual
        assert len(multilingual.supported_languages) == 99
        assert (english.is_multilingual, english.supported_languages) == (
            False,
            ("en",),
        )
        assert multilingual.compute_type == multilingual.key.compute_type == "float32"
        assert said(multilingual) == said(english) == TEXT

    @pytest.mark.parametrize("compute_type", ["float32", "int8_float32"])
    def test_the_key_s_type_is_what_it_computes_in(
        self, loader: FasterWhisperLoader, compute_type: str
    ) -> None:
        """
        The model computes in what its key says, whatever it was saved in.
        """
        key = key_of(micro(quantization="int8"), compute_type)
        files = located(loader, micro(quantization="int8"))
        assert files.saved_compute_type == "int8_float16"
        loaded = loader.load(key, files)
        assert loaded.compute_type == compute_type
        assert said(loaded) == TEXT

    def test_another_type_than_the_key_s_is_told(
        self, loader: FasterWhisperLoader, caplog: pytest.LogCaptureFixture
    ) -> None:
        """
        What the cache plans with is not what is computed in.
        """
        loaded = loader.load(key_of(micro(), "default"), located(loader, micro()))
        assert f"{loaded.key} computes in {loaded.compute_type}" in caplog.messages
        assert loaded.compute_type != "default"

    @pytest.mark.parametrize("load_follows", [False, True])
    def test_unloaded_means_that_the_weights_have_left(
        self, loader: FasterWhisperLoader, *, load_follows: bool
    ) -> None:
        """
        CTranslate2 itself says that they have.
        """
        loaded = load(loader, micro())
        whisper = loaded.whisper
        released = loader.unload(loaded, load_follows=load_follows)
        assert released.confirmed
        assert not whisper.model.model_is_loaded

    @pytest.mark.slow
    def test_an_unload_waits_for_the_work_in_flight(
        self, loader: FasterWhisperLoader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        CTranslate2 refuses it without a word; it is asked again until all is done.
        """
        monkeypatch.setattr("whispercache.engine.kept.UNLOAD_TRIES_S", 30.0)
        loaded = load_busy(loader)
        model = loaded.whisper.model
        results = keep_busy(loaded, 100)
        assert model.num_active_batches
        model.unload_model()
        assert model.model_is_loaded
        assert loader.unload(loaded, load_follows=False).confirmed
        assert not model.model_is_loaded
        assert all(result.done() for result in results)

    @pytest.mark.slow
    def test_an_unload_that_did_not_happen_is_not_confirmed(
        self, loader: FasterWhisperLoader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        It says why, the model can be used, and a later unload works.
        """
        loaded = load_busy(loader)
        model = loaded.whisper.model
        with monkeypatch.context() as patch:
            patch.setattr("whispercache.engine.kept.UNLOAD_TRIES_S", 0.0)
            results = keep_busy(loaded, 100)
            released = loader.unload(loaded, load_follows=False)
        assert not released.confirmed
        assert re.fullmatch(
            r"not unloaded: \d+ batches are still active", released.reason
        )
        assert model.model_is_loaded
        for result in results:
            result.result()
        assert said(loaded) == TEXT
        assert loader.unload(loaded, load_follows=False).confirmed
        assert not model.model_is_loaded

    def test_an_unload_that_fails_may_be_asked_for_again(
        self, loader: FasterWhisperLoader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The error is CTranslate2's own, and the model is as before.
        """

        class Failing:
            def unload_model(self, *, to_cpu: bool) -> None:
                raise RuntimeError(f"the driver is shutting down {to_cpu}")

        loaded = load(loader, micro())
        with monkeypatch.context() as patch:
            patch.setattr(loaded.whisper, "model", Failing())
            with pytest.raises(RuntimeError, match="the driver is shutting down"):
                loader.unload(loaded, load_follows=False)
        assert said(loaded) == TEXT
        assert loader.unload(loaded, load_follows=False).confirmed

    @pytest.mark.parametrize(
        "options",
        [{"flash_attention": True}, {"tensor_parallel": True}],
        ids=["flash attention", "tensor parallel"],
    )
    def test_an_option_that_does_not_work_here_fails_alone(
        self, cache: ModelCache, options: dict[str, object]
    ) -> None:
        """
        CTranslate2's own words are passed on in one line.
        """
        with pytest.raises(LoadFailed) as caught:
            model_of(cache, micro(), **options).lease()
        check_line(caught.value)
        assert isinstance(caught.value.__cause__, ValueError)
        check_harmless(cache)

    def test_what_is_to_be_downloaded_is_not_read_ahead(
        self, loader: FasterWhisperLoader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        It has no files yet; only of what is here the kernel is asked for model.bin.
        """
        asked: list[Path] = []
        monkeypatch.setattr(
            ModelStore, "_read_ahead", lambda _, path: asked.append(path)
        )
        loader.read_ahead(ModelFiles("", "float16"))
        loader.read_ahead(located(loader, micro()))
        assert asked == [Path(os.path.realpath(micro()), "model.bin")]


class TestKept:
    """
    What is kept of an unloaded model: all but its weights.
    """

    def test_a_model_that_comes_back_reads_its_weights_only(
        self, loader: FasterWhisperLoader
    ) -> None:
        """
        It is the same object, and answers the same.
        """
        first = load(loader, micro())
        whisper = first.whisper
        assert not first.reloaded
        loader.unload(first, load_follows=False)
        again = load(loader, micro())
        assert again.reloaded
        assert again.whisper is whisper
        assert said(again) == TEXT

    def test_the_cache_says_that_it_was_a_reload(self, cache: ModelCache) -> None:
        """
        Reloads are counted apart.
        """
        model = model_of(cache, micro())
        for _ in range(3):
            assert text_of(model.transcribe(SILENCE)[0]) == TEXT
            assert cache.evict() == 1
        assert (cache.stats().loads, cache.stats().reloads) == (3, 2)

    @pytest.mark.parametrize("at_once", [False, True])
    def test_a_changed_model_is_built_anew(
        self, tmp_path: Path, loader: FasterWhisperLoader, *, at_once: bool
    ) -> None:
        """
        A shell of the old files would decode the new weights with the old tokenizer.
        """
        first = load(loader, micro_copy(tmp_path / "model"))
        loader.unload(first, load_follows=at_once)
        micro_copy(tmp_path / "model", OTHER.strip())
        changed = load(loader, tmp_path / "model")
        assert not changed.reloaded
        assert said(changed) == OTHER

    def test_a_changed_tokenizer_is_read_too(
        self, tmp_path: Path, loader: FasterWhisperLoader
    ) -> None:
        """
        Also where the weights have stayed the same.
        """
        directory = micro_copy(tmp_path / "model")
        loader.unload(load(loader, directory), load_follows=False)
        tokenizer = (directory / "tokenizer.json").read_text(encoding="utf-8")
        replace(
            directory, "tokenizer.json", tokenizer.replace("hello", "adieu").encode()
        )
        changed = load(loader, directory)
        assert not changed.reloaded
        assert said(changed) == TEXT.replace("hello", "adieu")

    def test_a_moved_copy_of_the_same_files_is_read_from_its_new_place(
        self, tmp_path: Path, loader: FasterWhisperLoader
    ) -> None:
        """
        As on the hub, where a revision may share its files with the one before.
        """
        one, two = micro_copy(tmp_path / "one"), tmp_path / "two"
        two.mkdir()
        for path in one.iterdir():
            (two / path.name).hardlink_to(path)
        key = key_of(one)
        loader.unload(loader.load(key, located(loader, one)), load_follows=False)
        files = located(loader, two)
        shutil.rmtree(one)
        loaded = loader.load(key, files)
        assert not loaded.reloaded
        assert said(loaded) == TEXT

    def test_few_models_are_kept(
        self, tmp_path: Path, loader: FasterWhisperLoader
    ) -> None:
        """
        Each takes some memory; the one used longest ago goes first.
        """
        directories = [
            micro_copy(tmp_path / str(number)) for number in range(MOST_KEPT + 1)
        ]
        for directory in directories:
            loader.unload(load(loader, directory), load_follows=False)
        assert load(loader, directories[-1]).reloaded
        assert not load(loader, directories[0]).reloaded

    def test_a_reload_that_fails_leaves_a_clean_slate(
        self, tmp_path: Path, cache: ModelCache
    ) -> None:
        """
        Once the files are back, so is the model.
        """
        directory = micro_copy(tmp_path / "model")
        model = model_of(cache, directory)
        model.lease().release()
        cache.evict()
        (directory / "model.bin").rename(tmp_path / "away")
        with pytest.raises((LoadFailed, UnknownModel)) as caught:
            model.lease()
        check_line(caught.value)
        check_harmless(cache)
        (tmp_path / "away").rename(directory / "model.bin")
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT


class TestTokenizers:
    """
    Parsing a tokenizer takes long, so equal ones are parsed once.
    """

    def test_equal_contents_are_one_tokenizer(
        self, tmp_path: Path, loader: FasterWhisperLoader
    ) -> None:
        """
        Wherever the file is.
        """
        one, two = (load(loader, micro_copy(tmp_path / name)) for name in ("1", "2"))
        assert one.whisper is not two.whisper
        assert one.whisper.hf_tokenizer is two.whisper.hf_tokenizer

    def test_other_contents_are_another_tokenizer(
        self, loader: FasterWhisperLoader
    ) -> None:
        """
        Each model has the words of its own file.
        """
        one, two = load(loader, micro()), load(loader, micro(OTHER.strip()))
        assert one.whisper.hf_tokenizer is not two.whisper.hf_tokenizer
        assert (said(one), said(two)) == (TEXT, OTHER)

    def test_faster_whisper_stays_as_it_is(self, loader: FasterWhisperLoader) -> None:
        """
        Models that others make meanwhile parse their own.
        """
        before = dict(vars(faster_whisper.transcribe))
        cached = load(loader, micro()).whisper
        assert vars(faster_whisper.transcribe) == before
        plain = faster_whisper.WhisperModel(str(micro()), device="cpu", cpu_threads=1)
        assert isinstance(cached, type(plain))
        assert plain.hf_tokenizer is not cached.hf_tokenizer
        assert vars(cached).keys() == vars(plain).keys()


class TestBrokenFiles:
    """
    Files that are missing, broken or changed.
    """

    @pytest.mark.parametrize("keep", [0, 3, 9, 30, 100, 5_000, 0.5, -10, -1])
    def test_a_truncated_model_is_found_before_it_is_loaded(
        self, tmp_path: Path, cache: ModelCache, keep: float
    ) -> None:
        """
        Wherever the file ends; the error names the directory.
        """
        directory = micro_copy(tmp_path / "model")
        size_bytes = (directory / "model.bin").stat().st_size
        keep_bytes = int(size_bytes * keep) if isinstance(keep, float) else keep
        os.truncate(directory / "model.bin", keep_bytes % size_bytes)
        with pytest.raises(CorruptModel, match=r"model\.bin is truncated") as caught:
            model_of(cache, directory)
        check_line(caught.value)
        assert caught.value.model == os.path.realpath(directory)
        assert cache.stats().load_failures == 0
        check_harmless(cache)

    @pytest.mark.parametrize("content", ["zeros", "noise", "longer", "text"])
    def test_a_file_of_something_else_is_no_model(
        self, tmp_path: Path, cache: ModelCache, content: str
    ) -> None:
        """
        Nothing is handed to CTranslate2.
        """
        directory = micro_copy(tmp_path / "model")
        size_bytes = (directory / "model.bin").stat().st_size
        contents = {
            "zeros": bytes(size_bytes),
            "noise": np.random.default_rng(0).bytes(size_bytes),
            "longer": (directory / "model.bin").read_bytes() + b"more",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
        }
        replace(directory, "model.bin", contents[content])
        with pytest.raises(CorruptModel) as caught:
            model_of(cache, directory)
        check_line(caught.value)
        check_harmless(cache)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            *itertools.product(
                ("config.json", "vocabulary.json", "tokenizer.json"),
                (None, b"", b"{nonsense", bytes(range(256))),
            ),
            ("tokenizer.json", b"[]"),
            ("preprocessor_config.json", b"[]"),
        ],
    )
    def test_a_model_without_its_other_files_fails_alone(
        self,
        tmp_path: Path,
        cache: ModelCache,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        content: bytes | None,
    ) -> None:
        """
        Whether they are missing or broken: an error of this package, in one line.
        """
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        directory = micro_copy(tmp_path / "model")
        if content is None:
            (directory / name).unlink()
        else:
            replace(directory, name, content)
        with pytest.raises(LoadFailed) as caught:
            model_of(cache, directory).lease()
        check_line(caught.value)
        assert str(directory) in str(caught.value)
        check_harmless(cache)

    def test_a_mended_model_loads(self, tmp_path: Path, cache: ModelCache) -> None:
        """
        A failure is not remembered.
        """
        directory = micro_copy(tmp_path / "model")
        tokenizer = (directory / "tokenizer.json").read_bytes()
        # Its end is first read by the load itself.
        replace(directory, "tokenizer.json", tokenizer[:-10])
        model = model_of(cache, directory)
        for _ in range(2):
            with pytest.raises(LoadFailed):
                model.lease()
        replace(directory, "tokenizer.json", tokenizer)
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        assert (cache.stats().load_failures, cache.stats().loads) == (2, 1)

    def test_an_empty_directory_is_no_model(
        self, tmp_path: Path, cache: ModelCache
    ) -> None:
        """
        The error says how to make one.
        """
        with pytest.raises(UnknownModel, match=r"holds no model\.bin") as caught:
            model_of(cache, tmp_path)
        check_line(caught.value)
        check_harmless(cache)

    def test_a_file_in_place_of_a_directory_is_no_model(
        self, cache: ModelCache
    ) -> None:
        """
        Not even model.bin itself.
        """
        with pytest.raises(UnknownModel, match="this is a file") as caught:
            model_of(cache, micro() / "model.bin")
        check_line(caught.value)
        check_harmless(cache)

    def test_a_deleted_directory_fails_what_would_load_it(
        self, tmp_path: Path, cache: ModelCache
    ) -> None:
        """
        A model in memory goes on without its files.
        """
        model = model_of(cache, micro_copy(tmp_path / "model"))
        with model.lease():
            shutil.rmtree(tmp_path / "model")
            assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        cache.evict()
        with pytest.raises(WhisperCacheError) as caught:
            model.transcribe(SILENCE)
        check_line(caught.value)
        check_harmless(cache)

    @pytest.mark.parametrize("name", ["model.bin", "tokenizer.json", "config.json"])
    def test_files_that_change_between_look_and_load_are_refused(
        self, tmp_path: Path, loader: FasterWhisperLoader, name: str
    ) -> None:
        """
        Its memory was reserved for another file. The next request finds the new one.
        """
        directory = micro_copy(tmp_path / "model")
        files = located(loader, directory)
        replace(directory, name, (directory / name).read_bytes())
        with pytest.raises(LoadFailed, match="changed while the request waited"):
            loader.load(key_of(directory), files)
        assert said(load(loader, directory)) == TEXT

    def test_a_model_deleted_between_look_and_load_is_refused(
        self, tmp_path: Path, loader: FasterWhisperLoader
    ) -> None:
        """
        As one that changed.
        """
        directory = micro_copy(tmp_path / "model")
        files = located(loader, directory)
        shutil.rmtree(directory)
        with pytest.raises(LoadFailed) as caught:
            loader.load(key_of(directory), files)
        check_line(caught.value)

    def test_a_model_that_changed_is_another_one_for_the_next_request(
        self, tmp_path: Path, cache: ModelCache
    ) -> None:
        """
        After it left, its new files are read, its compute type included.
        """
        directory = micro_copy(tmp_path / "model")
        model = model_of(cache, directory)
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        micro_copy(directory, OTHER.strip(), quantization="int8")
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        cache.evict()
        assert text_of(model.transcribe(SILENCE)[0]) == OTHER
        assert [info.key.compute_type for info in cache.models()] == ["int8_float32"]
        assert model.key.compute_type == "int8_float32"


class TestAudio:
    """
    Audio is decoded before any model is asked for.
    """

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "given",
        [
            lambda path: path,
            Path,
            lambda path: io.BytesIO(Path(path).read_bytes()),
            decode_audio,
            lambda path: decode_audio(path).astype(np.float64),
        ],
        ids=["str", "Path", "BytesIO", "float32", "float64"],
    )
    def test_audio_is_the_same_however_it_is_given(
        self, loader: FasterWhisperLoader, given: Callable[[str], Any]
    ) -> None:
        """
        Float32 samples in one dimension, mono, 16 kHz.
        """
        samples = loader.decode_audio(given(clip("en-bread")))
        assert samples.dtype == np.float32
        assert np.array_equal(samples, decode_audio(clip("en-bread")))

    def test_an_open_file_is_read(self, loader: FasterWhisperLoader) -> None:
        """
        From where it is, as faster-whisper does.
        """
        with Path(clip("en-bread")).open("rb") as file:
            samples = loader.decode_audio(file)
        assert np.array_equal(samples, decode_audio(clip("en-bread")))

    def test_samples_are_not_copied(self, loader: FasterWhisperLoader) -> None:
        """
        An hour of audio takes 230 MB.
        """
        assert loader.decode_audio(SILENCE) is SILENCE

    @pytest.mark.parametrize("name", ["missing.wav", "", "a\0b"])
    def test_a_missing_file_is_what_python_says(
        self, tmp_path: Path, cache: ModelCache, name: str
    ) -> None:
        """
        FileNotFoundError, as everywhere.
        """
        with pytest.raises(FileNotFoundError) as caught:
            model_of(cache, micro()).transcribe(str(tmp_path / name) if name else "")
        check_line(caught.value)
        assert cache.stats().requests == 0

    def test_a_directory_is_what_python_says(
        self, tmp_path: Path, cache: ModelCache
    ) -> None:
        """
        IsADirectoryError, as everywhere.
        """
        with pytest.raises(IsADirectoryError):
            model_of(cache, micro()).transcribe(tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("as_stream", [False, True], ids=["path", "stream"])
    @pytest.mark.parametrize(
        "content", ["text", "empty", "header only", "no samples", "binary", "json"]
    )
    def test_what_is_no_audio_loads_no_model(
        self, tmp_path: Path, cache: ModelCache, content: str, *, as_stream: bool
    ) -> None:
        """
        One line with the file's name, and nothing was charged for it.
        """
        path = tmp_path / "what is this"
        path.write_bytes(contents_of(content))
        audio = io.BytesIO(path.read_bytes()) if as_stream else path
        model = model_of(cache, micro())
        for call in (model.transcribe, model.detect_language):
            with pytest.raises(AudioError) as caught:
                call(audio)
            check_line(caught.value)
            expected = "BytesIO" if as_stream else "what is this"
            assert expected in caught.value.audio
        assert cache.stats().requests == 0
        check_harmless(cache)

    @pytest.mark.parametrize(
        "audio",
        [
            np.zeros(16_000, np.int32),
            np.zeros((2, 16_000), np.float32),
            np.zeros((), np.float32),
            np.zeros(16_000, np.complex64),
            np.array(["a"]),
            [0.0] * 16_000,
            b"RIFF",
            io.StringIO("RIFF"),
            None,
            7,
            object(),
        ],
        ids=lambda audio: getattr(audio, "shape", None) and str(audio.dtype),
    )
    def test_what_has_no_samples_is_refused(
        self, cache: ModelCache, audio: Any
    ) -> None:
        """
        Samples of other types would be taken for noise a thousand times too loud.
        """
        with pytest.raises(AudioError) as caught:
            model_of(cache, micro()).transcribe(audio)
        check_line(caught.value)
        assert cache.stats().requests == 0

    def test_no_samples_at_all_are_transcribed_to_nothing(
        self, cache: ModelCache
    ) -> None:
        """
        As faster-whisper does with an empty array.
        """
        segments, info = model_of(cache, micro()).transcribe(np.zeros(0, np.float32))
        assert (list(segments), info.duration) == ([], 0)

    def test_a_reader_that_fails_says_so(self, cache: ModelCache) -> None:
        """
        The stream's own error is kept.
        """

        class Broken(io.BytesIO):
            def read(self, *_: Any) -> bytes:
                raise OSError(5, "the tape is torn")

        with pytest.raises((AudioError, OSError), match="the tape is torn") as caught:
            model_of(cache, micro()).transcribe(Broken())
        check_line(caught.value)
        check_harmless(cache)


def contents_of(what: str) -> bytes:
    """
    Bytes of a file that holds no audio.
    """
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
    return {
        "text": b"hello\nworld\n" * 50,
        "empty": b"",
        "header only": stream.getvalue()[:30],
        "no samples": stream.getvalue(),
        "binary": bytes(range(256)) * 40,
        "json": json.dumps(list(range(100))).encode(),
    }[what]


def load_busy(loader: FasterWhisperLoader) -> LoadedModel:
    """
    A model that takes any number of calls without waiting.
    """
    options = (("cpu_threads", 1), ("max_queued_batches", -1))
    key = ModelKey(os.path.realpath(micro()), "cpu", "float32", options)
    return loader.load(key, located(loader, micro()))


def keep_busy(loaded: LoadedModel, calls: int) -> list[Any]:
    """
    Start calls on a model, and return what will be their results.
    """
    model = loaded.whisper.model
    features = faster_whisper.transcribe.get_ctranslate2_storage(FEATURES[np.newaxis])
    encoded = model.encode(features)
    prompt = [["<|startoftranscript|>"]]
    return [
        model.generate(
            encoded,
            prompt,
            asynchronous=True,
            sampling_temperature=1.0,
            num_hypotheses=5,
            suppress_tokens=[],
        )[0]
        for _ in range(calls)
    ]
