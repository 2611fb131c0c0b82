"""
The unload of a model's weights, and the parts that stay in host memory then.

Those are the tokenizer, which takes longer to parse than the weights of a small model
take to load; and, where the loader says so, the whole object with its threads. Models
with equal tokenizer.json files share one tokenizer, loaded or not.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.devices import heap
from whispercache.devices.host import return_free_memory
from whispercache.errors import CorruptModel

if TYPE_CHECKING:
    from collections.abc import Collection

    from ctranslate2.models import Whisper
    from faster_whisper import WhisperModel
    from tokenizers import Tokenizer

    from whispercache.keys import ModelKey

_log = logging.getLogger("whispercache")

# Most models that are kept, whatever room there is: each has idle threads. Those with a
# host copy are not counted, as room alone bounds them.
MOST_KEPT = 8
# Size of a kept model besides its tokenizer. Source: growth of anonymous memory, CPU,
# CTranslate2 4.8.5: 0.0 to 0.1 MiB.
_OBJECT_BYTES = 128 * 1024
# Source: likewise, tokenizers 0.23: 10.9 MiB for tiny.en, 13.0 to 13.9 for base.
_TOKENIZER_BYTES_PER_TOKEN = 285
# Seconds for which a busy model is asked again to unload before that counts as refused.
# Source: right after a finished call 72 of 100 unloads did nothing, and a retry loop
# ended within 4.2 ms (CTranslate2 4.8.5, CPU); the rest allows for a card's slowest
# kernel.
UNLOAD_TRIES_S = 2.0


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


@dataclass(frozen=True, slots=True)
class KeptModel:
    """
    One model without its weights.

    Attributes:
        files: The files that it was built from: weights of others would be decoded with
            the wrong tokenizer.
        tokenizer: Its tokenizer.
        n_tokens: Number of tokens that the tokenizer knows.
        whisper: The whole object, where it is kept.
        copy_bytes: Size of the host copy of the weights in it; 0 without one.
    """

    files: object
    tokenizer: Tokenizer
    n_tokens: int
    whisper: WhisperModel | None
    copy_bytes: int = 0


class KeptModels:
    """
    The kept models of one loader, the least recently unloaded first. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # All that follows is guarded by _lock.
        # In the order of their unloads.
        self._kept: dict[ModelKey, KeptModel] = {}
        self._tokenizers: weakref.WeakValueDictionary[bytes, Tokenizer] = (
            weakref.WeakValueDictionary()
        )

    def tokenizer(self, path: str) -> Tokenizer:
        """
        Returns the tokenizer of a tokenizer.json, parsed unless an equal one is in use
        or kept.

        Blocks: parsing holds the GIL for a tenth of a second.

        Raises:
            CorruptModel: the file is none.

        Source: one shared by six threads, 346,000 operations, no error (tokenizers
        0.22); tests/engine/test_kept.py has them answer as each alone does.
        """
        from tokenizers import Tokenizer

        content = Path(path).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        with self._lock:
            found = self._tokenizers.get(digest)
        if found is not None:
            return found
        try:
            parsed = Tokenizer.from_buffer(content)
        # tokenizers raises nothing narrower.
        except Exception as error:
            raise CorruptModel(path, str(error)) from error
        # The parser's memory: the weights come on top of it, not into it, but where all
        # threads share a heap.
        if not heap.is_shared():
            return_free_memory()
        with self._lock:
            # Another device's thread may have parsed an equal one meanwhile.
            return self._tokenizers.setdefault(digest, parsed)

    def keep(self, key: ModelKey, model: KeptModel) -> None:
        """
        Keeps the rest of an unloaded model, and drops the oldest if there are too many.
        """
        with self._lock:
            # Popped first: setting an item anew would leave it in its old place.
            dropped = [self._kept.pop(key, None)]
            self._kept[key] = model
            plain = [key for key, each in self._kept.items() if not each.copy_bytes]
            if len(plain) > MOST_KEPT:
                dropped.append(self._kept.pop(plain[0]))
        # Destructors wait for the models' threads, so they run without the lock.
        del dropped

    def take(self, key: ModelKey) -> KeptModel | None:
        """
        Returns the kept model of *key*, if there is one, and keeps it no more.
        """
        with self._lock:
            return self._kept.pop(key, None)

    @property
    def n_bytes(self) -> int:
        """
        Host memory that kept models take, tokenizers shared with loaded ones included.
        """
        with self._lock:
            return _sum_bytes(self._kept.values())

    def copies(self) -> dict[ModelKey, int]:
        """
        Returns the bytes of host copies, by model.
        """
        with self._lock:
            kept = self._kept.items()
            return {key: each.copy_bytes for key, each in kept if each.copy_bytes}

    def shrink(self, most_bytes: int, but: Collection[ModelKey] = ()) -> int:
        """
        Drops models until all *but* some take *most_bytes* at most; returns how many.
        """
        dropped: list[KeptModel] = []
        with self._lock:
            left = {key: each for key, each in self._kept.items() if key not in but}
            while left and _sum_bytes(left.values()) > most_bytes:
                oldest = next(iter(left))
                dropped.append(self._kept.pop(oldest))
                del left[oldest]
        # Their destructors run as this returns, without the lock.
        return len(dropped)

    def all(self) -> list[KeptModel]:
        """
        Returns those that are kept now.

        Without the lock: in a forked child a thread that is not there may hold it.
        """
        return list(self._kept.values())


def _sum_bytes(kept: Collection[KeptModel]) -> int:
    # A tokenizer that several share counts once.
    tokens = {id(each.tokenizer): each.n_tokens for each in kept}
    of_tokenizers = _TOKENIZER_BYTES_PER_TOKEN * sum(tokens.values())
    of_copies = sum(each.copy_bytes for each in kept)
    return of_tokenizers + of_copies + _OBJECT_BYTES * len(kept)
