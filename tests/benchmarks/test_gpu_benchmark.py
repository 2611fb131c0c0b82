"""
The GPU benchmark, and the GPU suite, on machines without a card: over fake drivers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakes import needs_linux

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_report
import gpu_turns
from gpu_records import (
    Cycle,
    Held,
    Look,
    Machine,
    Said,
    Size,
    Tier,
    Work,
    dump,
    revive,
)
from gpu_run import Outcome, Setup, spawn
from gpu_targets import growth, judge
from gpu_tiers import CONSTRUCT, PAGEABLE, RESTORE
from gpu_trials import _home_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu_records import Record

pytestmark = [needs_linux, pytest.mark.process]

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu.py"
NAMES = [part.name for part in gpu.PARTS]
NO_CARD = {"CUDA_VISIBLE_DEVICES": ""}
SUITE = """
import os, sys
from pathlib import Path
sys.path.append("benchmarks")
import gpu_pretend
gpu_pretend.prepare(Path(sys.argv[1]))
less = ["-k", "not small and not large-v3 and not cub_caching"]
suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *less, "tests/gpu/test_gpu.py"]
os.execv(sys.executable, [sys.executable, *suite])
"""


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    """
    A program of ours; coverage, which slows it down, is left out.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def pretended(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """
    The benchmark and the suite over fake drivers, both at the same time.
    """
    if shutil.which("cc") is None and not os.environ.get("CI"):
        pytest.skip("no C compiler (cc) to build the fake drivers with")
    home = tmp_path_factory.mktemp("pretended")
    programs = {
        "benchmark": start(
            *(PROGRAM, "--pretend", "--sizes", "small", "large-v3"),
            *("--out", home / "out"),
        ),
        "suite": start("-c", SUITE, home),
    }
    yield programs
    for program in programs.values():
        program.kill()
        program.communicate()


def test_every_part_runs_over_a_pretended_card(
    pretended: dict[str, subprocess.Popen[str]],
) -> None:
    """
    All parts end without a problem, and the first line says that nothing is real.
    """
    output, said = pretended["benchmark"].communicate(timeout=250)
    assert pretended["benchmark"].returncode == 0, said
    lines = output.splitlines()
    assert lines[0] == gpu_report.PRETENDED
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    problems = {row[0]: row[2] for row in rows if row[0] in NAMES}
    assert problems == dict.fromkeys(NAMES, "none")
    titles = {shown.title for shown in gpu_report._SHOWN}
    assert titles <= {line.strip("*") for line in lines}
    written = [Path(line.split()[-1]) for line in lines if "written to" in line]
    assert [path.suffix for path in written] == [".md", ".json"]
    assert all(path.name.startswith("pretended-gpu-one-") for path in written)
    assert output.startswith(written[0].read_text().partition("\n\n")[2])
    assert list(json.loads(written[1].read_text())["parts"]) == NAMES


def test_the_gpu_suite_passes_over_a_pretended_card(
    pretended: dict[str, subprocess.Popen[str]],
) -> None:
    """
    Its tests ask for nothing that a card with two neighbours would not give.
    """
    output, said = pretended["suite"].communicate(timeout=250)
    assert pretended["suite"].returncode == 0, output + said
    assert "skipped" not in output


# Without a card -----------------------------------------------------------------------


def test_without_a_card_it_says_why_and_writes_nothing() -> None:
    """
    One line, the exit code 2, and no file.
    """
    results = sorted((ROOT / "benchmarks" / "results").iterdir())
    program = start(PROGRAM, "--write", **NO_CARD)
    output, said = program.communicate(timeout=60)
    assert program.returncode == 2
    assert not output
    assert len(said.splitlines()) == 1
    assert said.startswith("gpu.py cannot run here: device 'cuda:0' cannot be used")
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == results


def test_what_is_pretended_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Figures that are made up do not get between those that were measured.
    """
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--pretend", "--write"])
    assert refused.value.code == 2
    assert "not written" in capsys.readouterr().err


def test_a_part_that_fails_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The last line of what its process said is its problem.
    """
    monkeypatch.setenv(*next(iter(NO_CARD.items())))
    outcome = spawn("machine", Setup("", ""))
    assert outcome.records == ()
    assert outcome.code == 1
    assert outcome.error.startswith("it ended with 1: ")
    assert "CudaError" in outcome.error


def test_a_part_that_takes_too_long_is_ended() -> None:
    """
    Its process is gone when its time is over, and the problem says so.
    """
    outcome = spawn("look", Setup("", ""), timeout_s=0.01, leads=True)
    assert outcome.error == "it did not end within 0 s"
    assert outcome.code < 0


def test_the_script_for_machines_without_network_ends_where_wheels_are_missing(
    tmp_path: Path,
) -> None:
    """
    It says where it looked, and begins nothing.
    """
    places = {name: str(tmp_path / name.lower()) for name in ("OUT", "SCRATCH")}
    environment = {**os.environ, **places, "WHEELS": str(tmp_path / "none")}
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "benchmarks" / "gpu_offline.sh"), "suite"],
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"the wheels in {tmp_path / 'none'} were not installed" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_parts_without_time_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    When the budget is spent no more processes are started, and each part is named.
    """
    outcomes = dict(gpu.measure(Setup("", ""), NAMES[1:], time.monotonic()))
    assert list(outcomes) == NAMES[1:]
    assert all("left out" in outcome.error for outcome in outcomes.values())
    assert not capsys.readouterr().err


def test_a_second_turn_is_taken_only_if_there_is_time_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Whoever has had one turn has a figure; a turn that is cut off gives none.
    """
    clock = iter([0.0, 0.0, 60.0, 0.0, 0.0, 60.0])
    turns = []

    def spawned(_: str, setup: Setup, argument: str) -> Outcome:
        assert setup.turns == 2
        turns.append(argument[0])
        return Outcome((), "", 0.0, 0.0, 0)

    monkeypatch.setattr(gpu_turns, "spawn", spawned)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for allowed_s in ("119", "120"):
        assert not list(gpu_turns.switch(Setup("", ""), allowed_s))
    assert "".join(turns) == "0000" + "00001111"


