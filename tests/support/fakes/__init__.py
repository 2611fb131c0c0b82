"""
Fake NVIDIA drivers in C, and child processes in which the real bindings load them.

A library can be found by ``LD_LIBRARY_PATH`` only if that was set before the process
began, and driver and binding keep state for the life of a process: hence the children.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = [
    "CARD_A",
    "CARD_B",
    "GIB",
    "MIB",
    "ONE_CARD",
    "SLOT_A",
    "TWO_CARDS_SWAPPED",
    "UUID_A",
    "UUID_B",
    "FakeGpus",
    "build_drivers",
    "build_library",
    "needs_linux",
    "run_child",
]

MIB = 1024**2
GIB = 1024 * MIB

UUID_A = "GPU-11111111-2222-3333-4444-555555555555"
UUID_B = "GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
SLOT_A, SLOT_B = "0000:01:00.0", "0000:02:00.0"
CARD_A = f"card {UUID_A} {SLOT_A} {8 * GIB} {1 * GIB} Alpha"
CARD_B = f"card {UUID_B} {SLOT_B} {24 * GIB} {4 * GIB} Beta"
ONE_CARD = f"{CARD_A}\nvisible 0"
TWO_CARDS_SWAPPED = f"{CARD_A}\n{CARD_B}\nvisible 1 0"

needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="fake drivers are found by LD_LIBRARY_PATH"
)

_HERE = Path(__file__).parent
_LIBRARIES = {"cuda": "libcuda.so.1", "nvml": "libnvidia-ml.so.1"}
_HIDEABLE = {**_LIBRARIES, "cublas": "libcublas.so.12"}

_PROLOGUE = """
import json
from whispercache.devices import nvml
from whispercache.devices.probe import SystemProbe
from whispercache.errors import DeviceUnavailable

probe = SystemProbe()

def reading(device):
    try:
        found = probe.read(device)
    except DeviceUnavailable as error:
        return str(error)
    return [found.total_bytes, found.free_bytes, found.source]
"""


def build_drivers(folder: Path) -> Path:
    """
    Compile the fake drivers into *folder*, each in a folder of its own.

    Without a C compiler the test is skipped, but never on CI.
    """
    for name, library in _LIBRARIES.items():
        build_library(folder / name / library, _HERE / f"fake_{name}.c")
    return folder


def build_library(library: Path, source: Path, *needs: Path) -> None:
    """
    Compile C *source* into a shared *library* that the loader knows by its file name.

    It *needs* other libraries, which the loader has to find by their names. Without a C
    compiler the test is skipped, but never on CI.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler (cc): the GPU readings would go untested")
        pytest.skip("no C compiler (cc) to build the fake drivers with")
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *(compiler, "-std=c11", "-Wall", "-Werror", "-shared", "-fPIC"),
            *(f"-Wl,-soname,{library.name}", "-o", str(library), str(source)),
            *map(str, needs),
        ],
        check=True,
        timeout=60,
    )


def run_child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """
    Run Python *code* in a fresh interpreter in which every warning is an error.
    """
    paths = [str(_HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@dataclass(frozen=True)
class FakeGpus:
    """
    A machine with imaginary GPUs, and the children that run on it.

    Attributes:
        folder: A test's own folder, for the machine's state and the calls it saw.
        drivers: Where `build_drivers` put the libraries.
    """

    folder: Path
    drivers: Path

    def set_state(self, text: str) -> None:
        """
        Make the machine what *text* says; its words are explained in fake_gpu.h.
        """
        lines = [line.strip() for line in text.splitlines()]
        (self.folder / "state").write_text("\n".join(lines))

    def hold(self, card: int, **held_bytes: int) -> None:
        """
        Let the children, one process to the machine, hold that much of *card*.

        The words are those of fake_gpu.h; cards are counted as in the state.
        """
        fresh = self.folder / f"state.{card}.fresh"
        lines = (f"{word} {number}" for word, number in held_bytes.items())
        fresh.write_text("\n".join(lines))
        fresh.replace(self.folder / f"state.{card}")

    def held(self, card: int) -> dict[str, int]:
        """
        What is held of *card* now, by fake_gpu.h's words.
        """
        lines = (self.folder / f"state.{card}").read_text().splitlines()
        return {word: int(number) for word, number in map(str.split, lines)}

    def answer(
        self, code: str, *, without: tuple[str, ...] = (), **environment: str
    ) -> object:
        """
        What *code* left in ``answer``, run in a child with these drivers but *without*.

        It finds ``probe``, ``nvml`` and ``reading(device)``: total, free and source,
        or the text of the error. The child must succeed and print no other thing.
        """
        epilogue = "\nprint(json.dumps(answer))\n"
        child = run_child(
            _PROLOGUE + textwrap.dedent(code) + epilogue,
            LD_LIBRARY_PATH=self._library_path(without),
            FAKE_GPU_STATE=str(self.folder / "state"),
            FAKE_GPU_CALLS=str(self.folder / "calls"),
            **environment,
        )
        if child.returncode != 0 or child.stderr:
            pytest.fail(f"the child ended with {child.returncode}: {child.stderr}")
        return json.loads(child.stdout)

    def calls(self) -> list[str]:
        """
        The driver functions that the children called, in order.
        """
        try:
            return (self.folder / "calls").read_text().split()
        except FileNotFoundError:
            return []

    def _library_path(self, without: tuple[str, ...]) -> str:
        """
        The loader's path. A missing driver is a broken file, lest a real one be found.
        """
        folders = []
        for name, library in _HIDEABLE.items():
            folder = self.drivers / name
            if name in without:
                folder = self.folder / f"no-{name}"
                folder.mkdir(exist_ok=True)
                (folder / library).write_text("not a library")
            folders.append(str(folder))
        inherited = os.environ.get("LD_LIBRARY_PATH", "")
        return os.pathsep.join(filter(None, [*folders, inherited]))
