"""
The GPU benchmark and the GPU suite on machines without a card, over fake drivers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakes import needs_linux

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from gpu import command, parts, report, run, trials, ways

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [needs_linux, pytest.mark.process]

ROOT = Path(__file__).resolve().parents[2]
NAMES = [part.name for part in command.PARTS]
SUITE = """
import os, sys
from pathlib import Path
sys.path.append("benchmarks")
from gpu import pretend
pretend.prepare(Path(sys.argv[1]))
less = ["-k", "not small and not large-v3 and not cub_caching"]
suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *less, "tests/gpu/test_gpu.py"]
os.execv(sys.executable, [sys.executable, *suite])
"""


def start(*line: str | Path, **environment: str) -> subprocess.Popen[str]:
    """
    Starts a program of ours, without coverage, which slows it down.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, *map(str, line)],
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
    benchmark = ("--pretend", "--sizes", "small", "large-v3", "--out", home / "out")
    programs = {
        "benchmark": start("benchmarks/gpu", *benchmark),
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
    assert lines[0] == report.PRETENDED
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    problems = {row[0]: row[2] for row in rows if row[0] in NAMES}
    assert problems == dict.fromkeys(NAMES, "none")
    first = (parts.MACHINE, parts.CROSSINGS, parts.WARM_UPS, parts.BYTES, parts.WORK)
    rest = (
        parts.CYCLES,
        ways.TIERS,
        ways.EXITS,
        trials.FULL,
        trials.PARKED,
        trials.PAIR,
    )
    assert {*first, *rest} <= {line.strip("*") for line in lines}
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


def test_without_a_card_it_says_why_and_writes_nothing() -> None:
    """
    One line, the exit code 2, and no file.
    """
    results = sorted((ROOT / "benchmarks" / "results").iterdir())
    program = start("benchmarks/gpu", "--write", CUDA_VISIBLE_DEVICES="")
    output, said = program.communicate(timeout=60)
    assert program.returncode == 2
    assert not output
    assert len(said.splitlines()) == 1
    begin = "the GPU benchmark cannot run here: device 'cuda:0' cannot be used"
    assert said.startswith(begin)
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == results


def test_what_is_pretended_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Figures that are made up do not get between those that were measured.
    """
    with pytest.raises(SystemExit) as refused:
        command.main(["--pretend", "--write"])
    assert refused.value.code == 2
    assert "not written" in capsys.readouterr().err


def test_a_part_that_fails_or_takes_too_long_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    The last line of its process is its problem, or that its time was over.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    failed = run.spawn("machine", run.Setup("", ""))
    assert failed.rows == ()
    assert failed.error.startswith("it ended with 1: ")
    assert "CudaError" in failed.error
    late = run.spawn("look", run.Setup("", ""), timeout_s=0.01, leads=True)
    assert late.error == "it did not end within 0 s"
    assert late.code < 0


def test_the_script_for_machines_without_network_ends_where_wheels_are_missing(
    tmp_path: Path,
) -> None:
    """
    It says where it looked, and begins nothing.
    """
    places = {name: str(tmp_path / name.lower()) for name in ("OUT", "SCRATCH")}
    environment = {**os.environ, **places, "WHEELS": str(tmp_path / "none")}
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "benchmarks" / "gpu" / "offline.sh"), "suite"],
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"the wheels in {tmp_path / 'none'} were not installed" in done.stderr
    assert not list((tmp_path / "out").iterdir())


# What is asked of a card --------------------------------------------------------------


def size(returned: float = 0.97, measured: int = 1090) -> run.Row:
    """
    A model that 1000 bytes were predicted for.
    """
    share = {"share returned": returned}
    cells = {"": "tiny", "predicted": 1000, "measured": measured}
    return run.Row(parts.BYTES, cells | share)


def work(measured: int) -> run.Row:
    """
    Work that 100 bytes were reserved for.
    """
    return run.Row(parts.WORK, {"": "beam 1", "predicted": 100, "measured": measured})


def tiers(restore_s: float, crossing_s: float, construct_s: float) -> list[run.Row]:
    """
    Large-v3 in float16 with these seconds.
    """
    steps = (ways.RESTORE, ways.PAGEABLE, ways.CONSTRUCT)
    pairs = zip(steps, (restore_s, crossing_s, construct_s), strict=True)
    return [
        run.Row(ways.TIERS, {"": f"large-v3 float16: {step}", "median, s": each})
        for step, each in pairs
    ]


def cycles(grown_bytes: int) -> list[run.Row]:
    """
    A hundred cycles, each with so much more on the host.
    """
    held = {"pool, loaded": 200, "gauge, loaded": 1000, "gauge, left": 1000}
    return [
        run.Row(parts.CYCLES, {**held, "host": 10_000 + n * grown_bytes})
        for n in range(100)
    ]


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([], []),
        ([size(), work(109), *tiers(1.5, 1.0, 7.5), *cycles(1)], []),
        ([size(), size(0.96)], ["weights' bytes"]),
        ([size(measured=890)], ["bytes of weights"]),
        ([work(111)], ["bytes of work"]),
        (tiers(1.51, 1.0, 100.0), ["card's own copy"]),
        (tiers(1.0, 1.0, 4.9), ["constructing"]),
        (cycles(2), ["anonymous memory"]),
    ],
)
def test_a_target_is_missed_by_the_worst_that_was_measured(
    rows: list[run.Row], missed: list[str]
) -> None:
    """
    Rows as children print them; one that is just good enough is no miss.
    """
    lines = ["a warning", "1", '["a", 2]', *map(json.dumps, rows), '["Machine", {"']
    read = [found for found in map(run.revive, lines) if found is not None]
    assert read == rows
    failed = [each.asked for each in report.judge(read) if each.reached is False]
    pairs = zip(failed, missed, strict=True)
    assert all(word in asked for asked, word in pairs)
