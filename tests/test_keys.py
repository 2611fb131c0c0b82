"""
What was asked for becomes one key per model in memory.
"""

from __future__ import annotations

import json
import os
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import ctranslate2
import pytest
from faster_whisper.utils import _MODELS
from real import child, micro, micro_copy

from whispercache import ModelCache, UnknownModel, UnsupportedComputeType
from whispercache.engine.naming import anchored, canonical_model
from whispercache.engine.sizes.header import read_header
from whispercache.keys import (
    ALIASES,
    COMPUTE_TYPES,
    MODELS,
    TYPICAL_COMPUTE_TYPES,
    ModelKey,
    canonical_device,
    canonical_options,
    effective_compute_type,
    is_directory,
)

REQUESTED = ("default", "auto", "int8", *COMPUTE_TYPES)
SAVED = ("float32", "float16", "bfloat16", "int16", "int8_float32", "int8_float16")

COMPARE = """
import json, pathlib, sys
import ctranslate2
from ctranslate2.models import Whisper

supported = sorted(ctranslate2.get_supported_compute_types("cpu"))
found = {}
for saved, directory in json.loads(sys.argv[1]).items():
    for requested in json.loads(sys.argv[2]):
        try:
            model = Whisper(directory, compute_type=requested, intra_threads=1)
            found[f"{saved} {requested}"] = model.compute_type
        except ValueError:
            found[f"{saved} {requested}"] = None
print(json.dumps([supported, found]))
"""


def saved_as(compute_type: str, directory: Path) -> Path:
    """
    A micro model whose weights were saved in *compute_type*.
    """
    if compute_type != "bfloat16":
        return micro(quantization=compute_type)
    # Only torch could convert to bfloat16. As wide as float16, it takes another label.
    micro_copy(directory, quantization="float16")
    content = bytearray((directory / "model.bin").read_bytes())
    for variable in read_header(directory).variables:
        if variable.dtype == "float16":
            content[variable.offset - 5] = 5
    (directory / "model.bin").write_bytes(content)
    return directory


def predicted(
    requested: str, saved: str, supported: frozenset[str] | set[str]
) -> str | None:
    """
    Our answer; None if the type is refused.
    """
    try:
        return effective_compute_type(requested, saved, "cpu", supported)
    except UnsupportedComputeType:
        return None


