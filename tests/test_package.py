"""
What the package shows to its users: names, errors, examples in the documentation.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import whispercache
from whispercache import errors
from whispercache.errors import WhisperCacheError, format_bytes

ROOT = Path(__file__).parent.parent

ERRORS: tuple[WhisperCacheError, ...] = (
    errors.UnknownModel("bse", "did you mean 'base'?"),
    errors.UnsupportedComputeType("float16", "cpu", ("float32", "int8_float32")),
    errors.DeviceUnavailable("cuda:7", "there are cuda:0 and cuda:1"),
    errors.ModelTooLarge(
        "large-v3/cuda:0/float16", "cuda:0", 5 << 30, 4 << 30, "limit"
    ),
    errors.LeaseTimeout("base/cpu/float32", 1.5, 2),
    errors.LeaseTimeout("base/cpu/float32", 1.5),
    errors.DownloadTimeout("base", 60.5),
    errors.EvictionTimeout("base/cpu/float32", 10.0),
    errors.TooManyWaiters("base/cpu/float32", 8),
    errors.LeaseDeadlock("base/cpu/float32", ("tiny/cpu/float32",)),
    errors.LeaseDeadlock("the end of the cache", ("tiny/cpu/float32",), own=True),
    errors.LoadFailed("base", "the hub is gone"),
    errors.LoadFailed("base", "2 loads in a row failed: broken", 1.5),
    errors.NotDownloaded("someone/whisper", "preload it first"),
    errors.CorruptModel("models/base", "model.bin ends early"),
    errors.AudioError("'talk.wav'", "no audio in it"),
    errors.CacheClosed(),
    errors.CacheForked(),
)


def test_all_that_is_listed_is_there_and_all_that_is_there_is_listed() -> None:
    """
    ``__all__`` is exactly what a user should see.
    """
    listed = set(whispercache.__all__)
    assert all(hasattr(whispercache, name) for name in listed)
    parts = (ROOT / "whispercache").iterdir()
    modules = {path.stem for path in parts}
    public = {name for name in vars(whispercache) if not name.startswith("_")}
    assert public - modules - {"TYPE_CHECKING"} <= listed


def test_a_fork_is_installed_with_all_that_the_package_needs() -> None:
    """
    By name, in the documentation and for the tests; of faster-whisper the fork's.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert listed
    needed = re.findall(r'^ +"([a-z0-9-]+)', listed[1], re.MULTILINE)
    needed.remove("faster-whisper")
    named = f"install {' '.join(needed)}"
    for name in ("docs/install.md", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = text.replace("$(INSTALL)", "install")
        assert named in " ".join(text.replace("\\\n", " ").split())


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """
    Names that are made at their first use do not hide typing errors.
    """
    with pytest.raises(AttributeError, match="no attribute 'ModelCash'"):
        _ = whispercache.ModelCash  # type: ignore[attr-defined]


def test_every_error_is_in_the_list() -> None:
    """
    A new exception has to pass the tests below, too.
    """
    classes = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, WhisperCacheError)
    }
    assert classes - {WhisperCacheError} == {type(error) for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_with_its_data(error: WhisperCacheError) -> None:
    """
    Errors travel between processes, as in Ray or multiprocessing.
    """
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


class Mine(errors.LoadFailed):
    """
    A user's own error, with data of its own.
    """

    def __init__(self, model: str, reason: str, code: int = 0) -> None:
        self.code = code
        super().__init__(model, reason)


def test_an_error_of_a_user_s_own_pickles_with_its_data() -> None:
    """
    Whatever it sets, and when.
    """
    again = pickle.loads(pickle.dumps(Mine("base", "broken", 7)))
    assert (again.model, again.reason, again.code) == ("base", "broken", 7)


def test_a_lease_timeout_from_version_0_1_names_no_place() -> None:
    """
    It said 0 where there was no queue.
    """
    assert "place" not in str(errors.LeaseTimeout("base", 1.0, 0))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_one_line(error: WhisperCacheError) -> None:
    """
    It fits into a log, and does not repeat itself as a tuple.
    """
    assert "\n" not in str(error)
    assert not str(error).startswith("(")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB")],
)
def test_bytes_are_written_in_the_largest_unit(n_bytes: int, text: str) -> None:
    """
    Binary units, one decimal.
    """
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize("module", ["whispercache", "whispercache.testing"])
def test_the_modules_that_users_import_say_what_they_are(module: str) -> None:
    """
    Every public name has a docstring.
    """
    names = vars(importlib.import_module(module))
    bare = [
        name
        for name in names["__all__"]
        if callable(names.get(name)) and not names[name].__doc__
    ]
    assert not bare


@pytest.mark.process
@pytest.mark.parametrize(
    ("program", "clips", "said"),
    [
        ("multilingual.py", ["en-weather", "es-casa"], ["Tomorrow", "casa", "evicted"]),
        ("ab_test.py", ["en-weather"], ["tiny.en", "base", "int8", "4 loads"]),
    ],
)
def test_an_example_runs_real_models_on_real_speech(
    program: str, clips: list[str], said: list[str]
) -> None:
    """
    As a newcomer would run it.
    """
    examples = ROOT / "examples"
    files = [str(examples / "clips" / f"{clip}.flac") for clip in clips]
    done = subprocess.run(
        [sys.executable, str(examples / program), *files],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "140", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )

    assert done.returncode == 0, done.stderr
    for words in said:
        assert words in done.stdout
