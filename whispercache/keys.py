"""
Keys: the names of models, devices and types, and the `ModelKey` of each model.

``"large"``, ``"large-v3"`` and ``"Systran/faster-whisper-large-v3"`` are one model,
``"cuda"`` is the best card, ``"int8"`` what the device really computes in, and a path
is its real path. Nothing here needs a model, a driver or CTranslate2.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType
from typing import TYPE_CHECKING

from .errors import UnsupportedComputeType

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

OptionValue = str | int | float | bool | None

# Canonical names of the known models, and their repositories on the model hub.
# Source: faster_whisper/utils.py, ``_MODELS``, 1.2.1; a test compares the two.
MODELS: Mapping[str, str] = MappingProxyType(
    {
        **{
            size: f"Systran/faster-whisper-{size}"
            for size in (
                *("tiny.en", "tiny", "base.en", "base", "small.en", "small"),
                *("medium.en", "medium", "large-v1", "large-v2", "large-v3"),
            )
        },
        **{
            f"distil-{size}": f"Systran/faster-distil-whisper-{size}"
            for size in ("small.en", "medium.en", "large-v2", "large-v3")
        },
        "distil-large-v3.5": "distil-whisper/distil-large-v3.5-ct2",
        "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    }
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {"large": "large-v3", "turbo": "large-v3-turbo"}
)


def _other_names() -> dict[str, str]:
    """
    Returns the names under which others publish or serve the known models.

    The repositories of OpenAI and of Distil-Whisper hold weights that CTranslate2
    cannot read; their names mean the conversions of these. ``openai/whisper-large`` is
    the first large model, where faster-whisper's ``"large"`` is the latest.
    """
    found: dict[str, str] = {}
    # Four spellings of each: the repository, its last part, the publisher's, a short.
    for name, repository in MODELS.items():
        is_openai = not name.startswith("distil-")
        published = f"openai/whisper-{name}" if is_openai else f"distil-whisper/{name}"
        short = f"whisper-{name}" if is_openai else name.replace("-", "-whisper-", 1)
        last = repository.partition("/")[2]
        found |= dict.fromkeys((repository, last, published, short), name)
    # Aliases are sizes to their users, so they have the same prefixes.
    for alias, name in ALIASES.items():
        prefixes = ("whisper-", "faster-whisper-", "openai/whisper-")
        found |= {f"{prefix}{alias}": name for prefix in prefixes}
    return {**found, "openai/whisper-large": "large-v1"}


# Other names of the known models, such as ``"whisper-large-v3"``, and the canonical
# ones.
# Source: huggingface.co/openai and /distil-whisper; names of OpenAI-compatible servers.
OTHER_NAMES: Mapping[str, str] = MappingProxyType(_other_names())

# The effective types: those that a loaded model can be in.
COMPUTE_TYPES = (
    "float32",
    "float16",
    "bfloat16",
    "int16",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
)

# The types of an x86 CPU without MKL and of a GPU since Ampere, by kind of device.
#
# They are for tables about machines that are not here; a cache asks CTranslate2
# instead.
TYPICAL_COMPUTE_TYPES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "cpu": frozenset({"float32", "int8_float32"}),
        "cuda": frozenset(set(COMPUTE_TYPES) - {"int16"}),
    }
)

_LOAD_DEFAULTS: dict[str, OptionValue] = {
    "cpu_threads": 0,
    "num_workers": 1,
    "download_root": None,
    "revision": None,
    "flash_attention": False,
    "max_queued_batches": 0,
    "tensor_parallel": False,
}
_LEAST = {"cpu_threads": 0, "num_workers": 1}
_HUB_OPTIONS = {"download_root", "revision"}
# Load options that say how to get the files, and do not change the model.
FETCH_OPTIONS: Mapping[str, OptionValue] = MappingProxyType(
    {"local_files_only": False, "use_auth_token": None}
)


@dataclass(frozen=True, slots=True)
class ModelKey:
    """
    The identity of a model in memory: two requests with one key share one model.

    Attributes:
        model: Canonical name, hub repository, or real path of a directory.
        device: ``"cpu"`` or ``"cuda:N"``.
        compute_type: Effective type, one of `COMPUTE_TYPES`.
        options: Load options that differ from their defaults, sorted by name.
    """

    model: str
    device: str
    compute_type: str
    options: tuple[tuple[str, OptionValue], ...] = ()

    def __str__(self) -> str:
        # Unique: logs, errors and the records of comparisons name models by it.
        text = f"{self.model}/{self.device}/{self.compute_type}"
        if self.options:
            text += "?" + "&".join(f"{name}={value}" for name, value in self.options)
        return text

    @property
    def num_workers(self) -> int:
        """
        Calls that the model runs at the same time.
        """
        return int(dict(self.options).get("num_workers") or 1)


def is_directory(model: str) -> bool:
    """
    Returns True if a canonical model name is a directory, not a name on the model hub.
    """
    return os.path.isabs(model)


_DEVICES = "device must be 'auto', 'cpu', 'cuda' or 'cuda:N'"
_DEVICE = re.compile(r"(auto|cpu)|cuda(?::(\d+))?")
# Other spellings that CTranslate2 takes. Source: src/devices.cc, str_to_device.
_CAPITALS = {"AUTO": "auto", "CPU": "cpu", "CUDA": "cuda"}


def _device_hint(device: object) -> str:
    if device is None:
        return "; leave it out for 'auto'"
    # PyTorch's devices print as what is wanted here.
    text = str(device).strip().lower()
    text = f"cuda:{text}" if text.isdecimal() else text
    for other in ("gpu", "nvidia"):
        text = re.sub(rf"^{other}(?=:|$)", "cuda", text)
    if text != device and _DEVICE.fullmatch(text):
        return f"; did you mean {text!r}?"
    return "; CTranslate2 knows no others"


def frozen_compute_type(
    compute_type: str | Mapping[str, str],
) -> str | tuple[tuple[str, str], ...]:
    """
    Returns a compute type, or one for each kind of device, as a value to be hashed.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(compute_type, str):
        return compute_type
    # As CTranslate2 takes it.
    wanted = "compute_type must be text such as 'int8', or {'cuda': 'float16', ...}"
    if not hasattr(compute_type, "items"):
        raise TypeError(f"{wanted}, not {compute_type!r}")
    for device, kind in compute_type.items():
        if device not in ("cpu", "cuda") or not isinstance(kind, str):
            raise ValueError(f"{wanted} for 'cpu' and 'cuda', not {compute_type!r}")
    return tuple(sorted(compute_type.items()))


