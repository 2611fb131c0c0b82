"""
Comparison: models that fail are named and left out; options that are repeated add up.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import pytest
from compared import compared, files_of_noise, specs_of
from real import micro_copy

from whispercache import CorruptModel, ModelCache, WhisperCacheError
from whispercache.comparison import ModelFailure, command, compare
from whispercache.comparison.turns import Run
from whispercache.engine.naming import ModelSpec
from whispercache.events import ModelStillReferenced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from whispercache.comparison import Progress
    from whispercache.events import Event

ALPHA, BETA, GAMMA = "alpha speaks", "beta speaks", "gamma speaks"

files = files_of_noise()
specs = specs_of(ALPHA, BETA, GAMMA)


def failing(
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
    when: Callable[..., bool] = lambda *_: True,
) -> None:
    """
    Have a step fail for the model "beta".
    """
    whole = getattr(Run, step)

    def fail(run: Run, entrant: Any, *args: Any) -> Any:
        if entrant.name == "beta" and when(*args):
            raise error
        return whole(run, entrant, *args)

    monkeypatch.setattr(Run, step, fail)


def torn(folder: Path, name: str = "tokenizer.json") -> str:
    """
    A model with half a file.
    """
    directory = micro_copy(folder / "torn")
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    return str(directory)


SHAPE = RuntimeError("Invalid input features shape:\nexpected 128 mels")


def test_a_model_that_fails_at_its_first_call_is_left_out(
    files: list[str],
    specs: list[ModelSpec],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """
    The others are compared, and each report names it; it leaves memory.
    """
    failing(monkeypatch, "_warm", SHAPE)
    events: list[Event] = []
    with ModelCache(ram="1GiB") as cache:
        cache.subscribe(events.append)
        out = tmp_path / "out"
        found = compared(files, specs, out=out, cache=cache)
        assert not cache.models()
        assert not [each for each in events if isinstance(each, ModelStillReferenced)]
    reason = "Invalid input features shape: expected 128 mels"
    assert found.model_failures == (ModelFailure("beta", reason),)
    assert [each.name for each in found.models] == ["alpha", "gamma"]
    assert {each.model for each in found.results} == {"alpha", "gamma"}
    assert [(each.first, each.second) for each in found.agreements] == [
        ("alpha", "gamma")
    ]
    assert found.loads == 3
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"beta failed and was left out: {reason}" in page
    document = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert document["model_failures"] == [{"model": "beta", "reason": reason}]


@pytest.mark.slow
def test_a_model_that_fails_in_the_middle_is_compared_with_nothing(
    files: list[str],
    specs: list[ModelSpec],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """
    It has heard other files than the rest. What it heard whole is kept, and not more:
    once it is mended, the same command does what is missing.
    """
    with monkeypatch.context() as patch:
        failing(patch, "_hear", SHAPE, lambda each, *_: each.file == files[1])
        found = compared(files, specs, out=tmp_path)
    (failure,) = found.model_failures
    assert failure.model == "beta"
    assert failure.reason.endswith(f"mels (at {files[1]})")
    assert {each.model for each in found.results} == {"alpha", "gamma"}
    asked: list[tuple[str, str]] = []

    def note(progress: Progress) -> None:
        if progress.stage == "done":
            asked.append((progress.model, progress.file))

    found = compared(files, specs, out=tmp_path, progress=note)
    assert asked == [("beta", files[1]), ("beta", files[2])]
    assert not found.model_failures
    assert [each.files for each in found.models] == [3, 3, 3]


def test_nothing_is_kept_of_a_model_that_never_heard(
    files: list[str],
    specs: list[ModelSpec],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """
    Neither a load nor a result.
    """
    failing(monkeypatch, "_warm", SHAPE)
    compared(files, specs, out=tmp_path)
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert sum("load" in each for each in records) == 2
    assert {each["model"] for each in records if "result" in each} == {"alpha", "gamma"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "model.bin"])
def test_broken_files_are_named_and_the_others_compared(
    files: list[str], specs: list[ModelSpec], tmp_path: Path, name: str
) -> None:
    """
    Those that show at the load, and those that show when the model is looked up.
    """
    bad = ModelSpec("bad", torn(tmp_path, name))
    found = compared(files[:1], [bad, *specs[:2]])
    (failure,) = found.model_failures
    assert failure.model == "bad"
    assert str(tmp_path) in failure.reason or "tokenizer" in failure.reason
    assert [each.name for each in found.models] == ["alpha", "beta"]


def test_without_any_model_left_it_is_an_error(
    files: list[str],
    specs: list[ModelSpec],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """
    That names all of them.
    """
    with pytest.raises(CorruptModel):
        compared(files, [ModelSpec("bad", torn(tmp_path, "model.bin"))])
    bad = [ModelSpec(name, torn(tmp_path / name, "model.bin")) for name in "ab"]
    with pytest.raises(WhisperCacheError, match=r"no model is left .*: a: .*; b: "):
        compared(files, bad)
    failing(monkeypatch, "_warm", SHAPE)
    with pytest.raises(WhisperCacheError, match=r"no model is left .*: beta: Invalid"):
        compared(files, specs[1:2])


def test_what_is_no_models_fault_ends_it(
    files: list[str], specs: list[ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    An option that there is not, an error of whoever watches, a cache that is closed, a
    disk that is full.
    """
    with pytest.raises(TypeError, match="frobnicate"):
        compare(files, models=specs, device="cpu", frobnicate=1)

    def watch(_progress: Progress) -> None:
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"):
        compared(files, specs, progress=watch)

    with ModelCache(ram="1GiB") as cache:

        def close(progress: Progress) -> None:
            if progress.stage == "done":
                cache.close(timeout_s=0)

        with pytest.raises(WhisperCacheError) as caught:
            compared(files, specs, progress=close, cache=cache)
        assert "no model is left" not in str(caught.value)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("whispercache.comparison.store.Store.add_result", full)
    with pytest.raises(OSError, match="No space left"):
        compared(files, specs)


