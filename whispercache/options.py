"""
Options: the parameters of a cache and of its requests, checked and parsed once.

Everything here takes values as users write them and returns what the core computes
with. Nonsense is a TypeError or ValueError that names its parameter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, cast, get_args

from .keys import canonical_device, frozen_compute_type, single_index
from .units import Limit, parse_bytes, parse_duration, parse_limit, parse_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .core.agenda import Rules
    from .core.resolver import Request
    from .core.threads import Clock
    from .devices.memory import MemoryProbe
    from .engine.api import Engine
    from .planning.policies import Policy
    from .planning.priority import PriorityName
    from .units import DurationValue, LimitValue

# Seconds for which hits may pass a request that waits for memory.
PATIENCE_S = 5.0

# Environment variable that turns variants off, for programs whose code one cannot
# change.
VARIANTS_VARIABLE = "WHISPERCACHE_VARIANTS"

# Words for no.
OFF = ("off", "0", "no", "none", "false")

# Most bytes that variants take on disk, unless a limit is given: ten of large-v3 in
# int8.
DEFAULT_VARIANTS_BYTES = 16 * 1024**3

PolicyName: TypeAlias = Literal["lru", "gap"]
Pressure: TypeAlias = Literal["load", "watch"]
Tier: TypeAlias = Literal["device", "page"]

# The higher the sooner; "interactive" is 0, "batch" is -1.
Priority: TypeAlias = "PriorityName | float"

# One for all devices, or one for each kind of device.
ComputeType: TypeAlias = "str | Mapping[str, str]"
# One card, or a list of it, as WhisperModel takes it.
DeviceIndex: TypeAlias = "int | Sequence[int]"

# The parameters of WhisperModel after its device, by position.
# Source: faster_whisper/transcribe.py, 1.2.1; a test compares the two.
AFTER_DEVICE = (
    *("device_index", "compute_type", "cpu_threads", "num_workers", "download_root"),
    *("local_files_only", "files", "revision", "use_auth_token"),
)

ModelName: TypeAlias = "str | os.PathLike[str]"
# A name or path; or with its own device, and perhaps its own compute type.
ModelRequest: TypeAlias = (
    "ModelName | tuple[ModelName] | tuple[ModelName, str] | tuple[ModelName, str, str]"
)


class Unchanged(Enum):
    """
    The value of a parameter that was not given. None is a value of its own there.
    """

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return self.name


UNCHANGED = Unchanged.UNCHANGED


class CacheOptions(TypedDict, total=False):
    """
    The parameters of a `ModelCache`.
    """

    vram: LimitValue | Mapping[str, LimitValue]
    ram: LimitValue
    max_models: int | None
    keep_alive: DurationValue
    policy: PolicyName | Policy
    patience_s: DurationValue
    priority: Priority
    parallel: int | None
    max_waiting: int | None
    fallback: Sequence[str]
    pressure: Pressure
    coordinate: bool
    coordinate_dir: str | os.PathLike[str] | None
    park: bool | LimitValue
    variants: bool | LimitValue
    loader: Engine | None
    probe: MemoryProbe | None
    clock: Clock | None


# Parameters of a cache ----------------------------------------------------------------


@dataclass(slots=True)
class Limits:
    """
    The limits of a cache as they were last given, for a change of only one of them.
    """

    vram: LimitValue | Mapping[str, LimitValue]
    ram: LimitValue


def limits_by_device(
    vram: LimitValue | Mapping[str, LimitValue], ram: LimitValue
) -> Callable[[str], Limit]:
    """
    Returns a function from a device to its limit.
    """
    # Parsed here, once: the function is called under the core's lock.
    host = parse_limit(ram, "ram")
    # A number or text is for every card.
    if not isinstance(vram, Mapping):
        card = parse_limit(vram, "vram")
        return lambda device: host if device == "cpu" else card
    # A card that is not in the mapping has no limit of its own.
    cards = {
        parse_card(name, "vram"): parse_limit(value, f"vram[{name!r}]")
        for name, value in vram.items()
    }
    return lambda device: host if device == "cpu" else cards.get(device, Limit())


def parse_card(device: str, name: str) -> str:
    """
    Returns the canonical name of one card: another name would limit nothing.
    """
    try:
        card = canonical_device(device)
    except (TypeError, ValueError):
        card = ""
    if not card.startswith("cuda:"):
        raise ValueError(f"{name} is for cards such as 'cuda:0', not {device!r}")
    return card


def parse_count(value: int | None, name: str) -> int | None:
    """
    Returns a number of models or requests, 1 or more; None for no limit.
    """
    if value is None:
        return None
    # True counts as 1 in Python, but is never meant as one.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number or None, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value


def parse_policy(policy: PolicyName | Policy) -> Policy:
    """
    Returns the function that scores idle models for eviction.
    """
    # A program that only imports the package needs no planner.
    from .planning.policies import POLICIES

    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, or a function")
    return POLICIES[policy]


def parse_rules(
    policy: PolicyName | Policy,
    keep_alive: DurationValue,
    patience_s: DurationValue,
    max_waiting: int | None,
    parallel: int | None,
) -> Rules:
    """
    Returns the parameters of the decisions.
    """
    # Once there is a cache; see `parse_policy`.
    from .core.agenda import Rules

    return Rules(
        parse_policy(policy),
        parse_duration(keep_alive, "keep_alive"),
        parse_seconds(patience_s, "patience_s"),
        parse_count(max_waiting, "max_waiting"),
        parse_count(parallel, "parallel"),
    )


def parse_pressure(pressure: Pressure) -> bool:
    """
    Returns True if free memory is to be watched between loads, too.
    """
    if pressure not in get_args(Pressure):
        raise ValueError(f"pressure must be one of {', '.join(get_args(Pressure))}")
    return pressure == "watch"


def parse_switch(value: bool, name: str) -> bool:  # noqa: FBT001 - checked
    """
    Returns True for on. Text is refused: "off" would be on.
    """
    if value not in (True, False, None):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def parse_park(value: bool | LimitValue) -> Limit | None:  # noqa: FBT001 - checked
    """
    Returns the limit of host copies; None for no copies at all.
    """
    # Not `not value`: 0 is nonsense, as it is for every limit, and is refused as such.
    if value is False or value is None:
        return None
    return Limit() if value is True else parse_limit(value, "park")


def parse_variants(value: bool | LimitValue) -> int | None:  # noqa: FBT001 - checked
    """
    Returns the most bytes that variants may take on disk; None for no variants.

    The environment variable `VARIANTS_VARIABLE` can turn them off, never on.
    """
    variable = os.environ.get(VARIANTS_VARIABLE, "").lower()
    if value is False or value is None or variable in OFF:
        return None
    return variants_bytes(value, "variants")


def variants_bytes(value: bool | LimitValue, name: str) -> int:  # noqa: FBT001 - checked
    """
    Returns the bytes that variants may take on disk where they are not turned off.
    """
    if value is True or (isinstance(value, str) and value.strip().lower() == "auto"):
        return DEFAULT_VARIANTS_BYTES
    # A share of a disk would change with all that is written there.
    return parse_bytes(value, name)


# Parameters of a request --------------------------------------------------------------


def parse_timeout(value: DurationValue | None) -> float | None:
    """
    Returns seconds to wait at the most; None for as long as it takes.

    Raises:
        TypeError, ValueError: As for `parse_duration`, or the text is negative.
    """
    if value is None:
        return None
    timeout_s = parse_duration(value, "timeout_s")
    if isinstance(value, str):
        if timeout_s == math.inf:
            raise ValueError(
                f"timeout_s must be a duration, not {value!r}; None waits for ever"
            )
    elif value < 0:
        # What is left of a deadline that has passed: no more waiting, not for ever.
        return 0.0
    # For ever is the same word everywhere, so that a deadlock is looked for.
    return None if timeout_s == math.inf else timeout_s


def parse_tier(tier: Tier) -> Tier:
    """
    Returns *tier*, if there is such a tier.
    """
    if tier not in get_args(Tier):
        known = ", ".join(get_args(Tier))
        raise ValueError(f"tier must be one of {known}, not {tier!r}")
    return tier


def as_request(
    model: str | os.PathLike[str],
    device: str,
    compute_type: ComputeType,
    load_options: dict[str, object],
) -> Request:
    """
    Returns the parameters of a request as one value that can be looked up.
    """
    # Every hit passes here: a plain string, the usual case, is not looked at twice.
    if type(compute_type) is not str:
        compute_type = cast("str", frozen_compute_type(compute_type))
    if not load_options:
        return (model, device, compute_type)
    if "device_index" in load_options:
        # A list cannot be looked up.
        index = single_index(load_options["device_index"])
        load_options = {**load_options, "device_index": index}
    # Sorted, so that the order in which they were given does not matter.
    return (model, device, compute_type, *sorted(load_options.items()))


def by_position(
    more: Sequence[object],
    compute_type: ComputeType,
    load_options: dict[str, object],
) -> tuple[ComputeType, dict[str, object]]:
    """
    Returns compute type and load options of a call whose positional arguments after the
    device are *more*: the compute type, or, as WhisperModel has it, the index of the
    device, the compute type and the rest.

    Raises:
        TypeError: There are too many, or one is also given by its name.
    """
    if not more:
        return compute_type, load_options
    is_index = not hasattr(more[0], "items") and not isinstance(more[0], str)
    names = AFTER_DEVICE if is_index else ("compute_type",)
    if len(more) > len(names):
        raise TypeError(
            f"{len(more)} positional arguments follow the device; after a "
            "compute type, give the others by name"
        )
    given = dict(zip(names, more, strict=False))
    named = {*load_options, *(("compute_type",) if compute_type != "default" else ())}
    if twice := sorted(named & set(given)):
        raise TypeError(f"{twice[0]} is given by position and by name")
    kind = cast("ComputeType", given.pop("compute_type", compute_type))
    return kind, {**load_options, **given}


def as_requests(
    models: Sequence[ModelRequest],
    device: str,
    compute_type: str,
    load_options: dict[str, object],
) -> list[Request]:
    """
    Returns a request for each of several models, given as to `ModelCache.lease_many`.
    """
    # A text is a sequence, too, of letters.
    if isinstance(models, (str, os.PathLike)):
        raise TypeError(f"models must be a list of models, not {models!r}")
    requests = []
    for model in models:
        named: tuple[ModelName, ...] = (
            tuple(model) if isinstance(model, (tuple, list)) else (model,)
        )
        defaults = (device, compute_type)
        if not 1 <= len(named) <= len(defaults) + 1:
            raise ValueError(f"{model!r} must be (model, device, compute_type)")
        # Each tuple is completed by the defaults: first the device, then the type.
        own = cast("tuple[str, ...]", named[1:])
        where, kind = own + defaults[len(own) :]
        requests.append(as_request(named[0], where, kind, load_options))
    if not requests:
        raise ValueError("lease_many takes at least one model")
    return requests
