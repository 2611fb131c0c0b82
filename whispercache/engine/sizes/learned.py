"""
The bytes that a loader predicts, corrected by what was measured before.

A prediction misses what a machine adds: another CTranslate2, packed weights, a shared
tokenizer. So measurements are remembered between processes.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from whispercache.devices.host import user_cache
from whispercache.errors import DeviceUnavailable

from .footprint import estimate, reserved

if TYPE_CHECKING:
    from pathlib import Path

    from whispercache.devices.memory import MemoryProbe
    from whispercache.engine.files import ModelFiles
    from whispercache.keys import ModelKey

    from .footprint import Footprint, Workload

_log = logging.getLogger("whispercache")

_KEPT = 5
_ENOUGH = 3
# Outside of this another thread allocated or freed meanwhile.
_PLAUSIBLE = (0.8, 1.5)
_LOCK_TIMEOUT_S = 2.0
# Ratios that differ by less are the same. Source: loads of tiny.en as int8 in five
# processes differed by 0.003 (CTranslate2 4.8.5, CPU).
_SAME = 0.01
# Stands for a model's name where calls of all models are meant.
_CALLS = "(calls)"

# A model that is loaded again and again takes the same each time.
_estimate = functools.lru_cache(maxsize=256)(estimate)


class LearnedFootprints:
    """
    The measured bytes by model, compute type and device, as ratios to predictions.

    Thread-safe, and safe between processes: the file is replaced whole, under a lock
    file. A broken file counts as empty. Where nothing can be written, measurements are
    remembered until the process ends.

    The file is ``footprints.json`` in the user's cache directory, unless *path* is
    given.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._ratios: dict[str, list[float]] | None = None  # guarded by _lock
        self._is_writable = True  # guarded by _lock

    def forked(self) -> None:
        """
        Replaces the lock in a forked child: a thread that is not there may hold it.
        """
        self._lock = threading.Lock()

    def record(
        self,
        model: str,
        compute_type: str,
        device_name: str,
        predicted_bytes: int,
        measured_bytes: int,
    ) -> None:
        """
        Remembers one measurement beside the prediction before any correction. An
        implausible one is refused as noise.

        Blocks: writes a small file, waiting up to 2 s for another process to do so.
        """
        key = _key(model, compute_type, device_name)
        if predicted_bytes <= 0:
            return
        # Ratios, not bytes: predictions change with the version of this package.
        ratio = measured_bytes / predicted_bytes
        if not _PLAUSIBLE[0] <= ratio <= _PLAUSIBLE[1]:
            _log.debug("measurement of %s refused as noise: %.2f", key, ratio)
            return
        with self._lock:
            known = self._loaded_locked().get(key, [])
            # Most loads: the lock file and what it imports are for those that differ.
            if len(known) == _KEPT and all(abs(n - ratio) < _SAME for n in known):
                return
            self._record_locked(key, ratio)

    def correct(
        self, model: str, compute_type: str, device_name: str, predicted_bytes: int
    ) -> int:
        """
        Returns *predicted_bytes*, times the median of three ratios or more.
        """
        with self._lock:
            ratios = self._loaded_locked().get(
                _key(model, compute_type, device_name), []
            )
            if len(ratios) < _ENOUGH:
                return predicted_bytes
            # Imported late: most processes never need it.
            import statistics

            return round(predicted_bytes * statistics.median(ratios))

    def _record_locked(self, key: str, ratio: float) -> None:
        from filelock import FileLock, Timeout

        try:
            if self._is_writable:
                path = self._file
                path.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
                    # Read again under the lock: another process may have written.
                    ratios = _with(_read(path), key, ratio)
                    _replace(path, json.dumps(ratios, indent=1, sort_keys=True))
                self._ratios = ratios
                return
        except (OSError, Timeout, NotImplementedError) as error:
            self._is_writable = False
            _log.warning(
                "measured footprints are kept in memory only: %s; set "
                "XDG_CACHE_HOME to a directory that can be written",
                error,
            )
        self._ratios = _with(self._loaded_locked(), key, ratio)

    def _loaded_locked(self) -> dict[str, list[float]]:
        if self._ratios is None:
            try:
                self._ratios = _read(self._file)
            except OSError:
                self._ratios = {}
        return self._ratios

    @functools.cached_property
    def _file(self) -> Path:
        return self._path or user_cache() / "footprints.json"


