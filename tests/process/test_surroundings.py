"""
What the tests, `make demo` and the examples leave of themselves, and where.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real import child_environment, packaged

pytestmark = [pytest.mark.process, pytest.mark.process]

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / "examples" / ".cache"

# A test like the others, that uses all which keeps something in a home.
INSIDE = """
from pathlib import Path

import pytest
from huggingface_hub import constants
from real import SILENCE, child, micro, model_of, text_of
from whispercache import LoadFailed, ModelCache
from whispercache.engine.variants.store import MANIFEST

BUILD = "from whispercache.cli.main import script; script()"

@pytest.mark.process
def test_inside():
    with ModelCache() as cache:
        segments, _ = model_of(cache, micro()).transcribe(SILENCE, vad_filter=True)
        text_of(segments)
        with pytest.raises(LoadFailed, match="not on this disk"):
            cache.get_model("tiny", "cpu", local_files_only=True).transcribe(SILENCE)
    done = child(BUILD, "variants", "build", micro())
    assert done.returncode == 0, done.stderr
    assert list(Path.home().rglob(MANIFEST))
    assert Path(constants.HF_HUB_CACHE).is_relative_to(Path.home())
"""


def test_a_run_leaves_nothing_in_the_user_s_home(tmp_path: Path) -> None:
    """
    Nor does it see what is there, wherever the user's settings say it is.
    """
    home, inside = tmp_path / "home", tmp_path / "test_inside.py"
    hub = home / "hub" / "models--Systran--faster-whisper-tiny"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0", encoding="ascii")
    (hub / "snapshots" / "0").mkdir(parents=True)
    (hub / "snapshots" / "0" / "model.bin").write_bytes(b"not a model")
    settings = dict.fromkeys(("HOME", "USERPROFILE", "XDG_CACHE_HOME"), home)
    before = contents(home)
    inside.write_text(INSIDE, encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")),
            *("-p", "conftest", "-p", "no:cacheprovider", str(inside)),
        ],
        env=child_environment(
            settings | {"HF_HUB_CACHE": home / "hub", "PYTHONPATH": ROOT / "tests"}
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(home) == before


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("target", ["demo", "bench"])
def test_what_make_runs_keeps_its_models_in_the_checkout(
    target: str, tmp_path: Path
) -> None:
    """
    And ``make clean`` takes them away.
    """
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$1 keeps $XDG_CACHE_HOME"\n', encoding="ascii")
    python.chmod(0o755)
    told = made("--old-file", f".venv/{target}", target, f"BIN={tmp_path}")
    programs = [line for line in told.splitlines() if " keeps " in line]
    assert programs
    assert {line.partition(" keeps ")[2] for line in programs} == {str(SCRATCH)}
    assert packaged("base").is_relative_to(SCRATCH)
    removed = made("--dry-run", "clean").split()
    assert str(SCRATCH.relative_to(ROOT)) in removed


def made(*arguments: str) -> str:
    """
    What make says.
    """
    done = subprocess.run(
        [shutil.which("make") or "make", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def contents(folder: Path) -> dict[str, bytes | None]:
    """
    All that is in *folder*, files with what is in them.
    """
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
