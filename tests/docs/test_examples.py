"""
The examples of the pages, run as they are written, with real models.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from real import child_environment, clip, packaged

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(tmp_path: Path) -> Mapping[str, str]:
    """
    What a user has who has used tiny.en and base before, and is offline now.
    """
    for size in ("tiny.en", "base"):
        folder = tmp_path / "hub" / f"models--Systran--faster-whisper-{size}"
        commit = "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit, encoding="utf-8")
        snapshot = folder / "snapshots" / commit
        snapshot.parent.mkdir()
        snapshot.symlink_to(packaged(size))
    return {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }


@pytest.mark.process
def test_the_first_ten_minutes_run_as_written(
    hub: Mapping[str, str], tmp_path: Path
) -> None:
    """
    All of docs/start.md, one after the other, in one program.
    """
    shutil.copy(clip("en-bread"), tmp_path / "talk.wav")
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=child_environment(hub),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stderr
    first, second, counts, models, none = done.stdout.splitlines()
    assert "bread" in first
    assert "bread" in second
    assert re.fullmatch(r"\d loads, \d evictions", counts)
    assert "base" in models
    assert none == "()"


@pytest.mark.process
def test_three_failures_of_lru_cache_are_not_ours() -> None:
    """
    As docs/why.md shows them: the figures are another machine's, what they mean is not.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "why_not_lru_cache.py")],
        capture_output=True,
        env=child_environment({}),
        text=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stderr
    plain, cached = done.stdout.split("whispercache:")
    assert "4 loads" in plain
    assert "1 load\n" in cached
    # The weights of base take 277 MiB.
    assert freed_mib(plain) < 100
    assert freed_mib(cached) > 200
    shown = (ROOT / "docs" / "why.md").read_text(encoding="utf-8")
    without_numbers = re.sub(r"\d+", "0", done.stdout)
    assert without_numbers in re.sub(r"\d+", "0", shown)


def freed_mib(text: str) -> int:
    """
    Returns how much less memory there was after a model was told to leave.
    """
    [(before, after)] = re.findall(r"(\d+) MiB before, (\d+) after", text)
    return int(before) - int(after)
