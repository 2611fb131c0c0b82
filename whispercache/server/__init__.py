"""
The server: one process that serves many models, over OpenAI's audio API.

A thin edge over the cache, on FastAPI; the extra ``[server]`` brings what it needs, and
nothing of that is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import ServerOptions

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["ServerOptions", "create_app"]


if not TYPE_CHECKING:
    # Type checkers see the import above; at runtime it waits for its first use, since
    # FastAPI is slow to import.
    def __getattr__(name: str) -> object:
        if name == "create_app":
            from .app import create_app

            return create_app
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