def corrected(
    predicted: Footprint,
    learned: LearnedFootprints,
    key: ModelKey,
    device_name: str,
) -> Footprint:
    """
    Returns a prediction for the model of *key*, with what was learned of its weights,
    and of calls on a card, on devices of that name.
    """
    place = (key.model, key.compute_type, device_name)
    weights_bytes = learned.correct(*place, predicted.weights_bytes)
    # Upwards only: a load into memory that an earlier one left looks too small.
    growth_bytes = max(0, weights_bytes - predicted.weights_bytes)
    found = replace(
        predicted,
        weights_bytes=predicted.weights_bytes + growth_bytes,
        loading_bytes=predicted.loading_bytes + growth_bytes,
    )
    if key.device == "cpu":
        return found
    # Upwards only, too: few calls do all that was reserved for.
    predicted_bytes = predicted.workspace_bytes
    seen_bytes = learned.correct(_CALLS, "", device_name, predicted_bytes)
    return replace(found, workspace_bytes=max(predicted_bytes, seen_bytes))


@dataclass(slots=True)
class Sizer:
    """
    Predicts footprints, and learns from measurements, which count for a kind of card.
    """

    probe: MemoryProbe
    learned: LearnedFootprints = field(default_factory=LearnedFootprints)

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        # Only other loaders' files have no source.
        assert files.source is not None
        predicted = _estimate(files.source, key.compute_type, key.device, workload)
        name = self._name_of(key.device)
        return reserved(corrected(predicted, self.learned, key, name), key.device)

    def weights_bytes(self, key: ModelKey, files: ModelFiles) -> int:
        if files.source is None:
            return 0
        return _estimate(files.source, key.compute_type, key.device).weights_bytes

    def host_loading_bytes(self, key: ModelKey, files: ModelFiles) -> int:
        """
        Returns the peak of host memory that is predicted for a load.
        """
        if files.source is None:
            return 0
        found = _estimate(files.source, key.compute_type, key.device)
        return max(
            found.host_loading_bytes, found.loading_bytes * (key.device == "cpu")
        )

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        self.learned.record(
            key.model,
            key.compute_type,
            self._name_of(key.device),
            self.weights_bytes(key, files),
            measured_bytes,
        )

    def remember_work(
        self, device: str, predicted_bytes: int, measured_bytes: int
    ) -> None:
        device_name = self._name_of(device)
        self.learned.record(_CALLS, "", device_name, predicted_bytes, measured_bytes)

    def _name_of(self, device: str) -> str:
        try:
            return self.probe.device_name(device)
        except DeviceUnavailable as error:
            # No driver of NVIDIA knows it, as with ROCm.
            _log.debug("%s has no name: %s", device, error)
            return device


def _key(model: str, compute_type: str, device_name: str) -> str:
    return json.dumps([model, compute_type, device_name])


def _with(
    ratios: dict[str, list[float]], key: str, ratio: float
) -> dict[str, list[float]]:
    # The latest ones: a new driver or library counts after three loads.
    return {**ratios, key: [*ratios.get(key, []), ratio][-_KEPT:]}


def _replace(path: Path, text: str) -> None:
    # Renamed, which is atomic: others read without the lock.
    new = path.with_suffix(".new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, list[float]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        _log.warning("%s is broken and starts anew: %s", path, error)
        return {}
    if not isinstance(found, dict):
        _log.warning("%s is broken and starts anew: not an object", path)
        return {}
    return {
        key: [float(ratio) for ratio in ratios[-_KEPT:]]
        for key, ratios in found.items()
        if isinstance(ratios, list) and all(map(_is_plausible, ratios))
    }


def _is_plausible(ratio: object) -> bool:
    return isinstance(ratio, int | float) and _PLAUSIBLE[0] <= ratio <= _PLAUSIBLE[1]