@pytest.mark.parametrize("is_measured", [True, False])
@pytest.mark.parametrize("given", ["", "empty", "used", "missing"])
def test_kernels_are_compiled_into_an_empty_folder_if_that_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    is_measured: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """
    The one that is given is used wherever that can be, so that others find them.
    """
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "one").touch()
    monkeypatch.setenv("CUDA_CACHE_PATH", str(tmp_path / given) if given else "")
    own, found = (
        tmp_path / "own",
        gpu._kernels(tmp_path / "own", is_measured=is_measured),
    )
    needs_own = not given or (given == "used" and is_measured)
    assert found == (own / "kernels" if needs_own else tmp_path / given)


def test_results_that_cannot_be_written_are_told_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    """
    A directory that is there or can be made is no problem.
    """
    (tmp_path / "file").touch()
    assert "name a directory with --out" in gpu._not_writable(tmp_path / "file" / "a")
    assert gpu._not_writable(tmp_path / "new" / "folder") == ""
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_models_that_do_not_fit_the_disk_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The problem says how much they take.
    """
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    setup = Setup(str(tmp_path), str(tmp_path / "models"), ("tiny",))
    assert "the models take 0.1 GB" in gpu.write_models(setup)
    assert not list((tmp_path / "models").iterdir())


# Records and targets ------------------------------------------------------------------

HELD = Held(100, 200, 300, 1000)
TIER = Tier("large-v3", "float16", RESTORE, (0.3, 0.5, 0.4), 3000)
SIZE = Size(
    "tiny",
    "float16",
    weights_bytes=1000,
    predicted_bytes=1100,
    measured_bytes=1100,
    returned_bytes=1100,
    pool_left_bytes=10,
)


@pytest.mark.parametrize(
    "record", [HELD_CYCLE := Cycle(3, HELD, HELD, 7), TIER, SIZE, Look("One", 1, "")]
)
def test_records_survive_the_way_through_a_pipe(record: Record) -> None:
    """
    What is printed is read as it was.
    """
    assert revive(dump(record)) == record


@pytest.mark.parametrize("line", ["", "a warning", "[1]", "{}", dump(TIER)[:-5]])
def test_other_lines_are_no_records(line: str) -> None:
    """
    What libraries print, and what was cut off, is passed over.
    """
    assert revive(line) is None


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 0.99),
        ({"returned_bytes": 900}, 0.9),
        ({"pool_left_bytes": None, "gauge_left_bytes": 200}, 0.8),
        ({"pool_left_bytes": -50}, 1.0),
        ({"error": "it does not fit"}, None),
    ],
)
def test_the_share_that_returned_is_the_least_that_was_seen(
    changes: dict[str, int], share: float | None
) -> None:
    """
    By whispercache, by the pool, or by the gauge where there is no pool.
    """
    size = replace(SIZE, **changes)  # type: ignore[arg-type]
    assert size.returned_share == (None if share is None else pytest.approx(share))


def tiers(restore_s: float, crossing_s: float, construct_s: float) -> list[Record]:
    """
    Large-v3 in float16 by these seconds.
    """
    return [
        replace(TIER, step=step, seconds=(seconds,))
        for step, seconds in (
            (RESTORE, restore_s),
            (PAGEABLE, crossing_s),
            (CONSTRUCT, construct_s),
        )
    ]


def cycles(grown_bytes: int) -> list[Record]:
    """
    A hundred of them, each with so much more on the host.
    """
    return [Cycle(n, HELD, HELD, 10_000 + n * grown_bytes) for n in range(100)]


def reached(records: list[Record]) -> dict[str, bool | None]:
    """
    Which targets are, by the first words that tell them apart.
    """
    keys = ("returned", "crossing", "construction", "pool", "loaded", "left", "host")
    targets = judge(records)
    return dict(
        zip((*keys, "weights", "work"), (t.reached for t in targets), strict=True)
    )


def test_targets_that_are_reached() -> None:
    """
    All of them are, where everything is just good enough.
    """
    works: list[Record] = [Work("tiny", "float16", "beam 1", 100, 109, 1.0)]
    records = [SIZE, *works, *tiers(1.5, 1.0, 7.5), *cycles(1)]
    assert reached(records) == dict.fromkeys(reached([]), True)


@pytest.mark.parametrize(
    ("records", "missed"),
    [
        ([SIZE, replace(SIZE, size="base", pool_left_bytes=31)], "returned"),
        ([replace(SIZE, measured_bytes=980)], "weights"),
        ([Work("tiny", "float16", "beam 1", 100, 111, 1.0)], "work"),
        (tiers(1.51, 1.0, 100.0), "crossing"),
        (tiers(1.0, 1.0, 4.9), "construction"),
        (cycles(2), "host"),
    ],
)
def test_targets_that_are_missed(records: list[Record], missed: str) -> None:
    """
    One that is just not good enough is told, by the worst that was measured.
    """
    found = reached(records)
    assert [name for name, is_so in found.items() if is_so is False] == [missed]


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    """
    Nothing, too few cycles, and sizes that failed count for nothing.
    """
    records = [*cycles(0)[:99], replace(SIZE, error="no"), replace(TIER, seconds=())]
    assert set(reached(records).values()) == {None}
    assert set(reached([]).values()) == {None}


def test_growth_leaves_out_what_is_made_once() -> None:
    """
    The first tenth does not count; a few readings tell nothing.
    """
    assert growth([5] * 10 + [100] * 80 + [110] * 10) == pytest.approx(0.1)
    assert growth([1, 2, 3]) is None


# Small parts --------------------------------------------------------------------------


def test_a_size_that_was_not_asked_for_is_stood_for_by_its_neighbour() -> None:
    """
    The nearest one takes its place.
    """
    setup = Setup("", "", ("base", "medium"))
    wanted = ("tiny", "small", "large-v3")
    assert [setup.nearest(size) for size in wanted] == ["base", "base", "medium"]
    assert Setup.of(setup.dump()) == setup


def test_another_user_gets_caches_of_its_own(tmp_path: Path) -> None:
    """
    With the kernels that are compiled already.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one").write_text("code")
    own = _home_of(os.geteuid(), tmp_path, tmp_path / "kernels")
    assert (own / "kernels" / "one").read_text() == "code"
    assert (own / "cache").is_dir()
    assert own.stat().st_uid == os.geteuid()


