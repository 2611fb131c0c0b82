"""
whispercache on Ray Serve: many machines or cards, each with a cache, behind one server.
Needs the extra ``[ray]``.

::

    from ray import serve
    from whispercache.ray import deployment

    serve.run(deployment(["large-v3", "small:int8"], vram="20GiB", replicas=4, gpus=1))

Ray starts, watches, scales and replaces processes. What it lacks is here: a router that
sends a request where its model is, a cache by bytes in each replica, and requests that
are repeated where a replica dies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .application import build, deployment
    from .scaling import by_pressure, gpus_for

__all__ = ["build", "by_pressure", "deployment", "gpus_for"]

_PLACES = {
    "build": "application",
    "deployment": "application",
    "by_pressure": "scaling",
    "gpus_for": "scaling",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """
        Imports a name when it is first used: Ray takes a second.
        """
        from importlib import import_module

        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = import_module(f"{__name__}.{_PLACES[name]}")
        except ModuleNotFoundError as missing:
            raise ImportError(
                f"{missing.name} is missing; pip install 'whispercache[ray]'"
            ) from missing
        return getattr(module, name)
