"""
A short transcription from cold: the command in a fresh process, beside faster-whisper.

    python benchmarks/cold.py [--rounds 15] [--before DIR] [--write]

Both read the tiny.en of the examples as int8 on the CPU, and a clip of three seconds;
they import what they need, construct the model, transcribe, print, and end. All that is
measured is the time of their processes, from the start to the end. *before* is a
checkout of an earlier version, to be measured in turn with this one.

What a machine has after some use is there: files in the page cache, byte code (in a
directory of its own, for all of them), the variant, footprints that were learned.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import page_cache
from report import Table, machine, parsed, write

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "clips" / "en-bread.flac"

PLAIN = """
import sys
from faster_whisper import WhisperModel

model = WhisperModel(sys.argv[1], device="cpu", compute_type="int8")
segments, _ = model.transcribe(sys.argv[2])
for segment in segments:
    print(segment.text.strip())
"""
# As the script that an installer writes.
SCRIPT = "import sys; from whispercache.cli.main import script; sys.exit(script())"
CACHE = "from whispercache import get_model, ModelCache"
# Each load of the first ones is written down as a measured footprint.
WARM_UPS = 6


@dataclass(frozen=True)
class Program:
    name: str
    arguments: list[str]
    checkout: Path


def programs(before: Path | None, model: Path) -> tuple[list[Program], list[Program]]:
    """
    Returns what is transcribed with, and what is imported, each list with its yardstick
    first; of the latter, the very first is an empty program.
    """
    plain = ["-c", PLAIN, str(model), str(CLIP)]
    place = ["--device", "cpu", "--compute-type", "int8"]
    command = ["-c", SCRIPT, "transcribe", str(CLIP), "--model", str(model), *place]
    jobs = [Program("faster-whisper", plain, ROOT)]
    imports = [
        Program("nothing", ["-c", ""], ROOT),
        Program("import faster_whisper", ["-c", "import faster_whisper"], ROOT),
    ]
    checkouts = [(", this version", ROOT)]
    if before is not None:
        checkouts.insert(0, (", before", before))
    for version, root in checkouts:
        jobs.append(Program(f"whispercache transcribe{version}", command, root))
        lines = ("import whispercache", CACHE)
        imports += (Program(f"{each}{version}", ["-c", each], root) for each in lines)
    return jobs, imports


class Bench:
    """
    Runs programs, with byte code and variants of their own in *home*.
    """

    def __init__(self, home: Path, model: Path) -> None:
        self._home = home
        self._model = model
        self.said: dict[str, str] = {}

    def environment(self, checkout: Path) -> dict[str, str]:
        env = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "PYTHONPYCACHEPREFIX": str(self._home / "bytecode"),
            "XDG_CACHE_HOME": str(self._home / "cache"),
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        return env

    def build_variant(self, checkout: Path) -> None:
        script = ["-c", SCRIPT, "variants", "build", f"{self._model}:int8"]
        self._run(Program("variants build", script, checkout))

    def run(self, program: Program) -> tuple[float, float]:
        """
        Returns the seconds that a process took, and those of CPU time.
        """
        # Page caches of virtual machines lose files within minutes.
        for path in (*self._model.iterdir(), *self._home.rglob("model.bin"), CLIP):
            page_cache.read(path)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started_s = time.perf_counter()
        self.said[program.name] = self._run(program)
        taken_s = time.perf_counter() - started_s
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return taken_s, cpu_s

    def _run(self, program: Program) -> str:
        # Python would look for modules in its current directory first.
        done = subprocess.run(
            [sys.executable, *program.arguments],
            env=self.environment(program.checkout),
            cwd=self._home,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program.name}: {done.stderr}")
        return done.stdout

    def medians(
        self, several: list[Program], rounds: int, warm_ups: int
    ) -> dict[str, tuple[float, float]]:
        taken: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for turn in range(warm_ups + rounds):
            for program in several:
                one = self.run(program)
                if turn >= warm_ups:
                    taken[program.name].append(one)
        return {
            name: (
                statistics.median(wall_s for wall_s, _ in all_),
                statistics.median(cpu_s for _, cpu_s in all_),
            )
            for name, all_ in taken.items()
        }


def table(title: str, found: dict[str, tuple[float, float]], yardstick: str) -> Table:
    made = Table(title, ["", "ms", "ratio", "ms of CPU", "ratio"])
    whole_s, whole_cpu_s = found[yardstick]
    for name, (wall_s, cpu_s) in found.items():
        of_cpu = f"{cpu_s * 1e3:.0f}", f"{cpu_s / whole_cpu_s:.2f}"
        made.add(name, f"{wall_s * 1e3:.0f}", f"{wall_s / whole_s:.2f}", *of_cpu)
    return made


def main() -> None:
    options = parsed(__doc__, rounds=15, before="")
    sys.path.insert(0, str(ROOT))
    from examples.weights import packaged_model

    model = packaged_model("tiny.en")
    before = Path(options.before).resolve() if options.before else None
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), model)
        jobs, imports = programs(before, model)
        for job in jobs[1:]:
            bench.build_variant(job.checkout)
        transcribed = bench.medians(jobs, options.rounds, WARM_UPS)
        texts = {bench.said[job.name] for job in jobs}
        if len(texts) != 1:
            raise RuntimeError(f"they heard different things: {texts}")
        imported = bench.medians(imports, options.rounds, 1)
    empty_s, empty_cpu_s = imported.pop("nothing")
    net = {
        name: (wall_s - empty_s, cpu_s - empty_cpu_s)
        for name, (wall_s, cpu_s) in imported.items()
    }
    parts: list[object] = [
        machine(),
        table(
            f"A clip of 3 s, tiny.en as int8: medians of {options.rounds} processes",
            transcribed,
            jobs[0].name,
        ),
        table("Imports alone, without those of an empty program", net, imports[1].name),
    ]
    write("cold", parts, to_file=options.write)


if __name__ == "__main__":
    main()
