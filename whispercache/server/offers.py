"""
The models that a server has on its list, by the names that clients use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from whispercache.engine.files import claims_of
from whispercache.engine.naming import anchored, short_name
from whispercache.errors import WhisperCacheError
from whispercache.keys import ALIASES, MODELS, OTHER_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from whispercache import ModelCache, ModelKey
    from whispercache.engine.calls.languages import Knowledge
    from whispercache.engine.naming import ModelSpec

# The field of config.json that names the attention heads which follow the words.
ALIGNMENT_HEADS = "alignment_heads"

# OpenAI's name of its Whisper, for which many clients ask.
OPENAI_NAME = "whisper-1"

# All names of each known size.
_SIZES = {**{name: name for name in MODELS}, **ALIASES, **OTHER_NAMES}


class Offer:
    """
    One model on the list, and the device that it runs on.
    """

    def __init__(self, spec: ModelSpec, device: str, cache: ModelCache) -> None:
        self.name: str = spec.name
        # What a relative path means is settled now: the cache remembers no other.
        model = anchored(spec.model)
        self.place: tuple[str, str, str] = (model, device, spec.compute_type)
        self._cache = cache

    def key(self) -> ModelKey | None:
        """
        Returns the model's key, as far as it is known without a download.
        """
        return self._cache.known_key(*self.place)

    def knowledge(self) -> Knowledge | None:
        """
        Returns the languages that the model has tokens for; None if only a download
        would tell. Blocks for some system calls, but not while the model is in memory.
        """
        return self._cache.knowledge(*self.place)

    def may_tell_words(self) -> bool:
        """
        True unless its files name no attention heads for the times of words. Blocks.
        """
        key = self.key()
        if key is None:
            return True
        try:
            files = self._cache.loader.locate(
                key.model, dict(key.options), download=False
            )
            return files is None or claims_of(files).tells_words
        except WhisperCacheError:  # which the load will raise as well
            return True

    def fetch(self) -> None:
        """
        Downloads the model's files, if they are not on this machine. Blocks.
        """
        self._cache.download(*self.place)


class Offers:
    """
    All models on the list. Names are looked up, never interpreted: only what is on the
    list is opened, whatever a client sends.
    """

    def __init__(
        self, specs: Sequence[ModelSpec], device: str, cache: ModelCache
    ) -> None:
        self._offers = {spec.name: Offer(spec, device, cache) for spec in specs}
        self._aliases: dict[str, Offer] = {}
        for spec in specs:
            for alias in _other_names(spec):
                # The first model of the list wins, and real names win over all.
                self._aliases.setdefault(alias, self._offers[spec.name])
        # Most clients ask for it by default.
        self._aliases.setdefault(OPENAI_NAME, self._offers[specs[0].name])

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._offers.values())

    def find(self, name: str) -> Offer | None:
        """
        Returns the model of that name, or alias of a name.
        """
        return self._offers.get(name) or self._aliases.get(name)

    def name_of(self, key: ModelKey) -> str:
        """
        Returns the clients' name of a model in memory.
        """
        for offer in self:
            found = offer.key()
            # It may have been on another card before.
            # By the key, so that two names of one model find the first.
            if found is not None and replace(found, device=key.device) == key:
                return offer.name
        return short_name(key)


def _other_names(spec: ModelSpec) -> Iterator[str]:
    """
    Yields other names of a known size that is served under one of its own.
    """
    # A name of its own that looks like a size is no reason to guess.
    size, _, kind = spec.name.partition(":")
    canonical = _SIZES.get(size)
    if canonical is None or _SIZES.get(spec.model) != canonical:
        return
    suffix = f":{kind}" if kind else ""
    yield from (other + suffix for other, name in _SIZES.items() if name == canonical)
