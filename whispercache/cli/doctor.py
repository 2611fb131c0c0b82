"""
The command ``whispercache doctor``: what running models needs, and how to mend it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from whispercache.devices.cublas import cublas_problem, cublas_version
from whispercache.devices.cuda import DRIVER_LIBRARY
from whispercache.devices.heap import huge_pages, huge_pages_problem
from whispercache.devices.nvml import driver_version, nvml_problem
from whispercache.devices.release import compile_reason, cublas_reason
from whispercache.engine.process import (
    TELEMETRY,
    decoding_problem,
    telemetry_setting,
    versions,
)
from whispercache.errors import DeviceUnavailable, WhisperCacheError, format_bytes
from whispercache.settings.sources import settle

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from whispercache.devices.memory import MemoryProbe
    from whispercache.engine.api import Loader

    Mark = Literal["works", "note", "wrong"]

_GIB = 1024**3

SMALL_DISK_BYTES = 4 * _GIB
"""
Free bytes of the hub cache's disk below which a large model may not fit.

Source: large-v3 is 3.1 GB on the hub, and is there in full before its old version goes.
"""

CUDA_12_DRIVER = "525.60.13"
"""
The first driver for Linux that runs CUDA 12.

Source: NVIDIA, CUDA compatibility, minor version compatibility.
"""


WITHOUT_HUGE_PAGES = "takes twice as long"
"""
What it costs that models cannot be loaded into huge pages.

