"""
install(): models that a program makes by itself come from a cache, whatever it did
before, and whatever is done to the class meanwhile.
"""

from __future__ import annotations

import copy
import errno
import functools
import inspect
import json
import logging
import pickle
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import ctranslate2
import faster_whisper
import pytest
from caches import installed_cache
from faster_whisper import BatchedInferencePipeline, WhisperModel
from real import FEATURES, SILENCE, TEXT, at_once, child, micro, micro_copy, text_of

from whispercache import (
    AsyncModelCache,
    CorruptModel,
    DeviceUnavailable,
    LoadFailed,
    ModelCache,
    ModelTooLarge,
    UnknownModel,
    UnsupportedComputeType,
    install,
    installed,
    installing,
    uninstall,
)
from whispercache.dropin.whisper import LeasedWhisper
from whispercache.installing import _Installation

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from conftest import MakeCache

SECOND = [{"start": 0, "end": 1}]
# Bound before anything is installed, as a program's own imports are.
PLAIN_WHISPER = ctranslate2.models.Whisper
GENUINE = WhisperModel.__init__


class Mine(WhisperModel):  # type: ignore[misc]
    """
    A subclass from before, as that of whisperX.
    """

    encoded = 0

    def encode(self, features: np.ndarray[Any, Any]) -> Any:
        """
        Count.
        """
        self.encoded += 1
        return super().encode(features)


cache = installed_cache()


def new(directory: Path | None = None, kind: Any = WhisperModel, **options: Any) -> Any:
    """
    A model as a program makes it.
    """
    return kind(str(directory or micro()), "cpu", cpu_threads=1, **options)


def is_leased(model: Any) -> bool:
    """
    True if a model comes from a cache.
    """
    return isinstance(getattr(model, "model", model), LeasedWhisper)


def test_a_model_that_is_made_anew_is_what_is_on_the_disk(
    cache: ModelCache, tmp_path: Path
) -> None:
    """
    As of a program that trains, converts and evaluates in turns. One that is in use
    stays until it is idle.
    """
    mine = tmp_path / "mine"

    def heard(model: Any) -> str:
        return text_of(model.transcribe(SILENCE)[0])

    with installed(cache):
        assert heard(new(micro_copy(mine, "before"))) == " before"
        micro_copy(mine, "after")
        second = new(mine)
        assert heard(second) == " after"
        segments, _ = second.transcribe(SILENCE)
        micro_copy(mine, "later")
        new(mine)
        assert text_of(segments) == " after"
        assert heard(new(mine)) == " later"
    assert cache.stats().loads == 3


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_words_are_those_of_the_weights(
    cache: ModelCache, tmp_path: Path, *, is_installed: bool
) -> None:
    """
    Of a model that was made before or after its files were replaced, while those from
    before are in use and afterwards: the tokenizer is that of what is in memory.
    """
    mine = tmp_path / "mine"

    def heard(model: Any) -> str:
        return text_of(model.transcribe(SILENCE)[0])

    def made() -> Any:
        model = new(mine) if is_installed else cache.get_model(str(mine), "cpu")
        assert model.hf_tokenizer is not None
        return model

    with installed(cache):
        micro_copy(mine, "it was so before")
        first = made()
        segments, _ = first.transcribe(SILENCE)
        micro_copy(mine, "now all is other")
        second = made()
        assert heard(second) == heard(copy.copy(second)) == " it was so before"
        assert text_of(segments) == " it was so before"
        assert heard(made()) == " now all is other"
        assert heard(first) == heard(second) == " now all is other"
        # What a program has set is its own.
        first.hf_tokenizer = own = object()
        micro_copy(mine, "and other again")
        assert heard(made()) == " and other again"
        with pytest.raises(AttributeError):
            first.transcribe(SILENCE)
        assert first.hf_tokenizer is own


# The class ----------------------------------------------------------------------------