class TestModels:
    """
    Names, aliases, repositories and directories.
    """

    def test_known_models_are_those_of_faster_whisper(self) -> None:
        """
        Each name leads to the repository that faster-whisper would take.
        """
        ours = {name: MODELS[canonical_model(name)] for name in _MODELS}
        assert ours == _MODELS
        assert {*MODELS, *ALIASES} == set(_MODELS)

    @pytest.mark.parametrize("name", list(_MODELS))
    def test_a_size_and_its_repository_are_one_model(self, name: str) -> None:
        """
        However a known model is called, it has one key.
        """
        assert canonical_model(_MODELS[name]) == canonical_model(name)
        assert canonical_model(_MODELS[name].upper()) == canonical_model(name)

    def test_an_unknown_repository_is_itself(self) -> None:
        """
        Any owner/name may be on the hub.
        """
        assert canonical_model("someone/their.model-1") == "someone/their.model-1"
        assert not is_directory("someone/their.model-1")

    def test_all_ways_to_a_directory_are_one_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        Strings, paths, links, relative paths and ~ are the real path.
        """
        model = micro_copy(tmp_path / "model")
        (tmp_path / "link").symlink_to(model, target_is_directory=True)
        (tmp_path / "again").symlink_to("link", target_is_directory=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        ways: list[str | Path] = [
            "model",
            Path("model"),
            "./model",
            "model/",
            "link",
            "~/model",
        ]
        ways += [str(model), model, f"{model}/../model//", tmp_path / "again"]
        assert {canonical_model(way) for way in ways} == {os.path.realpath(model)}
        assert is_directory(canonical_model("model"))

    def test_a_directory_with_a_model_wins_over_a_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        As in faster-whisper, a directory "base" is meant before the hub's base.
        """
        monkeypatch.chdir(tmp_path)
        (tmp_path / "base").mkdir()
        assert canonical_model("base") == "base"
        micro_copy(tmp_path / "base")
        assert canonical_model("base") == os.path.realpath(tmp_path / "base")

    def test_a_relative_path_is_looked_up_anew_after_chdir(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        The same relative name means another model in another working directory.
        """
        with ModelCache() as cache:
            keys = []
            for name in ("one", "two"):
                micro_copy(tmp_path / name / "model")
                monkeypatch.chdir(tmp_path / name)
                keys.append(cache.get_model("model", "cpu").key.model)
        assert keys == [
            os.path.realpath(tmp_path / n / "model") for n in ("one", "two")
        ]

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("", "give a size"),
            ("   ", "give a size"),
            ("bsae", "did you mean 'base'?"),
            ("large-v4", "did you mean 'large-v3'?"),
            ("Base", "did you mean 'base'?"),
            ("LARGE_V3", "did you mean 'large-v3'?"),
            ("whisper_large_v3", "did you mean 'whisper-large-v3'?"),
            ("nonsense", "known sizes are tiny.en, "),
            ("/no/such/directory", "no such directory"),
            ("./base", "no such directory"),
            ("~/no such directory", "no such directory"),
            ("a/b/c", "no such directory; a repository of the model hub is"),
            ("org/name/", "a repository of the model hub is 'owner/name'"),
            ("a\0b", "known sizes are"),
        ],
    )
    def test_what_is_no_model_says_what_to_ask_for(self, name: str, hint: str) -> None:
        """
        An unknown name is one line that helps.
        """
        with pytest.raises(UnknownModel) as caught:
            canonical_model(name)
        assert hint in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_directory_without_a_model_says_how_to_convert_one(
        self, tmp_path: Path
    ) -> None:
        """
        Often it holds a model of another library.
        """
        with pytest.raises(UnknownModel, match="ct2-transformers-converter"):
            canonical_model(tmp_path)

    def test_a_file_is_not_a_model(self) -> None:
        """
        CTranslate2's models are directories.
        """
        with pytest.raises(UnknownModel, match="this is a file"):
            canonical_model(micro() / "model.bin")


class TestDevices:
    """
    Devices and their indices.
    """

    @pytest.mark.parametrize(
        ("device", "index", "expected"),
        [
            ("auto", None, "auto"),
            ("auto", 0, "auto:0"),
            ("auto", [1], "auto:1"),
            ("cpu", 0, "cpu"),
            ("cuda", None, "cuda"),
            ("cuda", 0, "cuda:0"),
            ("cuda", 1, "cuda:1"),
            ("cuda:0", None, "cuda:0"),
            ("cuda:0", 0, "cuda:0"),
            ("cuda:2", 0, "cuda:2"),
            ("cuda:2", 2, "cuda:2"),
            ("cuda:02", 0, "cuda:2"),
            ("CPU", None, "cpu"),
            ("CUDA", 1, "cuda:1"),
            ("AUTO", None, "auto"),
        ],
    )
    def test_a_device_has_one_name(
        self, device: str, index: Any, expected: str
    ) -> None:
        """
        "cuda" is the card of device_index; without one, whichever is best. "auto" is
        that card or the CPU. CTranslate2 takes capitals, too.
        """
        assert canonical_device(device, index) == expected

    def test_an_index_below_0_is_named(self) -> None:
        """
        The device beside it is none of its faults.
        """
        with pytest.raises(ValueError, match="device_index must be 0 or more, not -1"):
            canonical_device("cpu", -1)

    @pytest.mark.parametrize(
        ("device", "index"),
        [
            ("gpu", 0),
            ("Cpu", 0),
            ("CUDA:0", 0),
            ("cuda:", 0),
            ("cuda:x", 0),
            ("cuda:-1", 0),
            ("cuda:1 ", 0),
            ("", 0),
            ("cpu:0", 0),
            ("cuda", -1),
            ("cuda:1", 2),
            ("cuda", True),
            ("cuda", [0, 1]),
            ("cuda", "0"),
        ],
    )
    def test_nonsense_is_refused(self, device: str, index: Any) -> None:
        """
        One model over several cards included.
        """
        with pytest.raises((TypeError, ValueError), match="device"):
            canonical_device(device, index)


@pytest.mark.parametrize("name", [None, 3, b"base"])
def test_a_model_that_is_no_text_is_explained(name: Any) -> None:
    """
    Not in the words of the function that read it.
    """
    for read in (canonical_model, anchored):
        with pytest.raises(TypeError, match="a model is a name such as 'base'"):
            read(name)


class TestOptions:
    """
    Load options.
    """

    def test_defaults_are_those_of_whisper_model(self) -> None:
        """
        An option that is given with its default makes no other key.
        """
        defaults = {
            "cpu_threads": 0,
            "num_workers": 1,
            "download_root": None,
            "revision": None,
            "files": None,
            "flash_attention": False,
            "max_queued_batches": 0,
            "tensor_parallel": False,
        }
        assert canonical_options("base", defaults) == ()

    def test_what_fetches_the_files_makes_no_other_model(self) -> None:
        """
        A token or local_files_only does not change what is in memory.
        """
        fetching = {"local_files_only": True, "use_auth_token": "secret"}
        assert canonical_options("base", fetching) == ()

    def test_options_are_sorted(self) -> None:
        """
        Their order does not matter.
        """
        given = {"num_workers": 2, "cpu_threads": 3}
        expected = (("cpu_threads", 3), ("num_workers", 2))
        assert canonical_options("base", given) == expected
        backwards = dict(reversed(given.items()))
        assert canonical_options("base", backwards) == expected

    def test_the_hub_s_options_do_not_matter_for_a_directory(self) -> None:
        """
        They matter for a name: another revision is another model.
        """
        given = {"revision": "v2", "download_root": Path("models")}
        assert canonical_options("/models/base", given) == ()
        assert canonical_options("base", given) == (
            ("download_root", "models"),
            ("revision", "v2"),
        )

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"files": {"model.bin": b""}}, ValueError),
            ({"beam_size": 5}, TypeError),
            ({"num_worker": 5}, TypeError),
            ({"num_workers": [1]}, TypeError),
            ({"num_workers": "2"}, TypeError),
            ({"num_workers": 2.0}, TypeError),
            ({"num_workers": True}, TypeError),
            ({"num_workers": None}, TypeError),
            ({"num_workers": 0}, ValueError),
            ({"cpu_threads": -1}, ValueError),
            ({"revision": object()}, TypeError),
            ({"revision": 5}, TypeError),
            ({"flash_attention": 1}, TypeError),
        ],
    )
    def test_nonsense_is_refused(
        self, options: dict[str, object], error: type[Exception]
    ) -> None:
        """
        In-memory models too: CTranslate2 keeps a second copy of them.
        """
        with pytest.raises(error):
            canonical_options("base", options)

    def test_a_key_reads_as_a_path(self) -> None:
        """
        It is what logs and errors show.
        """
        key = ModelKey("base", "cpu", "int8_float32")
        assert str(key) == "base/cpu/int8_float32"
        assert key.num_workers == 1
        key = ModelKey(
            "base", "cpu", "float32", (("num_workers", 2), ("revision", "x"))
        )
        assert str(key) == "base/cpu/float32?num_workers=2&revision=x"
        assert key.num_workers == 2
        with pytest.raises(FrozenInstanceError):
            key.model = "small"  # type: ignore[misc]


class TestComputeTypes:
    """
    The type that a model will really compute in.
    """

    @pytest.mark.process
    @pytest.mark.parametrize("environment", [{}, {"CT2_USE_MKL": "1"}])
    def test_types_are_those_that_real_models_report(
        self, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        """
        For each saved and each requested type, also those that are refused.

        With MKL there is another set of supported types.
        """
        directories = {saved: str(saved_as(saved, tmp_path / saved)) for saved in SAVED}
        result = child(
            COMPARE,
            json.dumps(directories),
            json.dumps(REQUESTED),
            environment=environment,
        )
        assert result.returncode == 0, result.stderr
        supported, found = json.loads(result.stdout)
        ours = {
            f"{saved} {requested}": predicted(requested, saved, set(supported))
            for saved in SAVED
            for requested in REQUESTED
        }
        assert ours == found

    @pytest.mark.parametrize("saved", SAVED)
    def test_headers_tell_what_the_weights_were_saved_in(
        self, tmp_path: Path, saved: str
    ) -> None:
        """
        The saved type is read without CTranslate2.
        """
        header = read_header(saved_as(saved, tmp_path / "model"))
        assert header.saved_compute_type == saved

    def test_typical_types_are_those_of_ctranslate2_here(self) -> None:
        """
        The table for other machines is right about this one, MKL apart.
        """
        here = frozenset(ctranslate2.get_supported_compute_types("cpu"))
        assert TYPICAL_COMPUTE_TYPES["cpu"] <= here

    @pytest.mark.parametrize("requested", ["float16", "int4", "", "INT8", "fp16"])
    def test_a_refused_type_names_those_that_work(self, requested: str) -> None:
        """
        The error is one line with the alternatives.
        """
        supported = {"float32", "int8", "int8_float32"}
        with pytest.raises(UnsupportedComputeType) as caught:
            effective_compute_type(requested, "float16", "cpu", supported)
        assert "use one of float32, int8_float32, or 'default'" in str(caught.value)

    @pytest.mark.parametrize("compute_type", ["int8", "int8_float32", "auto"])
    def test_types_that_come_out_the_same_are_one_model(
        self, compute_type: str
    ) -> None:
        """
        A type spelled differently does not load the weights twice.
        """
        with ModelCache() as cache:
            keys = {
                cache.get_model(micro(), "cpu", each).key
                for each in ("int8", compute_type)
            }
        assert keys == {ModelKey(os.path.realpath(micro()), "cpu", "int8_float32")}