Source: benchmarks/switch.py, on the CPU, tiny.en and base in turn.
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that was examined: its state, and the cure or nothing.
    """

    mark: Mark
    subject: str
    text: str
    mend: str = ""


def examine(loader: Loader, probe: MemoryProbe) -> Iterator[Finding]:
    """
    Examines everything. Blocks for the imports of the libraries that run the models,
    about a second.
    """
    # All of them first: the rest depends on their being there.
    libraries = list(_libraries())
    yield from libraries
    has_libraries = all(finding.mark == "works" for finding in libraries)
    if has_libraries:
        # Only where faster-whisper is, which needs it.
        yield from _forks()
        yield _pyav()
        yield _onnxruntime()
        yield _arithmetic("cpu", loader)
    yield _settings()
    yield _host(probe)
    yield _huge_pages()
    yield from _hub_cache()
    cards = probe.cuda_devices()
    if not cards:
        yield from _no_card(probe)
        return
    yield from _driver()
    for card in cards:
        yield _card(card, probe)
    if has_libraries:
        yield from _cuda(cards, loader)


def show(findings: list[Finding], console: Console) -> None:
    """
    Prints findings, and what they come to.
    """
    from rich.table import Table
    from rich.text import Text

    plain = not console.encoding.startswith("utf")
    # Each mark has a sign as well as a colour.
    marks = {
        "works": Text("+" if plain else "✓", "green"),
        "note": Text("-" if plain else "·", "dim"),
        "wrong": Text("!" if plain else "✗", "bold red"),
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        text = Text(finding.text)
        if finding.mend:
            text.append(f"\n{finding.mend}", "yellow")
        table.add_row(marks[finding.mark], Text(finding.subject, "bold"), text)
    console.print(table)
    wrong = [finding.subject for finding in findings if finding.mark == "wrong"]
    if wrong:
        console.print(Text(f"\nTo mend: {', '.join(wrong)}.", "bold red"))
        return
    subjects = [finding.subject for finding in findings]
    where = "GPU and CPU" if "cuda:0" in subjects else "the CPU"
    console.print(Text(f"\nAll that is needed works: models run on {where}.", "bold"))


def _libraries() -> Iterator[Finding]:
    yield Finding("works", "Python", f"{platform.python_version()}, {sys.executable}")
    try:
        found = versions()
    except ImportError as error:
        yield Finding(
            "wrong",
            error.name or "faster-whisper",
            f"cannot be imported: {error}",
            "pip install --force-reinstall faster-whisper ctranslate2",
        )
        return
    for name, number in found.items():
        yield Finding("works", name, number)


def _forks() -> Iterator[Finding]:
    """
    Finds packages that brought the same module, so that one lies over the other.
    """
    names = sorted(set(packages_distributions().get("faster_whisper", ())))
    if len(names) > 1:
        yield Finding(
            "wrong",
            "packages",
            f"{' and '.join(names)} are both installed, one over the other",
            f"pip uninstall {' '.join(names)}, then install the one that you want",
        )


def _pyav() -> Finding:
    """
    Returns the state of the library that decodes audio, for programs that have
    faster-whisper decode it as well.
    """
    try:
        number = version("av")
    except PackageNotFoundError:
        # An empty module is enough for faster-whisper to be imported.
        text = "not installed: samples can be heard, and no files"
        return Finding("note", "PyAV", text, "pip install av")
    problem = decoding_problem()
    if not problem:
        return Finding("works", "PyAV", number)
    return Finding(
        "note",
        "PyAV",
        f"{number}: the cache reads files, but faster-whisper's own decode_audio() "
        f"fails ({problem})",
        "pip install 'av<19', or install() before your program calls that",
    )


def _onnxruntime() -> Finding:
    """
    Returns the state of the library that finds speech, and of its telemetry. Not
    imported: that is what would begin to tell.
    """
    # It comes from one of several packages, for example onnxruntime-gpu.
    # None of ours requires it by name; it comes with faster-whisper.
    name = next(iter(packages_distributions().get("onnxruntime", ())), None)
    if name is None:
        return Finding(
            "wrong",
            "onnxruntime",
            "not installed: vad_filter= and batch_size= find no speech without it",
            "pip install onnxruntime",
        )
    is_off, by = telemetry_setting()
    value = f"{TELEMETRY}={os.environ[TELEMETRY]}"
    text = f"{version(name)}; its telemetry is {'off' if is_off else 'on'}, by {by}"
    if is_off:
        return Finding("works", "onnxruntime", f"{text} ({value})")
    return Finding(
        "note",
        "onnxruntime",
        f"{text} ({value}): from 1.29 on it sends usage data, and writes an id and a "
        "database into the cache directory",
        f"unset {TELEMETRY}, or set it to 1, to keep it off",
    )


def _arithmetic(device: str, loader: Loader) -> Finding:
    types = loader.supported_compute_types(device)
    return Finding("works", f"types, {device}", ", ".join(sorted(types)))


def _settings() -> Finding:
    try:
        held = settle()
    except (OSError, ValueError) as error:
        return Finding("wrong", "settings", str(error), "whispercache config --help")
    said = [
        f"{key} from {each.place}"
        for key, each in held.items()
        if each.source != "default"
    ]
    return Finding("works", "settings", ", ".join(said) or "the defaults")


def _host(probe: MemoryProbe) -> Finding:
    reading = probe.read("cpu")
    machine_bytes = psutil.virtual_memory().total
    limit = "no control group limits it"
    # A container's share counts, and not the machine.
    if reading.total_bytes < machine_bytes:
        limit = (
            f"a control group's limit; the machine has {format_bytes(machine_bytes)}"
        )
    room = f"{format_bytes(reading.free_bytes)} of {format_bytes(reading.total_bytes)}"
    return Finding("works", "host memory", f"{room} free; {limit}")


def _huge_pages() -> Finding:
    if problem := huge_pages_problem():
        what, _, mend = problem.partition(": ")
        text = f"none, since {what}; a change of models in float32 {WITHOUT_HUGE_PAGES}"
        return Finding("note", "huge pages", text, mend)
    text = (
        f"models are loaded into them (the kernel's setting is {huge_pages()}), by "
        "the commands, and by programs that call use_huge_pages()"
    )
    return Finding("works", "huge pages", text)


def _hub_cache() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    # What is not there yet is made at the first download.
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(there).free
    text = f"{folder}, {format_bytes(free_bytes)} of its disk free"
    elsewhere = "set HF_HOME to a folder on another disk"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding("wrong", "hub cache", f"{text}; not writable", elsewhere)
    # No error: small models still fit.
    elif free_bytes < SMALL_DISK_BYTES:
        mend = f"large models take 3 GiB: make room, or {elsewhere}"
        yield Finding("note", "hub cache", text, mend)
    else:
        yield Finding("works", "hub cache", text)


def _no_card(probe: MemoryProbe) -> Iterator[Finding]:
    """
    Yields the reason why no GPU can be used. To have none, or to hide it, is no error.
    """
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        yield Finding(
            "note",
            "NVIDIA driver",
            f"none ({DRIVER_LIBRARY} not found); nothing is missing without a GPU",
            "with one: install its driver, start a container with --gpus all",
        )
        return
    try:
        probe.read("cuda:0")
    except DeviceUnavailable as error:
        # An empty or odd value hides all cards, mostly on purpose.
        is_hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        yield from _driver()
        what, _, mend = error.reason.partition("; ")
        yield Finding("note" if is_hidden else "wrong", "GPU", what, mend)


def _driver() -> Iterator[Finding]:
    """
    The driver and NVML. Without the latter a cache works, but sees less.
    """
    yield Finding("works", "NVIDIA driver", driver_version() or "version not known")
    problem = nvml_problem()
    if problem:
        what, _, mend = problem.partition(": pip")
        yield Finding(
            "note",
            "NVML",
            f"{what}; memory that other programs took is not seen",
            f"pip{mend}" if mend else "restart after a driver update, or reinstall it",
        )
    else:
        yield Finding("works", "NVML", "tells what is free on each card")


def _card(card: str, probe: MemoryProbe) -> Finding:
    try:
        reading = probe.read(card)
        name = probe.device_name(card)
    except DeviceUnavailable as error:
        what, _, mend = error.reason.partition("; ")
        return Finding("wrong", card, what, mend)
    room = f"{format_bytes(reading.free_bytes)} of {format_bytes(reading.total_bytes)}"
    return Finding("works", card, f"{name}, {room} free, says {reading.source}")


def _cuda(cards: tuple[str, ...], loader: Loader) -> Iterator[Finding]:
    seen = [device for device in loader.devices() if device != "cpu"]
    # The driver has more than CTranslate2 can use.
    if set(cards) - set(seen):
        text = f"CTranslate2 sees {len(seen)} of {len(cards)} GPUs"
        mend = f"update the driver to {CUDA_12_DRIVER} or later, which CUDA 12 needs"
        major = (driver_version() or "").partition(".")[0]
        if major.isdecimal() and int(major) >= int(CUDA_12_DRIVER.partition(".")[0]):
            mend = (
                "check with nvidia-smi; install CTranslate2 with CUDA, which its "
                "packages for x86-64 have"
            )
        yield Finding("wrong", "CUDA", text, mend)
    else:
        yield Finding("works", "CUDA", f"CTranslate2 sees {', '.join(seen)}")
    for device in seen:
        try:
            yield _arithmetic(device, loader)
        except WhisperCacheError as error:
            yield Finding("wrong", f"types, {device}", str(error))
        if reason := compile_reason(device):
            yield Finding("note", f"kernels, {device}", f"at the first load {reason}")
    yield from _cublas(seen)


def _cublas(devices: Sequence[str]) -> Iterator[Finding]:
    if problem := cublas_problem():
        what, _, mend = problem.partition(": ")
        yield Finding("wrong", "cuBLAS", what, mend)
        return
    reasons = [reason for device in devices if (reason := cublas_reason(device))]
    # Cards of one kind have one reason.
    for reason in dict.fromkeys(reasons):
        yield Finding(
            "wrong",
            "cuBLAS",
            f"{reason}: int8 fails (CUBLAS_STATUS_NOT_SUPPORTED)",
            "pip install -U nvidia-cublas-cu12; until then, compute_type='float16'",
        )
    if not reasons:
        version = ".".join(map(str, cublas_version() or (12,)))
        yield Finding("works", "cuBLAS", f"version {version} is found")
