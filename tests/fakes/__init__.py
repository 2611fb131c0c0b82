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

__all__ = ["MIB", "FakeGpus", "build_drivers", "run_child"]

MIB = 1024**2

_HERE = Path(__file__).parent
_LIBRARIES = {"cuda": "libcuda.so.1", "nvml": "libnvidia-ml.so.1"}

_PROLOGUE = """
import json
from whispercache import memory
from whispercache.errors import DeviceUnavailable

probe = memory.SystemProbe()

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
    compiler = shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler (cc): the GPU readings would go untested")
        pytest.skip("no C compiler (cc) to build the fake drivers with")
    for name, library in _LIBRARIES.items():
        (folder / name).mkdir(parents=True)
        subprocess.run(
            [
                *(compiler, "-std=c11", "-Wall", "-Werror", "-shared", "-fPIC"),
                *(f"-Wl,-soname,{library}", "-o", str(folder / name / library)),
                str(_HERE / f"fake_{name}.c"),
            ],
            check=True,
            timeout=60,
        )
    return folder


def run_child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """
    Run Python *code* in a fresh interpreter in which every warning is an error.
    """
    paths = [str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
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

    def answer(
        self, code: str, *, without: tuple[str, ...] = (), **environment: str
    ) -> object:
        """
        What *code* left in ``answer``, run in a child with these drivers but *without*.

        It finds ``probe``, ``memory`` and ``reading(device)``: total, free and source,
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
        for name, library in _LIBRARIES.items():
            folder = self.drivers / name
            if name in without:
                folder = self.folder / f"no-{name}"
                folder.mkdir(exist_ok=True)
                (folder / library).write_text("not a library")
            folders.append(str(folder))
        inherited = os.environ.get("LD_LIBRARY_PATH", "")
        return os.pathsep.join(filter(None, [*folders, inherited]))
