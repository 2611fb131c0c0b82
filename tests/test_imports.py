"""
The imports of ``import whispercache``, and those that come later.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from real import clip, micro

pytestmark = pytest.mark.process

# What takes long to import, and is of no use before there is a cache.
LATER = {
    "asyncio",
    "ctypes",
    "hashlib",
    "json",
    "pathlib",
    "tempfile",
    "tracemalloc",
    "whispercache.aio",
    "whispercache.async_cache",
    "whispercache.core.core",
    "whispercache.events",
    "whispercache.engine.loader",
    "whispercache.devices.memory",
    "whispercache.devices.probe",
    "whispercache.core.snapshots",
}


# What other commands, options and calls need.
NOT_NEEDED = {
    *("fastapi", "httpx", "jinja2", "onnxruntime", "prometheus_client", "pynvml"),
    *("requests", "rich", "scipy", "torch", "uvicorn"),
    *("whispercache.aio", "whispercache.comparison", "whispercache.metrics"),
    *("whispercache.peers", "whispercache.server", "whispercache.testing"),
    *(
        "whispercache.cli.doctor",
        "whispercache.cli.models",
        "whispercache.cli.variants",
    ),
    "whispercache.watch",
}


def printed(program: str) -> str:
    """
    Returns the output of a fresh interpreter that runs *program*.
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OWN = "print(sorted(m for m in sys.modules if m.startswith('whispercache')))"


@pytest.mark.parametrize(
    ("statement", "own"),
    [
        ("import whispercache", ["whispercache", "errors", "version"]),
        (
            "from whispercache import WhisperCacheError, get_model",
            ["whispercache", "default", "errors", "version"],
        ),
        (
            "from whispercache import use_huge_pages",
            [
                *("whispercache", "devices", "devices.heap", "devices.host"),
                *("errors", "version"),
            ],
        ),
    ],
)
def test_who_imports_the_package_imports_next_to_nothing_of_it(
    statement: str, own: list[str]
) -> None:
    """
    A program that asks for its first model later should not wait for it at its start.
    """
    names = [own[0], *(f"whispercache.{name}" for name in own[1:])]
    assert printed(f"import sys; {statement}; {OWN}") == str(names)


def test_who_imports_the_cache_does_not_wait_for_what_a_cache_needs() -> None:
    """
    The class is there without the rest of the package.
    """
    # What an empty interpreter has imported does not count.
    seen = printed(
        "import sys; before = set(sys.modules); from whispercache import ModelCache; "
        f"print(sorted({LATER!r} & (set(sys.modules) - before)))"
    )
    assert seen == "[]"


def test_every_public_name_is_found_by_who_asks_for_it_first() -> None:
    """
    Also those that are imported when they are first asked for; they are listed, too.
    """
    seen = printed(
        "import importlib, sys, whispercache\n"
        "missing = set(whispercache.__all__) - set(dir(whispercache))\n"
        "for name in whispercache.__all__:\n"
        "    for module in [m for m in sys.modules if m.startswith('whispercache')]:\n"
        "        del sys.modules[module]\n"
        "    package = importlib.import_module('whispercache')\n"
        "    first = getattr(package, name)\n"
        "    assert getattr(package, name) is first, name\n"
        "    assert name in vars(package), name\n"
        "print(sorted(missing))"
    )
    assert seen == "[]"


def test_a_name_that_came_later_is_the_one_in_its_module() -> None:
    """
    So that ``isinstance`` and ``except`` mean the same class everywhere.
    """
    seen = printed(
        "import whispercache\n"
        "first = whispercache.ModelLoaded\n"
        "from whispercache import events\n"
        "print(first is events.ModelLoaded is whispercache.ModelLoaded)"
    )
    assert seen == "True"


def test_the_command_answers_before_audio_could_be_decoded() -> None:
    """
    PyAV decodes audio; ``--help`` does not wait for it.
    """
    seen = printed(
        "import sys, whispercache.cli.main; "
        "print(sorted({'av', 'numpy', 'ctranslate2'} & set(sys.modules)))"
    )
    assert seen == "[]"


def test_a_transcription_imports_what_it_needs_and_no_other_part() -> None:
    """
    Of the package at most 120 modules, and of other packages those of
    faster-whisper and a few small ones. Each costs a short transcription its time.
    """
    seen = printed(
        "import sys; from whispercache.cli.main import main; "
        f"assert main(['transcribe', {clip('en-bread')!r}, '--device', 'cpu', "
        f"'--model', {str(micro())!r}]) == 0; "
        "own = [m for m in sys.modules if m.startswith('whispercache.')]; "
        "tops = {m.partition('.')[0] for m in sys.modules}; "
        f"print(len(own), sorted({NOT_NEEDED!r} & (tops | set(own))))"
    )
    # Before it is what was heard.
    count, _, not_needed = seen.rpartition("\n")[2].partition(" ")
    assert not_needed == "[]"
    assert 50 < int(count) <= 120


def test_a_decoding_process_imports_pyav_and_nothing_else_that_is_large() -> None:
    """
    Each new one waits for its imports.
    """
    seen = printed(
        "import sys, whispercache.server.decoding; "
        "print(sorted({'av', 'numpy', 'ctranslate2', 'faster_whisper', 'fastapi'} "
        "& set(sys.modules)))"
    )
    assert seen == "['av']"
