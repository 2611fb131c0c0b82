"""
The table of all settings, from which options, variables, keys of the file and
documentation are made.

``keep_alive`` is a parameter of `ModelCache`, a key of the file, ``--keep-alive`` and
``WHISPERCACHE_KEEP_ALIVE``. ``serve.port`` is one of a server: ``port`` in the table
``[serve]`` of the file, ``whispercache serve --port`` and ``WHISPERCACHE_SERVE_PORT``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from whispercache.options import PATIENCE_S

from . import kinds

if TYPE_CHECKING:
    from collections.abc import Collection

    from .kinds import Kind

PREFIX = "WHISPERCACHE_"
SERVE = "serve"

CONFIG_VARIABLE = "WHISPERCACHE_CONFIG"
# Keys come by variables or files: a command line is seen by others.
KEYS_VARIABLE = "WHISPERCACHE_API_KEYS"
KEY_VARIABLE = "WHISPERCACHE_API_KEY"
# Those by which `whispercache run` reaches the program that it runs.
RUN_VARIABLE = "WHISPERCACHE_RUN"
RUN_TOP_VARIABLE = "WHISPERCACHE_RUN_TOP"
# Those that the first of them may have, besides the name of faster-whisper's module.
RUN_WORDS = ("ctranslate2", "preload", "huge_pages")

# Variables that are no settings of this table.
OTHER_VARIABLES = {
    CONFIG_VARIABLE: "the file, in place of the usual one",
    KEYS_VARIABLE: "keys of a server, with commas between",
    KEY_VARIABLE: "the key with which `whispercache top` asks a server",
    RUN_VARIABLE: "`whispercache run` is at work, with these changes",
    RUN_TOP_VARIABLE: "where the events of its program go",
    "WHISPERCACHE_EFFORT": "how much this project's own tests try at random",
    "WHISPERCACHE_GPU_MODELS": "the folder of models for this project's tests on GPUs",
}

# Variables that Kubernetes sets in every container beside a service that is called
# whispercache or whispercache-…; a value of the second kind is one's whole address.
# Source: Kubernetes, "Discovering services", environment variables.
_OF_SERVICES = re.compile(
    r"WHISPERCACHE(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_\w+)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True, slots=True)
class Setting:
    """
    A setting: its name in every place, its kind, its default and its meaning.
    """

    key: str
    kind: Kind
    default: object
    meaning: str
    metavar: str = ""

    @property
    def name(self) -> str:
        """
        The parameter; of a server without its table.
        """
        return self.key.rpartition(".")[2]

    @property
    def variable(self) -> str:
        """
        The environment variable.
        """
        return PREFIX + self.key.replace(".", "_").upper()

    @property
    def option(self) -> str:
        """
        The option of a command.
        """
        return f"--{self.name.replace('_', '-')}"


_OF_CACHES = (
    Setting("vram", kinds.LIMITS, "auto", "memory on each GPU: 10GiB, 80%"),
    Setting("ram", kinds.LIMIT, "auto", "memory on the host, likewise"),
    Setting("max_models", kinds.COUNT_OR_NONE, None, "most models on each device"),
    Setting(
        "keep_alive",
        kinds.KEEP_ALIVE,
        "5m",
        "time that idle models stay: 5m, 0, -1 for ever",
    ),
    Setting("policy", kinds.one_of("lru", "gap"), "lru", "which idle model goes first"),
    Setting(
        "patience_s",
        kinds.SECONDS,
        PATIENCE_S,
        "time for which hits may pass one that waits",
    ),
    Setting(
        "priority",
        kinds.PRIORITY,
        "interactive",
        "turn of requests that name none: interactive, batch",
    ),
    Setting("parallel", kinds.COUNT_OR_NONE, None, "most leases on one model"),
    Setting("max_waiting", kinds.COUNT_OR_NONE, None, "most requests in the queue"),
    Setting("fallback", kinds.FALLBACK, [], "what to try instead: int8, cpu, cuda:1"),
    Setting(
        "pressure",
        kinds.one_of("load", "watch"),
        "load",
        "when free memory is read: before a load, or watch it",
    ),
    Setting(
        "coordinate",
        kinds.SWITCH,
        default=False,
        meaning="take turns with this user's other processes",
    ),
    Setting(
        "coordinate_dir",
        kinds.DIRECTORY_OR_NONE,
        None,
        "directory for that; turns it on",
    ),
    Setting(
        "park",
        kinds.SWITCH_OR_LIMIT,
        default=False,
        meaning="copies of what GPUs unload, on the host: on, 16GiB",
    ),
    Setting(
        "variants",
        kinds.SWITCH_OR_BYTES,
        default=True,
        meaning="converted models on disk: on (16 GiB), 5GiB, off",
    ),
)

_OF_COMMANDS = (
    Setting("on", kinds.HOOKS, [], "command to run, or URL to call, when that happens"),
)

_OF_SERVERS = (
    Setting("models", kinds.TEXTS, [], "models to serve: [NAME=]MODEL[:TYPE]", "MODEL"),
    Setting("host", kinds.TEXT, "127.0.0.1", "address to listen on", "HOST"),
    Setting("port", kinds.PORT, 8000, "port to listen on"),
    Setting("device", kinds.DEVICE, "auto", "auto, cpu, cuda or cuda:N"),
    Setting("preload", kinds.TEXTS, [], "models to load at the start", "NAME"),
    Setting("pin", kinds.TEXTS, [], "models to load and keep", "NAME"),
    Setting(
        "default",
        kinds.TEXT_OR_NONE,
        None,
        "the model for OpenAI's names (the first, if none)",
        "NAME",
    ),
    Setting(
        "strict_names",
        kinds.SWITCH,
        default=False,
        meaning="no other names for models than those given",
    ),
    Setting(
        "strict",
        kinds.SWITCH,
        default=False,
        meaning="unknown fields are errors, not warnings",
    ),
    Setting(
        "key_file", kinds.FILES, [], f"its keys, one a line; or use ${KEYS_VARIABLE}"
    ),
    Setting(
        "key_priority",
        kinds.TEXTS,
        [],
        "turns of those with a key, by its name: night=batch",
        "NAME=PRIORITY",
    ),
    Setting(
        "vad",
        kinds.SWITCH,
        default=True,
        meaning="hear speech alone, where a request does not say",
    ),
    Setting("max_upload", kinds.SIZE, "100MiB", "size of a request"),
    Setting("max_duration", kinds.TIME, "1h", "audio of a request"),
    Setting(
        "max_audio",
        kinds.TIME_OR_NONE,
        None,
        "audio of people at work, and of batches",
    ),
    Setting("timeout", kinds.TIME, "60s", "wait for a model"),
    Setting("max_waiting", kinds.COUNT_OR_ZERO, 64, "requests that wait"),
    Setting("parallel", kinds.COUNT, 2, "requests at work on one model"),
    Setting("drain", kinds.TIME, "30s", "time to finish at the end"),
    Setting(
        "log_format",
        kinds.one_of("text", "json"),
        "text",
        "lines on stderr: text, or json for programs",
    ),
    Setting("idle_timeout", kinds.TIME, "75s", "time that idle connections stay open"),
    Setting("wyoming", kinds.ADDRESS_OR_NONE, None, "Home Assistant's protocol, there"),
    Setting(
        "allow_host", kinds.TEXTS, [], "names of this server: a name, docker", "NAME"
    ),
    Setting(
        "allow_origin",
        kinds.TEXTS,
        [],
        "other sites: a URL, obsidian, electron, tauri",
        "URL",
    ),
)

SETTINGS: dict[str, Setting] = {
    setting.key: setting
    for setting in (
        *_OF_CACHES,
        *_OF_COMMANDS,
        *(replace(each, key=f"{SERVE}.{each.key}") for each in _OF_SERVERS),
    )
}

CACHE_KEYS = tuple(setting.key for setting in _OF_CACHES)
"""
The settings of the default cache.
"""

ONE_BY_ONE_KEYS = (
    *("vram", "ram", "max_models", "pressure", "coordinate", "coordinate_dir"),
    "variants",
)
"""
Those of a cache whose models take turns, each named and used once: no model of it is
idle, nobody waits for another, and a fallback would not be what was asked for.
"""

SERVED_CACHE_KEYS = tuple(
    key for key in CACHE_KEYS if key not in ("max_waiting", "parallel", "priority")
)
"""
Those of a server's cache: the server bounds how many wait and work, and its requests
name their priority.
"""


def is_of_a_service(variable: str, value: str) -> bool:
    """
    Returns True if an orchestrator set this variable, and no user.
    """
    is_address = variable.endswith("_PORT") and _ADDRESS.match(value)
    return bool(is_address or _OF_SERVICES.fullmatch(variable))


# Likeness of names that may be meant. Source: difflib's own choice.
_CLOSE = 0.6

_VARIABLES = {setting.variable: key for key, setting in SETTINGS.items()}


def key_of(variable: str) -> str | None:
    """
    Returns the setting that a variable is for; None for those of other uses.

    Raises:
        ValueError: It is unknown.
    """
    key = _VARIABLES.get(variable)
    if key is None and variable not in OTHER_VARIABLES:
        raise unknown(variable, (*_VARIABLES, *OTHER_VARIABLES))
    return key


def unknown(name: str, known: Collection[str], where: str = "") -> ValueError:
    """
    Returns the error for a name that is no setting, with the nearest that is one.
    """
    from difflib import SequenceMatcher

    # "port" is near to "serve.port".
    last = _last(name.replace("-", "_"))
    start = name.removesuffix(_last(name))

    def likeness(other: str) -> float:
        return SequenceMatcher(None, last, _last(other)).ratio()

    def nearness(other: str) -> float:
        # "ran" is "ram" more than "serve.drain", which is of another table.
        return likeness(other) + 0.1 * (other.removesuffix(_last(other)) == start)

    near = max(known, key=nearness)
    hint = "'whispercache config --help' lists all"
    if likeness(near) >= _CLOSE:
        hint = f"did you mean {near}?"
    return ValueError(f"{where}there is no setting {name}; {hint}")


def _last(name: str) -> str:
    """
    Returns a name without what it has in common with others of its table.
    """
    return re.sub(rf"^({PREFIX})?(SERVE_|serve\.)?", "", name)
