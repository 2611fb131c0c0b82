"""
The telemetry of onnxruntime: off, unless the user wants it.
"""

from __future__ import annotations

import os
import textwrap
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
from real import child, micro

from whispercache.cli import doctor
from whispercache.engine import process
from whispercache.testing import FakeLoader, FakeMachine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEAR = textwrap.dedent(
    """
    import os, pathlib, sys
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    import numpy as np
    from whispercache import ModelCache

    with ModelCache(variants=False) as cache:
        model = cache.get_model(sys.argv[1], "cpu", cpu_threads=1)
        assert "onnxruntime" not in sys.modules
        segments, _ = model.transcribe(np.zeros(16_000, np.float32), vad_filter=True)
        list(segments)
    assert "onnxruntime" in sys.modules
    home = pathlib.Path.home()
    print(os.environ["ORT_DISABLE_TELEMETRY"])
    print(*(path for path in home.rglob("*") if "onnxruntime" in str(path)), sep="\\n")
    """
)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    Nobody has said anything yet, and what is said here is forgotten.
    """
    monkeypatch.setenv(process.TELEMETRY, "")
    monkeypatch.delenv(process.TELEMETRY)
    process.keep_telemetry_off.cache_clear()
    yield
    monkeypatch.undo()
    process.keep_telemetry_off.cache_clear()
    # As the process was, if it has the variable.
    if process.TELEMETRY not in os.environ:
        process.keep_telemetry_off()


@pytest.mark.process
def test_finding_speech_writes_nothing_into_the_home(tmp_path: Path) -> None:
    """
    The real onnxruntime, in a process with a home of its own, on Linux.
    """
    done = child(HEAR, micro(), environment={"HOME": tmp_path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


def test_what_the_user_has_said_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    On or off.
    """
    for said, is_off in (("0", False), ("", False), ("2", False), ("True", True)):
        monkeypatch.setenv(process.TELEMETRY, said)
        process.keep_telemetry_off.cache_clear()
        assert process.telemetry_setting() == (is_off, "the environment")
        assert os.environ[process.TELEMETRY] == said


def test_who_says_nothing_has_it_off_and_his_children_too() -> None:
    """
    The variable is there for as long as the process is.
    """
    assert process.telemetry_setting() == (True, "whispercache")
    assert os.environ[process.TELEMETRY] == "1"
    assert process.telemetry_setting() == (True, "whispercache")


class TestDoctor:
    """
    ``whispercache doctor`` tells whether it is off, and by whom.
    """

    def found(self) -> doctor.Finding:
        """
        What it says about onnxruntime.
        """
        machine = FakeMachine({"cpu": "8GiB"})
        findings = doctor.examine(FakeLoader(machine), machine)
        (found,) = [each for each in findings if each.subject == "onnxruntime"]
        return found

    def test_off_by_whispercache(self) -> None:
        """
        With the version, without an import.
        """
        found = self.found()
        assert found.mark == "works"
        assert found.text == (
            f"{metadata.version('onnxruntime')}; its telemetry is off, by whispercache "
            "(ORT_DISABLE_TELEMETRY=1)"
        )

    def test_on_by_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Worth a note, no more.
        """
        monkeypatch.setenv(process.TELEMETRY, "0")
        found = self.found()
        assert found.mark == "note"
        assert "its telemetry is on, by the environment" in found.text
        assert "ORT_DISABLE_TELEMETRY" in found.mend

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Speech cannot be found without it; models are examined all the same.
        """
        monkeypatch.setattr(doctor, "packages_distributions", dict)
        machine = FakeMachine({"cpu": "8GiB"})
        findings = list(doctor.examine(FakeLoader(machine), machine))
        marks = {each.subject: each.mark for each in findings}
        assert marks["onnxruntime"] == "wrong"
        assert marks["types, cpu"] == "works"