def compute_type_on(
    compute_type: str | tuple[tuple[str, str], ...], device: str
) -> str:
    """
    Returns the type that was asked for on *device*; ``"default"`` if there is none.
    """
    if isinstance(compute_type, str):
        return compute_type
    return dict(compute_type).get(device.partition(":")[0], "default")


def single_index(device_index: object) -> object:
    """
    Returns the index in a list of one, as WhisperModel takes it, and all else as it is.
    """
    if isinstance(device_index, (list, tuple)) and len(device_index) == 1:
        device_index = device_index[0]
    return _plain(device_index)


def _plain(value: object) -> object:
    """
    Returns a whole number of NumPy's as Python's, as CTranslate2 takes both, and all
    else as it is.
    """
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return value


def canonical_device(device: str, device_index: object = None) -> str:
    """
    Returns ``"auto"``, ``"cpu"``, ``"cuda:N"``, or ``"cuda"`` for the best card. With a
    *device_index*, ``"cuda"`` is that card, and ``"auto"`` is ``"auto:N"``: that card
    or the CPU.

    Raises:
        TypeError: *device* is no text, or *device_index* not one number.
        ValueError: the device is none of these.
    """
    # A longer list is faster-whisper's way to run one model on several cards.
    device_index = single_index(device_index)
    if isinstance(device_index, bool) or not isinstance(device_index, int | None):
        raise TypeError(
            f"device_index must be one integer, not {device_index!r}: one model over "
            "several cards is not supported; ask for 'cuda:0' and 'cuda:1' separately"
        )
    if not isinstance(device, str):
        raise TypeError(f"{_DEVICES}, not {device!r}{_device_hint(device)}")
    if (device_index or 0) < 0:
        raise ValueError(f"device_index must be 0 or more, not {device_index}")
    match = _DEVICE.fullmatch(_CAPITALS.get(device, device))
    if not match:
        raise ValueError(f"{_DEVICES}, not {device!r}{_device_hint(device)}")
    if match[1] == "auto" and device_index is not None:
        return f"auto:{device_index}"
    if match[1]:
        return match[1]
    # The card is chosen later, when it is known where the model is.
    if match[2] is None and device_index is None:
        return "cuda"
    # WhisperModel's default of device_index is 0, which need not contradict "cuda:1".
    if match[2] and device_index not in (None, 0, int(match[2])):
        raise ValueError(
            f"device {device!r} and device_index={device_index} name two cards"
        )
    return f"cuda:{int(match[2] or device_index or 0)}"


