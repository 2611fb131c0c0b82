"""
The memory that this process holds of a card, and whether the card got back what it
freed.

The free memory of a card is shared: other programs take and free some while a model is
unloaded. CUDA's memory pool, from which CTranslate2 allocates, is this process's own
and exact to the byte. So the pool decides where there is one, and the gauge only where
there is none.

Functions that ask the card raise `CudaError` where an error has left it unusable.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cublas import cublas_version
from .cuda import CudaError, open_driver
from .faults import Fault, classify
from .memory import TOTAL_ONLY

if TYPE_CHECKING:
    from .cuda import Driver, Pool
    from .memory import MemoryProbe

_log = logging.getLogger("whispercache")

# Share of the expected bytes that confirms a return: other programs blur the gauge.
# Source: Ollama's rule.
ENOUGH_RETURNED = 0.75

# Most seconds to wait, without a pool, for the gauge to show what was freed.
# Source: typically 0.5 to 1.5 s (likewise).
RETURN_WAIT_S = 2.0

_LOOK_S = 0.02

# A floor above this is taken for another program's memory.
# Source: 200 to 312 MiB were seen (SYSTRAN/faster-whisper#680, #992).
MOST_FLOOR_BYTES = 1024**3

# The newest generation of cards that CTranslate2's wheels hold code for (sm_86 runs on
# all 8.x from 8.6 on); for later ones CUDA compiles it from PTX.
# Source: CTranslate2 4.8.5's wheel; NVIDIA, CUDA programming guide, binary
# compatibility.
_COMPILED_MAJOR = 8


# The generation of cards that cuBLAS knows from that version on.
# Source: NVIDIA, CUDA 12.8 release notes; with an older one int8 fails there, and
# float16 works (OpenNMT/CTranslate2#1865; McCloudS/subgen#332).
_BLACKWELL_MAJOR = 10
_CUBLAS_OF_BLACKWELL = (12, 8)


@dataclass(frozen=True, slots=True)
class Holdings:
    """
    The memory of a card that is held at one moment.
    """

    pool: Pool | None  # this process's there; None where there is none, or not yet
    used_bytes: int | None  # by all programs together, by the gauge; None if unknown

    def growth_since(self, before: Holdings) -> int | None:
        """
        Returns how much more is held than *before*; None if unknown.

        The pool decides. The gauge is asked where the pool did not grow, since
        CTranslate2 may allocate from elsewhere.

        Source: ``CT2_CUDA_ALLOCATOR=cub_caching`` does, and CTranslate2's default where
        a card has no pools.
        """
        if self.pool is not None:
            start_bytes = 0 if before.pool is None else before.pool.used_bytes
            grown_bytes = self.pool.used_bytes - start_bytes
            if grown_bytes > 0:
                return grown_bytes
        if self.used_bytes is None or before.used_bytes is None:
            return None
        return self.used_bytes - before.used_bytes


@dataclass(frozen=True, slots=True)
class Return:
    """
    The part of freed memory that the card has again, and the part that it lacks.
    """

    returned_bytes: int | None  # the fall that was seen; None where nothing can be seen
    unreturned_bytes: int  # to be counted as still held
    used_bytes: int | None = None  # by all programs afterwards; None if unknown


def holdings(device: str, probe: MemoryProbe) -> Holdings:
    """
    Returns what is held of *device* now.
    """
    return Holdings(_pool(device), _used_bytes(device, probe))


def synchronize(device: str) -> None:
    """
    Waits for all of this process's work on *device*. Blocks until it is done.
    """
    if (found := _find(device)) is not None:
        driver, ordinal = found
        driver.synchronize(ordinal)


def returned(
    device: str,
    probe: MemoryProbe,
    before: Holdings,
    expected_bytes: int,
    *,
    is_quiet: bool = False,
) -> Return:
    """
    Gives freed memory back to the card, and checks how much the card has again.

    Waits for the card's work, trims the pool, and reads again. Memory that the pool no
    longer holds is free, whatever the gauge shows meanwhile.

    Args:
        device: Where a model has just been unloaded.
        probe: The gauge.
        before: What was held while the model was loaded.
        expected_bytes: What it is known to have taken.
        is_quiet: Whether this process does nothing else on the device. Then all that
            the pool still has in use was left behind; else it may be others' work.

    Blocks: for the card's work; without a pool up to `RETURN_WAIT_S`.
    """
    settle(device)
    after = holdings(device, probe)
    enough_bytes = ENOUGH_RETURNED * expected_bytes
    # A model that CTranslate2 allocated elsewhere does not show in the pool.
    was_pooled = before.pool is not None and before.pool.used_bytes >= enough_bytes
    if before.pool is not None and after.pool is not None and was_pooled:
        fallen_bytes = before.pool.reserved_bytes - after.pool.reserved_bytes
        missing_bytes = max(0, expected_bytes - fallen_bytes)
        left_bytes = missing_bytes
        # Beside other work, only memory that the pool holds for nothing is surely ours.
        if not is_quiet:
            left_bytes = min(missing_bytes, after.pool.idle_bytes)
        # The pool holds memory in large pieces, so a small rest proves nothing.
        if fallen_bytes >= enough_bytes:
            left_bytes = 0
        return Return(fallen_bytes, left_bytes, after.used_bytes)
    if before.used_bytes is None or after.used_bytes is None:
        # Without any reading, the engine's word that it unloaded has to do.
        return Return(None, 0)
    most_bytes = before.used_bytes - enough_bytes
    used_bytes = _lowest_bytes(device, probe, after.used_bytes, most_bytes)
    fallen_bytes = before.used_bytes - used_bytes
    missing_bytes = expected_bytes - max(0, fallen_bytes)
    if fallen_bytes >= enough_bytes:
        missing_bytes = 0
    return Return(fallen_bytes, missing_bytes, used_bytes)


def _lowest_bytes(
    device: str, probe: MemoryProbe, used_bytes: int, most_bytes: float
) -> int:
    """
    Reads the used bytes of a device until they are *most_bytes* or fewer, and returns
    the lowest reading: a later rise is another program's.

    Blocks: up to `RETURN_WAIT_S`.
    """
    give_up_s = time.monotonic() + RETURN_WAIT_S
    while used_bytes > most_bytes and time.monotonic() <= give_up_s:
        time.sleep(_LOOK_S)
        seen_bytes = _used_bytes(device, probe)
        used_bytes = used_bytes if seen_bytes is None else min(used_bytes, seen_bytes)
    return used_bytes


def floor_bytes(device: str, probe: MemoryProbe, before: Holdings) -> int | None:
    """
    Returns the bytes that the first work on *device* holds for the process's life.

    None if they cannot be told from what other programs did.
    """
    settle(device)
    after = holdings(device, probe)
    if before.used_bytes is None or after.used_bytes is None:
        return None
    pools = (before.pool, after.pool)
    held_before, held_after = (0 if p is None else p.reserved_bytes for p in pools)
    # Growth of the pool belongs to models, and ends with them.
    grown_bytes = after.used_bytes - before.used_bytes - (held_after - held_before)
    return grown_bytes if 0 < grown_bytes <= MOST_FLOOR_BYTES else None


def warm_up_reason(device: str) -> str:
    """
    Returns what the first work on *device* starts up, and how long that may take.
    """
    return compile_reason(device) or "CUDA and cuBLAS start, once a process"


def is_integrated(device: str) -> bool:
    """
    Tests if *device* has no memory of its own but shares the host's.
    """
    found = _find(device)
    return found is not None and found[0].is_integrated(found[1])


def compile_reason(device: str) -> str:
    """
    Returns why kernels have to be compiled for *device*, and where they are kept.

    Empty if CTranslate2 brings some that the card can run.
    """
    generation, card = _generation(device)
    # A card runs the code of its own generation; that of a later one is compiled.
    if generation <= _COMPILED_MAJOR:
        return ""
    kept = f"CUDA keeps the result in {_kernel_cache()}"
    if os.environ.get("CUDA_CACHE_DISABLE", "0") not in ("", "0"):
        kept = "CUDA_CACHE_DISABLE is set, so each process does it anew"
    return (
        f"CTranslate2 has no code for {card}, so "
        f"CUDA compiles it, which takes up to half a minute; {kept}"
    )


def cublas_reason(device: str) -> str:
    """
    Returns why cuBLAS does not know *device*; empty if it does, or if unknown.

    Loads cuBLAS if the card is of Blackwell's generation or later.
    """
    generation, card = _generation(device)
    if generation < _BLACKWELL_MAJOR:
        return ""
    # Only for these cards is it worth to load the library.
    version = cublas_version()
    if version is None or version >= _CUBLAS_OF_BLACKWELL:
        return ""
    here, needed = (".".join(map(str, v)) for v in (version, _CUBLAS_OF_BLACKWELL))
    return f"cuBLAS {here} is older than {card}, which needs {needed} or later"


def _generation(device: str) -> tuple[int, str]:
    """
    Returns the generation of a card, and its name with it; 0 without a driver.
    """
    found = _find(device)
    if found is None:
        return 0, ""
    driver, ordinal = found
    major, minor = driver.compute_capability(ordinal)
    return major, f"{driver.name(ordinal)} (sm_{major}{minor})"


def _kernel_cache() -> str:
    # Source: NVIDIA, CUDA programming guide, environment variables.
    if path := os.environ.get("CUDA_CACHE_PATH"):
        return path
    if sys.platform == "win32":
        return r"%APPDATA%\NVIDIA\ComputeCache"
    return str(Path("~/.nv/ComputeCache").expanduser())


def forget_peak(device: str) -> None:
    """
    Counts the peak of this process's pool on *device* from now on.
    """
    if (found := _find(device)) is None:
        return
    driver, ordinal = found
    try:
        driver.forget_peak(ordinal)
    except CudaError as error:
        _log.debug("the peak of %s goes on: %s", device, error)


def settle(device: str) -> None:
    """
    Makes the pool of *device* give back all that it does not use.

    A refusal is logged, and the memory stays in the pool.

    Blocks: until the card's work is done.
    """
    if (found := _find(device)) is None:
        return
    driver, ordinal = found
    try:
        # On its own, too, since a trim waits only where there is a pool.
        driver.synchronize(ordinal)
        driver.trim(ordinal)
    except CudaError as error:
        # After such an error each further call fails: the device is lost.
        if classify(error) is Fault.STICKY:
            raise
        _log.warning("idle memory of %s was not trimmed: %s", device, error)


def _pool(device: str) -> Pool | None:
    if (found := _find(device)) is None:
        return None
    driver, ordinal = found
    try:
        return driver.pool(ordinal)
    except CudaError as error:
        if classify(error) is Fault.STICKY:
            raise
        _log.debug("the memory pool of %s is unknown: %s", device, error)
        return None


def _used_bytes(device: str, probe: MemoryProbe) -> int | None:
    try:
        reading = probe.read(device)
    # A gauge that fails for a moment stops nothing, whatever it raises.
    except Exception as error:
        _log.debug("memory of %s is unknown: %s", device, error)
        return None
    # Such a reading is no measurement.
    if reading.source == TOTAL_ONLY:
        return None
    return reading.total_bytes - reading.free_bytes


def _find(device: str) -> tuple[Driver, int] | None:
    try:
        driver = open_driver()
    except CudaError as error:
        # An AMD card, under ROCm, is called "cuda" by CTranslate2 as well.
        _log.debug("%s is not asked about its memory: %s", device, error)
        return None
    # Without a number it is the first card.
    return driver, int(device.partition(":")[2] or 0)