def test_names_and_subclasses_from_before_make_leased_models(cache: ModelCache) -> None:
    """
    Objects of just these classes, with all that their constructor sets, and no load.
    """
    before = new(kind=Mine)
    with installed(cache) as used:
        models = [new(), new(kind=Mine), new(kind=faster_whisper.WhisperModel)]
    assert used is cache
    for model, kind in zip(models, (WhisperModel, Mine, WhisperModel), strict=True):
        assert type(model) is kind
        assert is_leased(model)
        assert set(vars(model)) == set(vars(before))
        assert model.hf_tokenizer is models[0].hf_tokenizer
        assert model.supported_languages == before.supported_languages
    assert cache.stats().requests == 0
    assert not is_leased(before)
    for model in (before, *models):
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT
    # One lease for each transcription, and the subclass's own methods ran.
    assert cache.stats().requests == 3
    assert models[1].encoded == before.encoded > 0


def test_signatures_and_documentation_stay(cache: ModelCache) -> None:
    """
    What programs and type checkers of programs look at.
    """
    names = ("__init__", "transcribe", "detect_language")
    plain = {name: inspect.signature(getattr(WhisperModel, name)) for name in names}
    with installed(cache):
        for name in names:
            found = getattr(WhisperModel, name)
            assert inspect.signature(found) == plain[name]
            assert found.__qualname__ == f"WhisperModel.{name}"
            assert found.__module__ == "faster_whisper.transcribe"
        for wrong in ({}, {"model_size_or_path": str(micro()), "size": 1}):
            with pytest.raises(TypeError):
                WhisperModel(**wrong)


def test_objects_go_on_after_uninstall(cache: ModelCache) -> None:
    """
    With one lease for each call on them; new ones are plain.
    """
    with installed(cache):
        model, mine = new(), new(kind=Mine)
    assert not is_leased(new())
    assert text_of(model.transcribe(SILENCE)[0]) == TEXT
    assert mine.detect_language(SILENCE)[0] == "en"
    pipeline = BatchedInferencePipeline(mine)
    assert text_of(pipeline.transcribe(SILENCE, clip_timestamps=SECOND)[0]) == TEXT
    assert cache.stats().requests == 3
    assert (cache.stats().loads, cache.stats().evictions) == (1, 0)
    uninstall()


