"""
The command ``whispercache models``: a table of the known models and their bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from whispercache.devices.memory import headroom_bytes
from whispercache.engine.sizes.architecture import ARCHITECTURES, HUB_COMPUTE_TYPE
from whispercache.engine.sizes.footprint import estimate, reserved
from whispercache.errors import DeviceUnavailable, format_bytes
from whispercache.keys import MODELS, TYPICAL_COMPUTE_TYPES, effective_compute_type

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from whispercache.devices.memory import MemoryProbe
    from whispercache.engine.api import Loader

_GIB = 1024**3

# What is worth a column, where the device supports it; int8 comes last.
_CPU_COLUMNS = ("float32", "int8_float32")
_CUDA_COLUMNS = ("float32", "float16", "int8_float16")


@dataclass(frozen=True, slots=True)
class Place:
    """
    A device, and its memory for models: what is free now, and that less the headroom.
    *trouble* is the reason why no model can run there nevertheless, or nothing.
    """

    device: str
    name: str
    total_bytes: int
    free_bytes: int
    usable_bytes: int
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Size:
    """
    The bytes of one known model on one device: of its weights while it is loaded, at
    the peak of a load and one call, and in host RAM while it loads to a GPU.
    """

    model: str
    device: str
    compute_type: str
    weights_bytes: int
    total_bytes: int
    host_loading_bytes: int
    fits: bool


def survey(
    device: str, compute_type: str | None, loader: Loader, probe: MemoryProbe
) -> list[tuple[Place, list[Size]]]:
    """
    Returns the known models on each device, GPUs first; all devices for ``"auto"``, all
    GPUs for ``"cuda"``. Without a *compute_type*, in those that are worth a look.
    Raises DeviceUnavailable or UnsupportedComputeType.
    """
    cards = probe.cuda_devices()
    # If there is no card, its reading says why.
    all_of = {"auto": (*cards, "cpu"), "cuda": cards or ("cuda:0",)}
    devices = all_of.get(device, (device,))
    # Loads to a GPU pass through the host's memory, too.
    host = _place("cpu", probe)
    found = []
    for each in devices:
        place = host if each == "cpu" else _place(each, probe)
        # What such hardware mostly has, where CTranslate2 cannot be asked.
        supported = TYPICAL_COMPUTE_TYPES[each.partition(":")[0]]
        try:
            supported = loader.supported_compute_types(each)
        except DeviceUnavailable:
            trouble = "CTranslate2 cannot use it: see whispercache doctor"
            place = _place(each, probe, trouble)
        columns = _CPU_COLUMNS if each == "cpu" else _CUDA_COLUMNS
        types = [name for name in columns if name in supported]
        if compute_type is not None:
            types = [
                effective_compute_type(compute_type, HUB_COMPUTE_TYPE, each, supported)
            ]
        sizes = [_size(model, one, place, host) for model in MODELS for one in types]
        found.append((place, sizes))
    return found


def as_json(found: list[tuple[Place, list[Size]]]) -> str:
    """
    Returns a survey as one JSON object: ``devices`` and ``models``.
    """
    document = {
        "devices": [asdict(place) for place, _ in found],
        "models": [asdict(size) for _, sizes in found for size in sizes],
    }
    return json.dumps(document, indent=2)


def show(found: list[tuple[Place, list[Size]]], console: Console) -> None:
    """
    Prints a survey, a table for each device.
    """
    from rich.text import Text

    for place, sizes in found:
        free, total = format_bytes(place.free_bytes), format_bytes(place.total_bytes)
        room = f"{free} of {total} free, {format_bytes(place.usable_bytes)} for models"
        console.print(Text(f"{place.device}  {place.name}", style="bold"))
        console.print(Text(room))
        if place.trouble:
            console.print(Text(place.trouble, style="red"))
        console.print(_table(sizes, console))
        console.print()
    yes, no = _marks(console)
    console.print(
        Text(
            "GiB. weights: while it is loaded. peak: with one call of beam size 5.\n"
            f"{yes} there is room now, {no} there is not.\n"
            "int8 means int8_float32 on a CPU, int8_float16 on a GPU.",
            style="dim",
        )
    )


def _place(device: str, probe: MemoryProbe, trouble: str = "") -> Place:
    reading, name = probe.read(device), probe.device_name(device)
    total_bytes, free_bytes = reading.total_bytes, reading.free_bytes
    usable_bytes = max(0, free_bytes - headroom_bytes(device, total_bytes))
    return Place(device, name, total_bytes, free_bytes, usable_bytes, trouble)


def _size(model: str, compute_type: str, place: Place, host: Place) -> Size:
    # By the architecture alone: no model is downloaded for a table.
    predicted = estimate(ARCHITECTURES[model], compute_type, place.device)
    footprint = reserved(predicted, place.device)
    fits = (
        # Both must have room.
        footprint.total_bytes <= place.usable_bytes
        and footprint.host_loading_bytes <= host.usable_bytes
    )
    return Size(
        model,
        place.device,
        compute_type,
        footprint.weights_bytes,
        footprint.total_bytes,
        footprint.host_loading_bytes,
        fits,
    )


def _table(sizes: list[Size], console: Console) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 3, 0, 0)
    )
    table.add_column("\nmodel", no_wrap=True)
    types = list(dict.fromkeys(size.compute_type for size in sizes))
    for compute_type in types:
        table.add_column(f"{compute_type}\nweights   peak", no_wrap=True)
    family = ""
    for model in MODELS:
        cells = [_cell(size, console) for size in sizes if size.model == model]
        last, family = family, model.partition("-")[0].partition(".")[0]
        if last and last != family:
            table.add_section()
        table.add_row(model, *cells)
    return table


def _cell(size: Size, console: Console) -> Text:
    from rich.text import Text

    yes, no = _marks(console)
    return Text.assemble(
        (f"{size.weights_bytes / _GIB:7.2f}", "dim"),
        (f"{size.total_bytes / _GIB:7.2f} ", "" if size.fits else "red"),
        (yes, "green") if size.fits else (no, "red"),
    )


def _marks(console: Console) -> tuple[str, str]:
    return ("✓", "✗") if console.encoding.startswith("utf") else ("y", "-")