def test_a_report_is_written_with_all_that_was_measured(tmp_path: Path) -> None:
    """
    Tables for people, records for programs; what failed is in both, and what was not
    begun is named.
    """
    records = (Machine("card", "Mystery 9000"), SIZE, Said("hello"))
    outcomes = {
        "machine": Outcome(records, "", 1.0, 3.5, 0),
        "tiers": Outcome((), "it ended with SIGSEGV: oh", 3.5, 4.0, -11),
    }
    card, setup = "Mystery 9000 (80 GB)", Setup("", "")
    for known in ({"machine": outcomes["machine"]}, outcomes):
        shown = gpu_report.report(card, setup, known, ["machine", "tiers", "exit"])
        text, raw = gpu_report.keep(tmp_path, shown, card, setup, known)
    assert sorted(tmp_path.iterdir()) == sorted([text, raw])
    assert text.name.startswith("gpu-mystery-9000-80-gb-")
    assert "Mystery 9000 |" in text.read_text()
    assert "it ended with SIGSEGV: oh" in text.read_text()
    assert "PRETENDED" not in text.read_text()
    assert text.read_text().count("not begun") == 1
    parts = json.loads(raw.read_text())["parts"]
    assert parts["machine"]["seconds"] == 2.5
    assert parts["machine"]["records"][2] == {"record": "Said", "text": "hello"}
    assert parts["tiers"]["error"] == "it ended with SIGSEGV: oh"
