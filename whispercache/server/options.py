"""
The options of a server: its models, its limits, and its permissions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from whispercache.engine.naming import ModelSpec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Values of `ServerOptions.origins` besides sites.
ANY_ORIGIN = "*"
NO_ORIGIN = "null"

_USUAL_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_.-]+")


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
        hosts: Names by which clients may address it, as protection against pages that
            rebind a name of theirs to this machine; any if empty.
        origins: Origins of other sites whose pages may use it, as browsers send them:
            ``"https://app.example"``, without a slash or a usual port. ``"*"`` is any
            site, and ``"null"`` are pages without an origin, such as local files; but
            any site can make such a page, so that without *keys* both are for whatever
            page a browser here happens to show.
        max_upload_bytes: Of one request's whole body.
        max_duration_s: Of one request's audio.
        max_audio_s: Of the audio of all requests that are at work, which is in memory:
            64 kB of samples and up to 51 kB of spectrogram for each second, and some
            60 MB for each request. None for that of the longest request. What waits is
            on disk.
        upload_timeout_s: For one request's body to arrive.
        decode_timeout_s: For its audio to be decoded.
        timeout_s: For a model to be had, from the moment at which the audio is decoded.
        max_waiting: Limit of the requests that wait; more are refused.
        parallel: Requests that work with one model at a time. A model computes one
            after the other; with two, the next one's features are ready in time.
        decoders: Processes that decode audio.
        offered: The same models as *models*, each with its name.

    Raises:
        TypeError, ValueError: an option is nonsense.
    """

    models: tuple[str | ModelSpec, ...]
    device: str = "auto"
    preload: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    key_names: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_upload_bytes: int = 100 * 1024**2
    max_duration_s: float = 3600.0
    max_audio_s: float | None = None
    upload_timeout_s: float = 300.0
    decode_timeout_s: float = 60.0
    timeout_s: float = 60.0
    max_waiting: int = 64
    parallel: int = 2
    decoders: int = 2
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
        for origin in self.origins:
            _check_origin(origin)
        if any(not key.strip() for key in self.keys):
            raise ValueError("an empty key would let everybody in")
        for name in (
            *("max_upload_bytes", "max_duration_s", "upload_timeout_s"),
            *("decode_timeout_s", "parallel", "decoders"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("timeout_s", "max_waiting"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more")


def _parsed(models: Sequence[str | ModelSpec]) -> tuple[ModelSpec, ...]:
    # A text is a sequence too, of letters.
    if isinstance(models, str):
        raise TypeError(f"models must be a tuple of models, not {models!r}")
    return tuple(
        parse_spec(model) if isinstance(model, str) else model for model in models
    )


def _check_origin(origin: str) -> None:
    if origin in (ANY_ORIGIN, NO_ORIGIN):
        return
    spelled = _as_browsers_spell(origin)
    if spelled and origin == spelled:
        return
    hint = (
        f"browsers send {spelled}"
        if spelled
        else f"name each site as in https://app.example, or {ANY_ORIGIN} for all"
    )
    raise ValueError(f"{origin!r} is no origin; {hint}")


def _as_browsers_spell(site: str) -> str:
    """
    Returns the origin of pages at an address; nothing if that is none.

    Source: "serialization of an origin" in the HTML and URL standards.
    """
    text = site.strip()
    if text.lower() == NO_ORIGIN:
        return NO_ORIGIN
    if "://" not in text:
        is_here = text.lower().startswith(("localhost", "127.", "["))
        text = f"{'http' if is_here else 'https'}://{text}"
    try:
        parts = urlsplit(text)
        host, port = _host(parts.hostname or ""), parts.port
    except ValueError:
        return ""
    if parts.scheme == "file":
        return NO_ORIGIN
    if not host or not parts.scheme:
        return ""
    is_usual = port is None or port == _USUAL_PORTS.get(parts.scheme)
    return f"{parts.scheme}://{host}" if is_usual else f"{parts.scheme}://{host}:{port}"


def _host(name: str) -> str:
    """
    Returns a host as in an origin: small letters, other alphabets in ASCII.
    """
    if ":" in name:
        return f"[{IPv6Address(name)}]"
    if not name.isascii():
        name = name.encode("idna").decode("ascii")
    return name if _HOST.fullmatch(name) else ""
