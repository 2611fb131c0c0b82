"""
The options of a server: its models, its limits, and its permissions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from whispercache.engine.naming import ModelSpec, parse_spec
from whispercache.units import parse_seconds

from .origins import hosts_of, origins_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# The least of each count.
_COUNTS = {"max_upload_bytes": 1, "parallel": 1, "decoders": 1, "max_waiting": 0}
# Times in which nothing would be done.
_ABOVE_0 = ("max_duration_s", "max_audio_s", "upload_timeout_s", "decode_timeout_s")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """
    The behaviour of a server; see `create_app`.

    Attributes:
        models: The models that it offers, as texts (``"base"``, ``"base:int8"``,
            ``"mine=/models/mine"``). Nothing else is ever downloaded, opened or named.
        device: For all of them: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        preload: Names of models to load at the start; ready once all are.
        pin: Names of those to keep, idle or not; they are loaded at the start, too.
        keys: Requests need one of these; none if empty.
        key_names: Names of *keys*, each as ``{key: name}``, by which requests are told
            apart in the list of them, the log and traces.
        default: The name of the model for clients that ask for OpenAI's, and for those
            whose form has no field for it; the first of *models* if None.
        strict_names: Names on the list are the only ones: no aliases.
        strict: Fields that are unknown are errors, and not only warnings.
        hosts: Names by which clients may address it, as protection against pages that
            rebind a name of theirs to this machine; any if empty. ``"docker"`` is what
            containers call it.
        origins: Origins of other sites whose pages may use it, as browsers send them:
            ``"https://app.example"``, without a slash or a usual port;
            ``"http://localhost:*"`` is any port. ``"obsidian"``, ``"electron"`` and
            ``"tauri"`` are those of such programs. ``"*"`` is any site, and ``"null"``
            are pages without an origin, such as local files; but any site can make such
            a page, so that without *keys* both are for whatever page a browser here
            happens to show.
        vad: Speech is looked for, and nothing else heard, where a request does not say;
            without it models write words into silence (benchmarks/silence.py).
        max_upload_bytes: Of one request's whole body.
        max_duration_s: Of one request's audio.
        max_audio_s: Of the audio of all requests that are at work, which is in memory:
            for each second 64 kB of samples, up to 51 kB of spectrogram and 68 kB where
            speech is looked for, and some 60 MB for each request. None for that of the
            longest request. What waits is on disk.
        upload_timeout_s: For one request's body to arrive.
        decode_timeout_s: For its audio to be decoded.
        timeout_s: For a model to be had, from the moment at which the audio is decoded.
        max_waiting: Limit of the requests that wait; more are refused.
        parallel: Requests that work with one model at a time. A model computes one
            after the other; with two, the next one's features are ready in time.
        decoders: Processes that decode audio.
        wyoming: Host and port at which it speaks Wyoming, too, which needs the extra
            ``[wyoming]`` and asks for no key; None for HTTP alone.
        drain_s: For answers of Wyoming that are under way at the end.
        offered: The same models as *models*, each with its name.

    Raises:
        TypeError, ValueError: an option is nonsense.
    """

    models: tuple[str | ModelSpec, ...]
    device: str = "auto"
    preload: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    default: str | None = None
    strict_names: bool = False
    strict: bool = False
    keys: tuple[str, ...] = ()
    key_names: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    vad: bool = True
    max_upload_bytes: int = 100 * 1024**2
    max_duration_s: float = 3600.0
    max_audio_s: float | None = None
    upload_timeout_s: float = 300.0
    decode_timeout_s: float = 60.0
    timeout_s: float = 60.0
    max_waiting: int = 64
    parallel: int = 2
    decoders: int = 2
    wyoming: tuple[str, int] | None = None
    drain_s: float = 30.0
    offered: tuple[ModelSpec, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Once, so that a misspelt model is told where the options are made.
        offered = _parsed(self.models)
        object.__setattr__(self, "offered", offered)  # the class is frozen
        names = [spec.name for spec in offered]
        if not names:
            raise ValueError("name at least one model to serve")
        if len(set(names)) < len(names):
            raise ValueError(f"two models go by one name: {', '.join(names)}")
        unknown = {*self.preload, *self.pin} - set(names)
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))} is not among the models served: "
                f"{', '.join(names)}"
            )
        if self.default is not None and self.default not in names:
            raise ValueError(
                f"the default {self.default} is not among the models served: "
                f"{', '.join(names)}"
            )
        # What could never match is told here.
        object.__setattr__(self, "hosts", hosts_of(self.hosts))
        object.__setattr__(self, "origins", origins_of(self.origins))
        if any(not key.strip() for key in self.keys):
            raise ValueError("an empty key would let everybody in")
        self._check_times()
        for name, least in _COUNTS.items():
            count = getattr(self, name)
            # True counts as 1 in Python, but is never meant as one.
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be a whole number, not {count!r}")
            if count < least:
                raise ValueError(f"{name} must be {least} or more, not {count}")

    def _check_times(self) -> None:
        times = [*_ABOVE_0, "timeout_s", "drain_s"]
        if self.max_audio_s is None:
            times.remove("max_audio_s")
        for name in times:
            seconds = parse_seconds(getattr(self, name), name)
            if name in _ABOVE_0 and not seconds:
                raise ValueError(f"{name} must be above 0")
            # Text such as "5m" is one, too.
            object.__setattr__(self, name, seconds)


def _parsed(models: Sequence[str | ModelSpec]) -> tuple[ModelSpec, ...]:
    # A text is a sequence too, of letters.
    if isinstance(models, str):
        raise TypeError(f"models must be a tuple of models, not {models!r}")
    return tuple(
        parse_spec(model) if isinstance(model, str) else model for model in models
    )