def test_progress_comes_to_its_end_without_those_that_failed(
    files: list[str], specs: list[ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What they would have done is not waited for.
    """
    failing(monkeypatch, "_hear", SHAPE, lambda each, *_: each.file == files[1])
    seen: list[Progress] = []
    compared(files, specs, progress=seen.append)
    last = seen[-1]
    assert (last.done, last.total) == (6, 6)
    assert last.fraction == pytest.approx(1.0)


# The command --------------------------------------------------------------------------


def parsed(*arguments: str) -> argparse.Namespace:
    """
    The command's options.
    """
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("given", "models"),
    [
        (["--models", "a=A", "--models", "b=B"], ["a=A", "b=B"]),
        (["--models", "a,b", "--models", "c", "--models=,d,"], ["a", "b", "c", "d"]),
        (["--models", "a"], ["a"]),
    ],
)
def test_models_may_be_repeated(given: Sequence[str], models: list[str]) -> None:
    """
    As they are with other commands; in each there may be several.
    """
    options = parsed("a.wav", "--out", "out", *given)
    assert options.models == models
    assert options.audio == ["a.wav"]


@pytest.mark.slow
def test_references_may_be_repeated(
    files: list[str],
    specs: list[ModelSpec],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    One table for each folder, say; but not two texts for one file.
    """
    tables = []
    for number, file in enumerate(files[:2]):
        table = tmp_path / f"{number}.tsv"
        table.write_text(f"{file}\talpha speaks\n", encoding="utf-8")
        tables += ["--references", str(table)]
    place = ["--device", "cpu", "--out", str(tmp_path / "out")]
    models = [part for each in specs[:2] for part in ("--models", f"{each.model}")]
    asked = [*files[:2], *models, *place, *tables]
    assert command.run(parsed(*asked)) == 0
    report = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    assert [each["reference"] for each in report["files"]] == ["alpha speaks"] * 2
    assert len(report["models"]) == 2
    capsys.readouterr()
    (tmp_path / "other.tsv").write_text(f"{files[0]}\tbeta\n", encoding="utf-8")
    with pytest.raises(ValueError, match="another table has other words for"):
        command.run(parsed(*asked, "--references", str(tmp_path / "other.tsv")))


def test_the_exit_code_tells_that_a_model_failed(
    files: list[str],
    specs: list[ModelSpec],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    And stderr, which; the outcome of the others is printed.
    """
    failing(monkeypatch, "_warm", SHAPE)
    models = ",".join(f"{each.name}={each.model}" for each in specs)
    place = ("--device", "cpu", "--out", str(tmp_path / "out"))
    assert command.run(parsed(*files[:1], "--models", models, *place)) == 2
    out, told = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[:3]] == [
        "model",
        "alpha",
        "gamma",
    ]
    assert "whispercache: error: beta: Invalid input features shape: expected" in told
