"""
Measured footprints: remembered, refused as noise, and read from broken files.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from whispercache.engine.sizes.learned import LearnedFootprints

KEY = ("base", "int8_float32", "AMD EPYC")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """
    Where measurements are kept.
    """
    return tmp_path / "deep" / "footprints.json"


def record(learned: LearnedFootprints, *measured: int) -> None:
    """
    Record measurements beside a prediction of 1000 bytes.
    """
    for each in measured:
        learned.record(*KEY, predicted_bytes=1000, measured_bytes=each)


def test_three_measurements_correct_a_prediction(path: Path) -> None:
    """
    Two are not enough; of three the median counts.
    """
    learned = LearnedFootprints(path)
    record(learned, 1100, 900)
    assert learned.correct(*KEY, 2000) == 2000
    record(learned, 1200)
    assert learned.correct(*KEY, 2000) == 2200


def test_only_the_last_five_count(path: Path) -> None:
    """
    An upgrade of CTranslate2 is learned after three loads.
    """
    learned = LearnedFootprints(path)
    record(learned, *[900] * 20, *[1300] * 3)
    assert learned.correct(*KEY, 1000) == 1300


def test_what_five_have_said_is_not_written_again(path: Path) -> None:
    """
    A sixth that differs is.
    """
    learned = LearnedFootprints(path)
    record(learned, *[1200] * 5)
    path.unlink()
    record(learned, 1205)
    assert not path.exists()
    record(learned, 1250)
    assert path.exists()


@pytest.mark.parametrize("measured", [-50, 0, 799, 1501, 10**9])
def test_noise_is_refused(path: Path, measured: int) -> None:
    """
    Another thread's allocations are not mistaken for the model.
    """
    learned = LearnedFootprints(path)
    record(learned, *[measured] * 5)
    assert learned.correct(*KEY, 1000) == 1000
    assert not path.exists()


def test_an_empty_prediction_teaches_nothing(path: Path) -> None:
    """
    There is no ratio to zero bytes.
    """
    learned = LearnedFootprints(path)
    learned.record(*KEY, predicted_bytes=0, measured_bytes=10)
    assert learned.correct(*KEY, 0) == 0


@pytest.mark.parametrize("other", [0, 1, 2])
def test_each_model_type_and_device_learns_for_itself(path: Path, other: int) -> None:
    """
    What was measured of one says nothing about another.
    """
    learned = LearnedFootprints(path)
    record(learned, 1200, 1200, 1200)
    model, compute_type, device = (
        "another" if place == other else part for place, part in enumerate(KEY)
    )
    assert learned.correct(model, compute_type, device, 1000) == 1000


def test_measurements_outlive_the_process(path: Path) -> None:
    """
    A new object reads what another one wrote, and adds to it.
    """
    record(LearnedFootprints(path), 1200)
    record(LearnedFootprints(path), 1200)
    record(LearnedFootprints(path), 1200)
    assert LearnedFootprints(path).correct(*KEY, 1000) == 1200


def test_two_caches_do_not_overwrite_each_other(path: Path) -> None:
    """
    Objects that both have the file in memory keep each other's measurements.
    """
    first, second = LearnedFootprints(path), LearnedFootprints(path)
    assert first.correct(*KEY, 1000) == second.correct(*KEY, 1000) == 1000
    record(first, 1200)
    record(second, 1200)
    record(first, 1200)
    assert first.correct(*KEY, 1000) == 1200


def test_threads_lose_no_measurement(path: Path) -> None:
    """
    Every thread's measurement is in the file.
    """
    learned = LearnedFootprints(path)

    def measure(name: int) -> None:
        for _ in range(3):
            learned.record(str(name), "int8", "cpu", 1000, 1200)

    threads = [threading.Thread(target=measure, args=(each,)) for each in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = LearnedFootprints(path)
    assert [again.correct(str(each), "int8", "cpu", 1000) for each in range(8)] == [
        1200
    ] * 8


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": [1.0', b"\xff\xfe\x00", b"[1, 2]", b"null", b"[" * 100_000],
)
def test_a_broken_file_counts_as_empty(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """
    It is reported, not raised, and replaced by the next measurement.
    """
    path.parent.mkdir()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "whispercache"):
        learned = LearnedFootprints(path)
        assert learned.correct(*KEY, 1000) == 1000
    assert "starts anew" in caplog.text
    record(learned, 1200, 1200, 1200)
    assert LearnedFootprints(path).correct(*KEY, 1000) == 1200


def test_nonsense_in_the_file_is_left_out(path: Path) -> None:
    """
    Entries of another shape or size do not reach a prediction.
    """
    path.parent.mkdir()
    key = json.dumps(list(KEY))
    for ratios in ('"x"', "[9, 9, 9]", "[NaN, NaN, NaN]", '["1", "1", "1"]', "1"):
        path.write_text(f"{{{json.dumps(key)}: {ratios}}}", encoding="utf-8")
        assert LearnedFootprints(path).correct(*KEY, 1000) == 1000


def test_nothing_but_the_file_and_its_lock_is_left(path: Path) -> None:
    """
    The file is replaced whole; no temporary one stays behind.
    """
    record(LearnedFootprints(path), 1200, 1100)
    names = {each.name for each in path.parent.iterdir()}
    assert names - {"footprints.lock"} == {"footprints.json"}


def test_a_failed_write_keeps_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    A full disk loses nothing that was there, and leaves no temporary file.
    """
    record(LearnedFootprints(path), 1200)
    old = path.read_bytes()

    def full(_: Path, __: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    learned = LearnedFootprints(path)
    with caplog.at_level(logging.WARNING, "whispercache"):
        record(learned, 1200, 1200)
    assert path.read_bytes() == old
    assert learned.correct(*KEY, 1000) == 1200
    assert len(caplog.records) == 1
    names = {each.name for each in path.parent.iterdir()}
    assert names - {"footprints.lock"} == {"footprints.json"}


def test_without_a_writable_directory_the_memory_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Where the directory cannot be made, measurements last as long as the process.
    """
    blocker = tmp_path / "file"
    blocker.write_text("in the way", encoding="utf-8")
    learned = LearnedFootprints(blocker / "footprints.json")
    with caplog.at_level(logging.WARNING, "whispercache"):
        record(learned, 1200, 1200, 1200, 1200)
    assert learned.correct(*KEY, 1000) == 1200
    assert len(caplog.records) == 1
    assert "memory only" in caplog.text


def test_the_default_file_is_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Without a path, it is where the platform keeps caches.
    """
    import platformdirs

    monkeypatch.setattr(
        platformdirs, "user_cache_dir", lambda name: str(tmp_path / name)
    )
    record(LearnedFootprints(), 1200)
    assert (tmp_path / "whispercache" / "footprints.json").is_file()


@pytest.mark.process
def test_importing_it_imports_no_lock_library() -> None:
    """
    What only writing needs is imported by writing.
    """
    script = (
        "import sys, whispercache.engine.sizes.learned; "
        "print({'filelock', 'platformdirs'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "set()"
