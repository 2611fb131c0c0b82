"""
The command ``whispercache compare``.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from compared import files_of_noise, noise, specs_of
from real import (
    child_environment,
)

from whispercache.cli.main import main
from whispercache.comparison import (
    run,
)
from whispercache.comparison.report import REPORTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from whispercache.engine.naming import ModelSpec


COMMAND = """
import argparse, sys
from whispercache.comparison.command import add_options, run
parser = argparse.ArgumentParser()
add_options(parser)
sys.exit(run(parser.parse_args()))
"""

files = files_of_noise()
specs = specs_of("alpha speaks english", "beta speaks")


def started(
    specs: Sequence[ModelSpec], files: Sequence[str], out: Path, **streams: int
) -> subprocess.Popen[str]:
    """
    The command, begun in a process of its own.
    """
    models = ",".join(f"{each.name}={each.model}" for each in specs)
    options = ("--device", "cpu", "--models", models, "--out", str(out))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    # What a shell starts in the background inherits that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *files, *options],
            env=child_environment({"OMP_NUM_THREADS": "1", "COLUMNS": "100"}),
            stdout=pipes["stdout"],
            stderr=pipes["stderr"],
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.process
class TestCommand:
    """
    ``whispercache compare``.
    """

    def test_it_prints_the_outcome_and_writes_the_reports(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        The outcome goes to stdout, a line for each file and model to stderr; a file
        that is none is an error of its own, and the rest is done.
        """
        out = tmp_path / "out"
        process = started(specs, [*files, str(tmp_path / "none.wav")], out)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        lines = stdout.splitlines()
        assert [line.split()[0] for line in lines[:3]] == ["model", "alpha", "beta"]
        assert lines[4:] == [
            "alpha and beta agree on 33.3 % of their words.",
            "2 loads; 4 saved by taking models in turns.",
            str(out / "report.html"),
        ]
        told = stderr.splitlines()
        assert [line[:3] for line in told[:6]] == [f"{n}/6" for n in range(1, 7)]
        missing = f"{tmp_path / 'none.wav'}: No such file or directory"
        assert told[6:] == [f"whispercache: error: {missing}"]
        assert {*REPORTS} < {each.name for each in out.iterdir()}

    def test_a_terminal_shows_bars_and_the_time_to_go(
        self, files: list[str], specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        They are gone in the end.
        """
        terminal, theirs = pty.openpty()
        process = started(specs, files, tmp_path / "out", stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so when nobody writes any more
            while piece := os.read(terminal, 4096):
                shown += piece
        os.close(terminal)
        assert process.wait(60) == 0
        process.communicate()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
        assert re.search(r"all files and models .* of 6 · \d:\d\d left", text)
        assert re.search(r"beta · [012]\.wav", text)
        assert shown.rstrip().endswith(b"\x1b[2K")

    def test_a_missing_extra_is_one_line(
        self,
        files: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        """
        That says what to install; the exit code is 2.
        """
        monkeypatch.setattr(run, "find_spec", lambda _name: None)
        asked = [*files, "--models", "base", "--out", str(tmp_path / "out")]
        assert main(["compare", *asked]) == 2
        assert capsys.readouterr() == (
            "",
            f"whispercache: error: comparing needs jinja2; {run.EXTRA}\n",
        )
        assert not (tmp_path / "out").exists()

    def test_ctrl_c_ends_it_at_once_and_keeps_what_is_done(
        self, specs: list[ModelSpec], tmp_path: Path
    ) -> None:
        """
        In the middle of work; it says how to go on, and that works.
        """
        many = [noise(tmp_path / f"{seed}.wav", seed) for seed in range(300)]
        out = tmp_path / "out"
        process = started(specs[:1], many, out)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/300 alpha · ")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, "")
        assert "the same command goes on from there" in stderr.splitlines()[-1]
        lines = (out / run.RESULTS).read_text().splitlines()
        done = sum("result" in json.loads(line) for line in lines)
        assert 1 <= done < 300
        assert not (out / "report.html").exists()
        again = started(specs[:1], many[: done + 1], out)
        stdout, stderr = again.communicate(timeout=60)
        assert stderr.count("s of audio\n") == 1
        assert stderr.startswith(f"{done + 1}/{done + 1} alpha")
        assert stdout.splitlines()[-1] == str(out / "report.html")
