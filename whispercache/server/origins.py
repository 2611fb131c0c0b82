"""
The pages of other sites, and the names of this machine, that a server may be told of.
Pure: what could never match is refused.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Values besides sites.
ANY_ORIGIN = "*"
NO_ORIGIN = "null"

# Programs whose windows are pages, and the origins that those send. Source: Obsidian's
# desktop and its mobile ones, which are Capacitor's; Tauri 2, on macOS and elsewhere;
# Electron, where a window shows a file.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "obsidian": ("app://obsidian.md", "capacitor://localhost", "http://localhost"),
    "electron": ("file://",),
    "tauri": ("tauri://localhost", "http://tauri.localhost", "https://tauri.localhost"),
}
# What containers call the machine that they run on. Source: Docker's and Podman's
# documentation of their networks.
MACHINES: dict[str, tuple[str, ...]] = {
    "docker": (
        *("host.docker.internal", "gateway.docker.internal"),
        "host.containers.internal",
    )
}

_ANY_PORT = ":*"
_USUAL_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_.-]+")


def origins_of(texts: Iterable[str]) -> tuple[str, ...]:
    """
    Returns the origins of texts, each once: programs by their names, and sites.

    Raises:
        ValueError: no browser sends such a one; it tells what they do send.
    """
    return tuple(dict.fromkeys(_origins(texts)))


def _origins(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if text not in PROGRAMS:
            _check_origin(text)
        yield from PROGRAMS.get(text, (text,))


def hosts_of(texts: Iterable[str]) -> tuple[str, ...]:
    """
    Returns the host names of texts, each once, in small letters, as clients send them
    without a port.

    Raises:
        ValueError: no client sends such a one; it tells what they do send.
    """
    found: dict[str, None] = {}
    for text in texts:
        for name in MACHINES.get(text, (text,)):
            found[_host_of(name)] = None
    return tuple(found)


def pattern_of(origins: Iterable[str]) -> str:
    """
    Returns the regular expression for the origins of sites, with any port where they
    say so; that of nothing if there are none.
    """
    parts = [
        re.escape(each.removesuffix(_ANY_PORT)) + r"(:\d{1,5})?"
        if each.endswith(_ANY_PORT)
        else re.escape(each)
        for each in origins
    ]
    return "|".join(parts)


def option_for(origin: str) -> str:
    """
    Returns the option that lets the pages of an origin in.
    """
    for program, own in PROGRAMS.items():
        if origin in own:
            return f"--allow-origin {program}"
    return f"--allow-origin {origin}"


def option_for_host(host: str | None) -> str:
    """
    Returns the option by which a server goes by a name, too.
    """
    for machine, names in MACHINES.items():
        if host in names:
            return f"--allow-host {machine}"
    return f"--allow-host {host}" if host else "--allow-host"


def _host_of(text: str) -> str:
    name = text.strip().lower()
    # An address of IPv6 needs brackets only where a port follows.
    is_address = name.count(":") > 1 and "://" not in name and "]:" not in name
    try:
        parts = urlsplit(name if "://" in name else f"//{name}")
        host = _host(name.strip("[]") if is_address else parts.hostname or "")
    except ValueError:
        host = ""
    bare = host.strip("[]")
    if bare and bare == name.strip("[]"):
        return bare
    hint = f"name it as in {bare}" if bare else "name each as in speech.example"
    raise ValueError(
        f"{text!r} is no host name that a client sends; {hint}, without scheme or port"
    )


def _check_origin(origin: str) -> None:
    if origin in (ANY_ORIGIN, NO_ORIGIN, *PROGRAMS["electron"]):
        return
    site = origin.removesuffix(_ANY_PORT)
    spelled = _as_browsers_spell(site)
    if spelled and site == spelled:
        # A port and any other one.
        if site == origin or urlsplit(site).port is None:
            return
        spelled = site.rpartition(":")[0] + _ANY_PORT
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
