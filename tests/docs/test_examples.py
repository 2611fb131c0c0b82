"""
The examples of the pages, run as they are written, with real models.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakes import ONE_CARD, needs_linux
from real import child_environment, clip, micro, packaged
from standin import run_on_cards

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fakes import FakeGpus

ROOT = Path(__file__).resolve().parents[2]


SIZES = ("tiny.en", "base", "small", "medium", "large-v3")


def hub_of(models: Mapping[str, Path], scratch: Path) -> dict[str, str]:
    """
    Returns the variables of a user who has used some models before, and is offline now.
    """
    for size, directory in models.items():
        folder = scratch / "hub" / f"models--Systran--faster-whisper-{size}"
        commit = "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit, encoding="utf-8")
        snapshot = folder / "snapshots" / commit
        snapshot.parent.mkdir()
        snapshot.symlink_to(directory)
    return {
        "HF_HUB_CACHE": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(scratch / "cache"),
    }


@pytest.mark.process
def test_the_first_ten_minutes_run_as_written(tmp_path: Path) -> None:
    """
    All of docs/start.md, one after the other, in one program.
    """
    shutil.copy(clip("en-bread"), tmp_path / "talk.wav")
    used = {size: packaged(size) for size in ("tiny.en", "base")}
    variables = hub_of(used, tmp_path)
    program = "\n".join(examples_of(ROOT / "docs" / "start.md"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=child_environment(variables),
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


# tests/cluster and tests/server/test_openai_client.py do what these examples do.
ELSEWHERE = ("from ray import", "from openai import")


def examples_of(page: Path) -> list[str]:
    """
    Returns the examples in Python that a page has, but for those that run elsewhere.
    """
    found = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    return [text for text in found if not any(word in text for word in ELSEWHERE)]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What is done with an application, by a line of its own.
THEN = {
    "async def transcribe(request: Request": """
from fastapi.testclient import TestClient
with TestClient(app) as client, open("talk.wav", "rb") as file:
    answer = client.post("/transcribe", files={"file": file}).raise_for_status()
    assert answer.json()["text"]
""",
    "app.mount(": """
from fastapi.testclient import TestClient
with TestClient(app) as client:
    client.get("/speech/healthz").raise_for_status()
""",
    "request.files": """
with cache, open("talk.wav", "rb") as file:
    answer = app.test_client().post("/transcribe", data={"file": file})
    assert answer.json["text"]
""",
    "@app.task": """
assert transcribe("talk.wav")
""",
}
RUN = """
import contextlib
import io
import logging
from whispercache import ModelCache
# Slow machines are told that a card is warming up.
logging.getLogger("whispercache").addHandler(logging.NullHandler())
os.chdir(os.environ["FOLDER"])
answer = []
with ModelCache() as cache:
    model = cache.get_model("base", "cpu", "float32")
    known = {"cache": cache, "model": model, "ModelCache": ModelCache}
    known |= {"clips": ["talk.wav"], "results": {}}
    for text in json.loads(os.environ["EXAMPLES"]):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(text, "an example", "exec"), {"__name__": "example", **known})
        answer.append(said.getvalue())
"""


@needs_linux
@pytest.mark.process
@pytest.mark.parametrize(
    "page", [each for each in PAGES if examples_of(each)], ids=lambda page: page.stem
)
def test_the_examples_of_a_page_run_as_written(
    page: Path, gpus: FakeGpus, tmp_path: Path
) -> None:
    """
    On an imaginary card, with micro models under the names of sizes. Each begins anew,
    with the names that its page has introduced: a cache, and a model.
    """
    gpus.set_state(ONE_CARD)
    for name in ("talk.wav", "talk.mp3"):
        shutil.copy(clip("en-bread"), tmp_path / name)
    examples = examples_of(page)
    for word, then in THEN.items():
        examples = [text + then if word in text else text for text in examples]
    hub = hub_of(dict.fromkeys(SIZES, micro()), tmp_path)

    said = run_on_cards(
        gpus,
        RUN,
        EXAMPLES=json.dumps(examples).replace("9100", "0"),
        FOLDER=str(tmp_path),
        HF_HUB_CACHE=hub["HF_HUB_CACHE"],
        HF_HUB_OFFLINE="1",
    )

    assert isinstance(said, list)
    assert len(said) == len(examples)
    for text, example in zip(said, examples, strict=True):
        assert bool(text) == ("print(" in example)


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
