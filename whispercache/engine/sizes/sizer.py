"""
The bytes that a loader predicts: from the files, corrected by what was measured before.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from whispercache.errors import DeviceUnavailable

from .footprint import estimate, reserved
from .learned import LearnedFootprints

if TYPE_CHECKING:
    from whispercache.devices.memory import MemoryProbe
    from whispercache.engine.files import ModelFiles
    from whispercache.keys import ModelKey

    from .footprint import Footprint, Workload

_log = logging.getLogger("whispercache")

# Stands for a model's name where calls of all models are meant.
_CALLS = "(calls)"

# A model that is loaded again and again takes the same each time.
_estimate = functools.lru_cache(maxsize=256)(estimate)


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
        """
        Returns what *key* takes, corrected by what was measured before.
        """
        # Only other loaders' files have no source.
        assert files.source is not None
        predicted = _estimate(files.source, key.compute_type, key.device, workload)
        device_name = self._name_of(key.device)
        weights_bytes = self.learned.correct(
            key.model, key.compute_type, device_name, predicted.weights_bytes
        )
        # Upwards only: a load into memory that an earlier one left looks too small.
        growth_bytes = max(0, weights_bytes - predicted.weights_bytes)
        workspace_bytes = predicted.workspace_bytes
        if key.device != "cpu":
            # Upwards only, too: few calls do all that was reserved for.
            seen_bytes = self.learned.correct(_CALLS, "", device_name, workspace_bytes)
            workspace_bytes = max(workspace_bytes, seen_bytes)
        corrected = replace(
            predicted,
            weights_bytes=predicted.weights_bytes + growth_bytes,
            workspace_bytes=workspace_bytes,
            loading_bytes=predicted.loading_bytes + growth_bytes,
        )
        return reserved(corrected, key.device)

    def weights_bytes(self, key: ModelKey, files: ModelFiles) -> int:
        """
        Returns the predicted bytes of the weights; 0 if nothing is known of *files*.
        """
        if files.source is None:
            return 0
        return _estimate(files.source, key.compute_type, key.device).weights_bytes

    def remember(self, key: ModelKey, files: ModelFiles, measured_bytes: int) -> None:
        """
        Notes what a load took, for the next footprint.
        """
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
        """
        Notes what calls took, for a card of that name.
        """
        device_name = self._name_of(device)
        self.learned.record(_CALLS, "", device_name, predicted_bytes, measured_bytes)

    def _name_of(self, device: str) -> str:
        """
        Returns the name of the hardware, or its place where no driver of NVIDIA knows
        it.
        """
        try:
            return self.probe.device_name(device)
        except DeviceUnavailable as error:
            _log.debug("%s has no name: %s", device, error)
            return device