def test_all_ways_to_call_hold_one_lease(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    By the class, by a method that a program put on the object, by a file's name.
    """
    with installed(cache):
        model = new()
        segments, _ = WhisperModel.transcribe(model, audio=SILENCE, language="en")
        assert text_of(segments) == TEXT
        plain = model.transcribe
        monkeypatch.setattr(model, "transcribe", lambda audio: plain(audio, "en"))
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        assert cache.stats().requests == 2
        segments, _ = plain(SILENCE)
        assert next(segments).text == TEXT
        assert cache.stats().leases == 1
        segments.close()
        assert cache.stats().leases == 0
        # It is checked before a model is loaded.
        with pytest.raises(ValueError, match="task must be"):
            plain(SILENCE, None, "nonsense")
    assert cache.stats().requests == 3


def test_a_lease_of_the_cache_is_checked_as_before(cache: ModelCache) -> None:
    """
    Its model is of the changed class, too.
    """
    with installed(cache), cache.lease(micro(), "cpu") as whisper:
        assert not is_leased(whisper)
        with pytest.raises(ValueError, match="task must be"):
            whisper.transcribe(SILENCE, None, "nonsense")
        assert text_of(whisper.transcribe(SILENCE)[0]) == TEXT
        cached = cache.get_model(micro(), "cpu")
        assert text_of(cached.transcribe(SILENCE)[0]) == TEXT
    assert cache.stats().requests == 2


def test_several_threads_and_room_for_one(cache: ModelCache, tmp_path: Path) -> None:
    """
    Each gets its own model's answer.
    """
    other = micro_copy(tmp_path / "other", "the other one")
    with installed(cache):
        models = [new(), new(other), new(kind=Mine), new(other, kind=Mine)]

        def told(model: Any) -> list[str]:
            return [text_of(model.transcribe(SILENCE)[0]) for _ in range(5)]

        found = at_once([functools.partial(told, model) for model in models])
    assert found == [[TEXT] * 5, [" the other one"] * 5] * 2
    assert all(len(cache.models()) <= 1 for _ in models)


# Mocks and decorators -----------------------------------------------------------------


def test_mocks_win_and_leave_nothing(cache: ModelCache) -> None:
    """
    Of the name, of the class's methods; also one that outlives the installation.
    """
    with installed(cache):
        with mock.patch("faster_whisper.WhisperModel") as fake:
            assert faster_whisper.WhisperModel("nonsense") is fake.return_value
            # The cache loads all the same.
            assert text_of(new().transcribe(SILENCE)[0]) == TEXT
        with mock.patch.object(WhisperModel, "transcribe", return_value="mocked"):
            assert new().transcribe(SILENCE) == "mocked"
        with mock.patch.object(WhisperModel, "__init__", return_value=None):
            assert vars(WhisperModel("nonsense")) == {}
        double = mock.create_autospec(WhisperModel)
        with pytest.raises(TypeError):
            double.return_value.transcribe()
        assert is_leased(new())
    install(cache)
    with mock.patch.object(WhisperModel, "__init__", return_value=None):
        uninstall()
    # The mock gave back what it had found.
    assert not is_leased(new())
    install(cache)
    assert is_leased(new())


def test_a_decorator_over_it_stays(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It is called for leased and for plain models, and is not decorated again.
    """
    made: list[bool] = []
    called: list[object] = []
    install(cache)
    ours, leasing = WhisperModel.__init__, WhisperModel.transcribe

    @functools.wraps(ours)
    def counted(self: Any, *args: Any, **options: Any) -> None:
        ours(self, *args, **options)
        made.append(is_leased(self))

    @functools.wraps(leasing)
    def noted(self: Any, *args: Any, **options: Any) -> Any:
        called.append(options)
        return leasing(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(WhisperModel, "__init__", counted)
        patch.setattr(WhisperModel, "transcribe", noted)
        new()
        uninstall()
        new()
        install(cache)
        model = new()
        cached = cache.get_model(micro(), "cpu", cpu_threads=1)
        for each in (model, cached):
            assert text_of(each.transcribe(SILENCE, beam_size=1)[0]) == TEXT
        assert made == [True, False, True]
        assert [options["beam_size"] for options in called] == [1, 1]  # type: ignore[index]
        assert WhisperModel.__init__ is counted
    assert cache.stats().requests == 2


def test_a_mock_that_is_there_first_is_left_alone(cache: ModelCache) -> None:
    """
    A later call of install() finds the class as it is then.
    """
    with mock.patch.object(WhisperModel, "__init__", return_value=None) as fake:
        install(cache)
        WhisperModel("nonsense")
        fake.assert_called_once_with("nonsense")
    assert not is_leased(new())
    install(cache)
    assert is_leased(new())


# Installing ---------------------------------------------------------------------------


def test_the_last_installation_holds_and_blocks_are_undone(cache: ModelCache) -> None:
    """
    Each model stays with the cache that it was made from.
    """
    with ModelCache(variants=False) as other:
        with installed(cache, ctranslate2=True):
            with pytest.raises(UnknownModel), installed(other):
                new(Path("nonsense"))
            with installed(other):
                assert ctranslate2.models.Whisper is PLAIN_WHISPER
                theirs = new()
            ours = new()
            assert ctranslate2.models.Whisper is not PLAIN_WHISPER
            install(other)
            theirs_too = new()
        assert not is_leased(new())
        for model in (theirs, ours, theirs_too):
            assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        assert (cache.stats().requests, other.stats().requests) == (1, 2)


def test_nonsense_changes_nothing(cache: ModelCache, make_cache: MakeCache) -> None:
    """
    And says what is wrong.
    """
    with pytest.raises(TypeError, match="ram, policy: the cache that was given has"):
        install(cache, ram="1GiB", policy="gap")
    with pytest.raises(ValueError, match="keep_alive"):
        install(cache, keep_alive="soon")
    with pytest.raises(ValueError, match="a loader of its own"):
        install(make_cache())
    with pytest.raises(TypeError, match="there is no setting rma; did you mean ram"):
        install(rma="1GiB")  # type: ignore[call-arg]
    assert not is_leased(new())


def test_keep_alive_is_that_of_its_models(cache: ModelCache) -> None:
    """
    Others of the cache have the cache's.
    """
    with installed(cache, keep_alive=-1):
        model = new()
    assert text_of(model.transcribe(SILENCE)[0]) == TEXT
    assert [info.expires_in_s for info in cache.models()] == [None]
    assert not cache.models()[0].pinned
    cache.lease(micro(), "cpu", cpu_threads=1).release()
    (info,) = cache.models()
    assert info.expires_in_s is not None
    assert 0 < info.expires_in_s <= 300


@pytest.mark.process
def test_limits_are_those_of_the_process_s_cache() -> None:
    """
    Which is made with them, and refuses others once it is in use; a closed one is made
    anew.
    """
    done = child(
        """
import sys
from faster_whisper import WhisperModel
from whispercache import default_cache, install, uninstall
from real import SILENCE, TEXT, micro, text_of

cache = install(ram="700MiB", max_models=3, keep_alive="1m", variants=False)
assert cache is default_cache()
model = WhisperModel(str(micro()), "cpu", cpu_threads=1)
assert text_of(model.transcribe(SILENCE)[0]) == TEXT
(device,) = cache.devices()
assert device.limit_bytes == 700 * 1024**2
assert cache.models()[0].expires_in_s <= 60
try:
    install(ram="1GiB")
except RuntimeError as error:
    print(error)
assert install(keep_alive="2m") is cache
cache.close()
model = WhisperModel(str(micro()), "cpu", cpu_threads=1)
assert text_of(model.transcribe(SILENCE)[0]) == TEXT
assert default_cache() is not cache
assert default_cache().stats().requests == 1
"""
    )
    assert done.returncode == 0, done.stderr
    assert "the default cache is in use already" in done.stdout
    # Of names that faster-whisper would no longer look up.
    assert "Please report" not in done.stderr


def test_preload_fails_in_the_constructor(cache: ModelCache) -> None:
    """
    Otherwise it is the first call that finds out; but what does not exist is refused at
    once either way.
    """
    with ModelCache(ram="1MiB", variants=False) as small:
        with installed(small):
            model = new()
            with pytest.raises(ModelTooLarge):
                model.transcribe(SILENCE)
        with installed(small, preload=True), pytest.raises(ModelTooLarge):
            new()
    with installed(cache, preload=True):
        assert new().model.model_is_loaded
    assert (cache.stats().loads, cache.stats().leases) == (1, 0)
    for preload in (True, False):
        with installed(cache, preload=preload), pytest.raises(UnknownModel):
            new(Path("nonsense"))


@pytest.mark.parametrize("ctranslate2_too", [False, True])
def test_what_preload_raises_is_caught_as_ctranslate2_s_own(
    cache: ModelCache, *, ctranslate2_too: bool
) -> None:
    """
    A program that takes a smaller model, or the CPU, after an error does so.
    """

    def made(**options: Any) -> Any:
        if ctranslate2_too:
            return ctranslate2.models.Whisper(str(micro()), **options)
        return new(**options)

    with ModelCache(ram="1MiB", variants=False) as small:
        with (
            installed(small, preload=True, ctranslate2=ctranslate2_too),
            pytest.raises(RuntimeError) as caught,
        ):
            made()
        assert isinstance(caught.value, ModelTooLarge)
    with (
        installed(cache, preload=True, ctranslate2=ctranslate2_too),
        pytest.raises(ValueError, match="Ampere") as refused,
    ):
        made(flash_attention=True)
    assert isinstance(refused.value, LoadFailed)


@pytest.mark.parametrize("name", ["tiny", "/no/where"])
def test_ctranslate2_s_class_takes_directories_alone(
    cache: ModelCache, name: str
) -> None:
    """
    As the plain one: no name of a model causes a download.
    """
    with (
        installed(cache, ctranslate2=True),
        pytest.raises(RuntimeError, match=f"Unable to open file 'model.bin' .*{name}"),
    ):
        ctranslate2.models.Whisper(name)
    assert not cache.models()


@pytest.mark.parametrize("given", ["4GiB", AsyncModelCache])
def test_what_is_no_model_cache_is_refused(given: Any) -> None:
    """
    At once, not where the program makes its models.
    """
    cache = given if given == "4GiB" else given(variants=False)
    with pytest.raises(TypeError, match="takes a ModelCache, not"):
        install(cache)
    assert WhisperModel.__init__ is GENUINE


def nowhere(path: Path) -> dict[str, Any]:
    """
    A model that is not on this disk, with no leave to download it.
    """
    return {"model": "tiny", "local_files_only": True, "download_root": str(path)}


def truncated(path: Path) -> dict[str, Any]:
    """
    A model with half of its weights.
    """
    file = micro_copy(path / "half") / "model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return {"model": str(file.parent)}


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (lambda _: {"model": "nonsense"}, UnknownModel),
        (lambda path: {"model": str(path)}, UnknownModel),
        (truncated, CorruptModel),
        (nowhere, LoadFailed),
        (lambda _: {"compute_type": "int7"}, UnsupportedComputeType),
        (lambda _: {"device": "gpu"}, ValueError),
        (lambda _: {"size": 1}, TypeError),
    ],
)
def test_constructors_raise_what_programs_expect(
    cache: ModelCache,
    tmp_path: Path,
    wrong: Callable[[Path], dict[str, Any]],
    kind: type[Exception],
) -> None:
    """
    They try the next model then, or a download; other processes get our own types.
    """
    given = {"model": str(micro()), "device": "cpu", **wrong(tmp_path)}
    name = given.pop("model")
    with pytest.raises(Exception, match=r".") as plain:
        WhisperModel(name, **given)
    with installed(cache), pytest.raises(plain.type) as caught:
        WhisperModel(name, **given)
    assert isinstance(caught.value, kind)
    assert type(caught.value).__name__ == kind.__name__
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is kind
    assert str(again) == str(caught.value)
    if isinstance(caught.value, OSError):
        assert caught.value.errno == errno.ENOENT
        assert caught.value.strerror == str(again)