def canonical_options(
    model: str, options: Mapping[str, object]
) -> tuple[tuple[str, OptionValue], ...]:
    """
    Returns the load options that differ from faster-whisper's defaults, by name.

    Options that only say how to fetch the files (`FETCH_OPTIONS`) are left out, and the
    hub's are for a directory.

    Raises:
        TypeError: faster-whisper has no such load option, or not of this type.
        ValueError: ``files=`` was given, or a number is too small.
    """
    kept: list[tuple[str, OptionValue]] = []
    for name, given in sorted(options.items()):
        value = os.fspath(given) if isinstance(given, os.PathLike) else given
        # None is what WhisperModel takes for no files.
        if name == "files":
            if value is None:
                continue
            raise ValueError(
                "files= is not supported: CTranslate2 keeps a second copy of such a "
                "model for its whole life; write the files to a directory instead"
            )
        if name in FETCH_OPTIONS:
            continue
        if name not in _LOAD_DEFAULTS:
            raise TypeError(f"WhisperModel has no load option {name!r}")
        plain = _checked(name, value)
        # A default that is spelled out must not make another model.
        if plain == _LOAD_DEFAULTS[name] or (
            name in _HUB_OPTIONS and is_directory(model)
        ):
            continue
        kept.append((name, plain))
    return tuple(kept)


def _checked(name: str, value: object) -> OptionValue:
    """
    Returns a load option of the right type, and refuses others in one line.

    CTranslate2 itself would print its constructor's signature.
    """
    default, value = _LOAD_DEFAULTS[name], _plain(value)
    # Those without a default are the hub's, which are text.
    kind = str if default is None else type(default)
    is_kind = isinstance(value, kind) and isinstance(value, bool) is (kind is bool)
    if is_kind and isinstance(value, OptionValue):
        if isinstance(value, int) and value < _LEAST.get(name, value):
            raise ValueError(f"{name} must be at least {_LEAST[name]}, not {value}")
        return value
    if value is default:
        return default
    raise TypeError(f"load option {name} must be {kind.__name__}, not {value!r}")


def effective_compute_type(
    requested: str, saved: str, device: str, supported: Collection[str]
) -> str:
    """
    Returns the type that CTranslate2 will really compute in.

    Args:
        requested: ``"default"``, ``"auto"``, ``"int8"`` or one of `COMPUTE_TYPES`.
        saved: The type of the weights in model.bin, one of `COMPUTE_TYPES`.
        device: ``"cpu"`` or ``"cuda:N"``.
        supported: The result of ``ctranslate2.get_supported_compute_types(device)``.

    Raises:
        UnsupportedComputeType: no such type, or not on this device.

    Source: CTranslate2 src/types.cc:156-295 @ 0d8bcd3; compared with what real models
    report, for every pair of types, by a test.
    """
    # float32 always works, whatever the list of a backend says.
    available = frozenset(supported) & frozenset(COMPUTE_TYPES) | {"float32"}
    # As CTranslate2 decides it, in its order.
    if requested == "default":
        return saved if saved in available else _fallback(saved, available)
    if requested == "auto":
        preferred = ("int8_float16", "int8_float32", "float16", "int16", "float32")
        return next(name for name in preferred if name in available)
    if requested == "int8":
        float_type = re.sub(r"^int8_", "", saved)
        named = f"int8_{float_type if 'float' in float_type else 'float32'}"
        return named if named in available else _fallback(named, available)
    # A named type is never replaced without a word; a fallback is there for that.
    if requested not in available:
        raise UnsupportedComputeType(requested, device, tuple(sorted(available)))
    return requested


def _fallback(compute_type: str, available: Collection[str]) -> str:
    """
    Returns the type that CTranslate2 takes in place of one that the device lacks.
    """
    ladder = {
        "int8_float16": ("int8_float32", "float16"),
        "int8_float32": ("float16",),
        "int8_bfloat16": ("int8_float32", "bfloat16"),
        "int16": ("int8_float32",),
    }
    for name in ladder.get(compute_type, ()):
        if name in available:
            return name
    return "float32"
