# ruff: noqa: N802 - the functions' names are CUDA's
"""
A card that is made up, for ``--pretend``. No figure made on it means anything.

It is the tests' fake drivers, their stand-in for CTranslate2 on a card, and the calls
that only `gpu.card` makes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gpu.run import SIZES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from standin import CardBooks, CardMemory

    from gpu.run import Setup

TESTS = Path(__file__).resolve().parents[2] / "tests" / "support"
GIB = 1024**3

_OUT_OF_MEMORY = 2
_CUDA_VERSION = 12_080
_RUNNING, _LOCKED, _CHECKPOINTED = range(3)

_CARDS = "\n".join(
    [
        f"card GPU-11111111-2222-3333-4444-555555555555 0000:01:00.0 {8 * GIB} 0 One",
        f"card GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee 0000:02:00.0 {8 * GIB} 0 Two",
        "visible 0 1",
    ]
)

# Behaviour of the cards by role: fields of ``standin.Conduct``.
_CONDUCT: dict[str, dict[str, object]] = {
    # More than a full card has left, and less than the micro model that is evicted.
    "out of memory": {"work_bytes": 100 << 10, "handles_bytes": 0},
}

# Parts that leave the card to their own children.
_ONLY_START_OTHERS = ("warm-up", "exit", "checkpoint", "switch")


def prepare(home: Path) -> None:
    """
    Builds the fake drivers, and points this process's children to them and two cards.
    """
    sys.path.append(str(TESTS))
    from fakes import build_drivers

    drivers = build_drivers(home / "drivers")
    folders = [str(folder) for folder in drivers.iterdir()]
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    state = home / "state"
    state.write_text(_CARDS)
    os.environ |= {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [*folders, inherited])),
        "FAKE_GPU_STATE": str(state),
        # Threads that spin while they wait take the others' time on a busy machine.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def smaller(setup: Setup) -> Setup:
    """
    Returns a setup with so little of everything that it is over in seconds.
    """
    return replace(
        setup,
        models=str(Path(setup.models, "pretended")),  # not to be taken for real ones
        pretends=True,
        batch=2,
        cycles=10,
        rounds=1,
        switches=4,
        turns=1,
        answers=3,
        crossing_bytes=1 << 20,
        full_bytes=64 << 10,
        beside="",
        nobody=None,  # another user could not write the cards' files
    )


def write_models(directory: Path, sizes: Iterable[str]) -> None:
    """
    Writes a micro model in the place of each size, larger ones for larger ones.
    """
    sys.path.append(str(TESTS))
    from micro import build_micro

    for size in sizes:
        width = 32 + 8 * SIZES.index(size)
        build_micro(directory / size, f"this is {size}", d_model=width)


def install(role: str) -> None:
    if role in _ONLY_START_OTHERS:
        return
    sys.path.append(str(TESTS))
    import standin

    from whispercache.devices.cuda import open_driver

    for held in Path(os.environ["FAKE_GPU_STATE"]).parent.glob("state.[0-9]"):
        held.unlink()
    standin.install(**_CONDUCT.get(role, {}))
    driver = open_driver()
    library = cast("ctypes.CDLL", _Library(driver._library))
    driver._library = library


class _Library:
    """
    The fake driver, and the functions that only `gpu.card` calls.

    Copies copy nothing. Allocated memory counts as the context's.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._current = threading.local()
        self._taken: dict[int, tuple[CardMemory, int]] = {}
        self._pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._states: dict[int, int] = {}
        self._parked: dict[str, int] = {}
        for name in ("cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2"):
            setattr(self, name, lambda *_: 0)
        for action, state in (("Lock", _LOCKED), ("Unlock", _RUNNING)):
            setattr(self, f"cuCheckpointProcess{action}", partial(self._enter, state))

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)

    def cuDriverGetVersion(self, version: _Reference) -> int:
        version._obj.value = _CUDA_VERSION
        return 0

    def cuDevicePrimaryCtxRetain(
        self, context: _Reference, device: ctypes.c_int
    ) -> int:
        """
        Creates the context first, as a real driver would.
        """
        self._current.card = _memory(device.value)
        self._current.card.start_context(200 << 20)
        return int(self._library.cuDevicePrimaryCtxRetain(context, device))

    def cuMemAlloc_v2(self, address: _Reference, n_bytes: ctypes.c_size_t) -> int:
        card: CardMemory = self._current.card
        try:
            card.grow_context(n_bytes.value)
        except RuntimeError:
            return _OUT_OF_MEMORY
        address._obj.value = max(self._taken, default=0) + 1
        self._taken[address._obj.value] = (card, n_bytes.value)
        return 0

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        card, n_bytes = self._taken.pop(address.value)
        card.grow_context(-n_bytes)
        return 0

    def cuMemHostAlloc(
        self, address: _Reference, n_bytes: ctypes.c_size_t, _: int
    ) -> int:
        memory = ctypes.create_string_buffer(n_bytes.value)
        address._obj.value = ctypes.addressof(memory)
        self._pinned[ctypes.addressof(memory)] = memory
        return 0

    def cuMemFreeHost(self, address: ctypes.c_void_p) -> int:
        del self._pinned[address.value or 0]
        return 0

    def cuCheckpointProcessGetState(self, pid: ctypes.c_int, state: _Reference) -> int:
        state._obj.value = self._states.get(pid.value, _RUNNING)
        return 0

    def cuCheckpointProcessCheckpoint(self, pid: ctypes.c_int, _: object) -> int:
        with _memory(0)._change() as books:
            self._parked = asdict(books)
            _set(books, dict.fromkeys(self._parked, 0))
        return self._enter(_CHECKPOINTED, pid)

    def cuCheckpointProcessRestore(self, pid: ctypes.c_int, _: object) -> int:
        with _memory(0)._change() as books:
            _set(books, self._parked)
        return self._enter(_LOCKED, pid)

    def _enter(self, state: int, pid: ctypes.c_int, *_: object) -> int:
        self._states[pid.value] = state
        return 0


class _Reference:
    _obj: ctypes.c_uint64


def _memory(ordinal: int) -> CardMemory:
    from standin.card import CardMemory, visible_cards

    return CardMemory(visible_cards()[ordinal])


def _set(books: CardBooks, numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        setattr(books, name, number)