def test_the_plain_class_s_errors_are_ctranslate2_s(
    cache: ModelCache, tmp_path: Path
) -> None:
    """
    Which raises one type for all that is wrong with a directory.
    """
    with installed(cache, ctranslate2=True):
        for directory in (tmp_path, Path(truncated(tmp_path)["model"])):
            with pytest.raises(RuntimeError):
                ctranslate2.models.Whisper(str(directory), "cpu")


@pytest.mark.parametrize("how", ["device_index", "files"])
def test_what_cannot_be_cached_is_plain_with_one_warning(
    cache: ModelCache, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """
    Also where CTranslate2's own class was changed, which its constructor uses.
    """
    installing._warn.cache_clear()
    files = {path.name: path.read_bytes() for path in micro().iterdir()}
    with installed(cache, ctranslate2=True):
        for _ in range(2):
            # A copy: faster-whisper takes some of them out.
            given: Any = dict(files) if how == "files" else [0, 0]
            model = new(**{how: given})
            assert type(model.model) is PLAIN_WHISPER
            assert text_of(model.transcribe(SILENCE)[0]) == TEXT
    (record,) = (
        each for each in caplog.records if "cannot be cached" in each.getMessage()
    )
    assert record.levelno == logging.WARNING
    assert cache.stats().requests == 0


def test_tensor_parallel_is_left_to_ctranslate2(cache: ModelCache) -> None:
    """
    Which needs cards for it.
    """
    with pytest.raises(ValueError, match="only on cuda") as plain:
        new(tensor_parallel=True)
    with installed(cache), pytest.raises(ValueError, match="only on cuda") as caught:
        new(tensor_parallel=True)
    assert str(caught.value) == str(plain.value)
    with installed(cache):
        assert is_leased(new(tensor_parallel=False, files=None, device_index=[0]))


def test_cuda_is_the_best_card_only_without_an_index(make_cache: MakeCache) -> None:
    """
    Who names card 0, as a default of its own perhaps, gets that.
    """
    cache = make_cache()
    cache.preload("large-v3", "cuda:1")
    cache.preload("large-v3", "cuda:0")
    made = _Installation(cache)

    def key(**given: Any) -> str:
        source = made.source_of({"model_size_or_path": "small", **given})
        assert source is not None
        return source.key.device

    cache.evict("large-v3", "cuda:1")
    assert key(device="cuda") == "cuda:1"
    assert key(device="cuda", device_index=0) == "cuda:0"
    assert key(device="cuda", device_index=[0]) == "cuda:0"
    assert key(device="cuda:1", device_index=0) == "cuda:1"
    assert key(device="cpu", device_index=0) == "cpu"
    assert key(device="auto") == "cuda:1"
    assert key(device_index=0) == "cuda:0"
    assert key(device="auto", device_index=[1]) == "cuda:1"
    with pytest.raises(DeviceUnavailable):
        key(device="cuda", device_index=5)


# CTranslate2's own class --------------------------------------------------------------


def test_ctranslate2_s_class_is_cached_if_wanted(cache: ModelCache) -> None:
    """
    With its own names of parameters; calls take a lease each.
    """
    with installed(cache):
        assert ctranslate2.models.Whisper is PLAIN_WHISPER
    with installed(cache, ctranslate2=True):
        kind = ctranslate2.models.Whisper
        model = kind(
            str(micro()), device="cpu", compute_type="int8", intra_threads=1, files=None
        )
        assert isinstance(model, LeasedWhisper)
        assert isinstance(model, kind)
        assert dict(model.key.options) == {"cpu_threads": 1}
        assert model.compute_type == "int8_float32"
        assert cache.stats().requests == 0
        encoded = model.encode(ctranslate2.StorageView.from_array(FEATURES[None]))
        assert encoded.shape[0] == 1
        assert cache.stats().requests == 1
        with pytest.raises(TypeError, match="no load option 'threads'"):
            kind(str(micro()), threads=1)
        with pytest.raises(TypeError, match="incompatible constructor arguments"):
            kind(str(micro()), "cpu", 0)
        # One key, and one model in memory, with one of WhisperModel.
        assert new(compute_type="int8").model.key == model.key
    assert ctranslate2.models.Whisper is PLAIN_WHISPER
    assert model.detect_language(encoded)[0][0][0].startswith("<|")
    assert cache.stats().requests == 2


def test_plain_ones_belong_to_the_changed_class(cache: ModelCache) -> None:
    """
    And what was bound to it makes plain ones after uninstall().
    """
    plain = new().model
    with installed(cache, ctranslate2=True):
        kind = ctranslate2.models.Whisper

        class Own(kind):  # type: ignore[misc, valid-type]
            pass

        assert isinstance(plain, kind)
        assert not isinstance(plain, Own)
        assert isinstance(Own(str(micro())), Own)
        assert not isinstance(object(), kind)
    assert type(kind(str(micro()), intra_threads=1)) is PLAIN_WHISPER


def test_a_copy_of_whisper_model_is_reached(cache: ModelCache) -> None:
    """
    Such as that of WhisperLive: its methods are its own, and call by call they lease.
    """
    source = inspect.getsource(sys.modules["faster_whisper.transcribe"])
    own = types.ModuleType("faster_whisper.own_copy")
    own.__package__ = "faster_whisper"
    with mock.patch.dict(sys.modules, {own.__name__: own}):
        exec(source, vars(own))
        with installed(cache, ctranslate2=True):
            model = new(kind=own.WhisperModel)
    assert type(model) is own.WhisperModel
    assert is_leased(model)
    assert text_of(model.transcribe(SILENCE)[0]) == TEXT
    assert (cache.stats().loads, cache.stats().leases) == (1, 0)


@pytest.mark.process
def test_a_mocked_name_before_the_first_use_is_no_obstacle() -> None:
    """
    The classes are found where they were made.
    """
    done = child(
        """
import json
from unittest import mock
import faster_whisper
from real import SILENCE, micro, text_of
genuine = faster_whisper.WhisperModel
with mock.patch("faster_whisper.WhisperModel"):
    import whispercache
    cache = whispercache.install(variants=False)
    model = genuine(str(micro()), "cpu", cpu_threads=1)
    text = text_of(model.transcribe(SILENCE)[0])
print(json.dumps([text, cache.stats().loads, "av" in globals()]))
"""
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [TEXT, 1, False]
