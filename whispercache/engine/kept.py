"""
Shells: what models leave behind when their weights go, so that they come back faster.

A tokenizer, which takes longer to parse than the weights of a small model take to load;
and, where the loader has it so, the whole object with its threads. Models with the same
tokenizer.json share one tokenizer, in memory or not.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.devices.host import return_free_memory
from whispercache.errors import CorruptModel

if TYPE_CHECKING:
    from collections.abc import Collection

    from faster_whisper import WhisperModel
    from tokenizers import Tokenizer

    from whispercache.keys import ModelKey

__all__ = ["KEPT_SHELLS", "Shell", "Shells"]

KEPT_SHELLS = 8
"""
Most shells that are kept, whatever room there is: each has idle threads. Those with
weights in them are not counted, as room alone bounds them.
"""

_SHELL_BYTES = 128 * 1024
"""
What a shell takes besides its tokenizer. Source: growth of anonymous memory, CPU,
CTranslate2 4.8.5: 0.0 to 0.1 MiB.
"""

_TOKENIZER_BYTES_PER_TOKEN = 285
"""
Source: likewise, tokenizers 0.23: 10.9 MiB for tiny.en, 13.0 to 13.9 for base.
"""


@dataclass(frozen=True, slots=True)
class Shell:
    """
    One model without its weights.

    Attributes:
        files: What it was built from. Weights of other files would be decoded with the
            wrong tokenizer.
        tokenizer: Its tokenizer.
        n_tokens: How many tokens that one knows.
        whisper: All the rest, where it is kept.
        copy_bytes: What a copy of the weights in it takes; 0 without one.
    """

    files: object
    tokenizer: Tokenizer
    n_tokens: int
    whisper: WhisperModel | None
    copy_bytes: int = 0


class Shells:
    """
    The shells of one loader, the least recently left first to go. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # All that follows is guarded by _lock.
        self._kept: dict[ModelKey, Shell] = {}  # in the order in which they were left
        self._tokenizers: weakref.WeakValueDictionary[bytes, Tokenizer] = (
            weakref.WeakValueDictionary()
        )

    def tokenizer(self, path: str) -> Tokenizer:
        """
        The tokenizer of a tokenizer.json, parsed unless an equal one is in use or kept.

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
        except Exception as error:  # tokenizers raises nothing narrower
            raise CorruptModel(path, str(error)) from error
        return_free_memory()  # of the parser; the weights come on top of it
        with self._lock:  # another device's thread may have been faster
            return self._tokenizers.setdefault(digest, parsed)

    def keep(self, key: ModelKey, shell: Shell) -> None:
        """
        Keep what a model leaves behind.
        """
        with self._lock:
            gone = [self._kept.pop(key, None)]  # or this one would go in its turn
            self._kept[key] = shell
            plain = [key for key, each in self._kept.items() if not each.copy_bytes]
            if len(plain) > KEPT_SHELLS:
                gone.append(self._kept.pop(plain[0]))
        del gone  # their threads end here, without the lock

    def take(self, key: ModelKey) -> Shell | None:
        """
        What the model of *key* left behind. It is not kept any more.
        """
        with self._lock:
            return self._kept.pop(key, None)

    @property
    def n_bytes(self) -> int:
        """
        Host memory that they take; a tokenizer that models in memory share counts, too.
        """
        with self._lock:
            return _sum_bytes(self._kept.values())

    def copies(self) -> dict[ModelKey, int]:
        """
        The bytes of weights that are kept, by model.
        """
        with self._lock:
            kept = self._kept.items()
            return {key: each.copy_bytes for key, each in kept if each.copy_bytes}

    def shrink(self, most_bytes: int, but: Collection[ModelKey] = ()) -> int:
        """
        Let shells go until the others, *but* those of some models, take no more than
        *most_bytes*; how many went.
        """
        gone: list[Shell] = []
        with self._lock:
            left = {key: shell for key, shell in self._kept.items() if key not in but}
            while left and _sum_bytes(left.values()) > most_bytes:
                oldest = next(iter(left))
                gone.append(self._kept.pop(oldest))
                del left[oldest]
        # Their threads end as this returns, without the lock.
        return len(gone)

    def all(self) -> list[Shell]:
        """
        Those that are kept now.

        Without the lock, which in a forked child may be held by a thread that is gone.
        """
        return list(self._kept.values())


def _sum_bytes(shells: Collection[Shell]) -> int:
    tokens = {id(each.tokenizer): each.n_tokens for each in shells}
    of_tokenizers = _TOKENIZER_BYTES_PER_TOKEN * sum(tokens.values())
    of_weights = sum(each.copy_bytes for each in shells)
    return of_tokenizers + of_weights + _SHELL_BYTES * len(shells)
