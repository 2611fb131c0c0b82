"""
The models that a server has on its list, by the names that clients use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from whispercache.engine.naming import anchored

from .names import is_openais, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from whispercache.engine.naming import ModelSpec

    from .options import ServerOptions

# The field of config.json that names the attention heads which follow the words.
ALIGNMENT_HEADS = "alignment_heads"


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

    An offer's own name comes first. Then a known size in any spelling is the first
    offer of that size, of the compute type asked for if one is. OpenAI's names are the
    *default*, the first on the list if None. With *strict* none of that is done.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        device: str,
        default: str | None = None,
        *,
        strict: bool = False,
    ) -> None:
        self._offers = {
            # What a relative path means is settled now: caches remember no other.
            spec.name: Offer(
                spec.name, (anchored(spec.model), device, spec.compute_type)
            )
            for spec in specs
        }
        self._is_strict = strict
        self.default: Offer = self._offers[default or specs[0].name]
        self._sizes: dict[tuple[str, str], Offer] = {}
        for spec in specs:
            offer = self._offers[spec.name]
            for size in _sizes_of(spec):
                # The first model of the list wins, in its type and where none is named.
                for kind in (_kind_of(spec), ""):
                    self._sizes.setdefault((size, kind), offer)

    def __len__(self) -> int:
        return len(self._offers)

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._offers.values())

    def find(self, name: str) -> Offer | None:
        """
        Returns the model that clients call so, if there is one.
        """
        if name in self._offers or self._is_strict:
            return self._offers.get(name)
        bare, _, kind = name.partition(":")
        size = size_of(bare)
        if size is not None:
            return self._sizes.get((size, kind.strip().lower()))
        return self.default if is_openais(name) else None


def offers_of(options: ServerOptions) -> Offers:
    """
    Returns the models on a server's list, by the names that its clients may use.
    """
    return Offers(
        options.offered,
        options.device,
        options.default,
        strict=options.strict_names,
    )


def _sizes_of(spec: ModelSpec) -> Iterator[str]:
    """
    Yields the size that a model is, and the one that it is called.
    """
    for name in (spec.model, spec.name.partition(":")[0]):
        if size := size_of(name):
            yield size


def _kind_of(spec: ModelSpec) -> str:
    return "" if spec.compute_type == "default" else spec.compute_type
