"""
The models that a server has on its list, by the names that clients use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from whispercache.engine.naming import anchored
from whispercache.keys import ALIASES, MODELS, OTHER_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from whispercache.engine.naming import ModelSpec

# The field of config.json that names the attention heads which follow the words.
ALIGNMENT_HEADS = "alignment_heads"

# OpenAI's name of its Whisper, for which many clients ask.
OPENAI_NAME = "whisper-1"

# All names of each known size.
_SIZES = {**{name: name for name in MODELS}, **ALIASES, **OTHER_NAMES}


@dataclass(frozen=True, slots=True)
class Offer:
    """
    One model on the list: its name for clients, and what a cache is asked for.
    """

    name: str
    # The model, the device and the compute type.
    place: tuple[str, str, str]


class Offers:
    """
    All models on the list. Names are looked up, never interpreted: only what is on the
    list is opened, whatever a client sends.
    """

    def __init__(self, specs: Sequence[ModelSpec], device: str) -> None:
        self._offers = {
            # What a relative path means is settled now: caches remember no other.
            spec.name: Offer(
                spec.name, (anchored(spec.model), device, spec.compute_type)
            )
            for spec in specs
        }
        self._aliases: dict[str, Offer] = {}
        for spec in specs:
            for alias in _other_names(spec):
                # The first model of the list wins, and real names win over all.
                self._aliases.setdefault(alias, self._offers[spec.name])
        # Most clients ask for it by default.
        self._aliases.setdefault(OPENAI_NAME, self._offers[specs[0].name])

    def __len__(self) -> int:
        return len(self._offers)

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._offers.values())

    def find(self, name: str) -> Offer | None:
        """
        Returns the model of that name, or alias of a name.
        """
        return self._offers.get(name) or self._aliases.get(name)


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
