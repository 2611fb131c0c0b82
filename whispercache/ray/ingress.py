"""
The server in front of the replicas: all its routes, limits and errors, and no models.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from whispercache.server.app import application
from whispercache.server.offers import offers_of
from whispercache.server.service import Service

from .remote import RemoteEngine

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

    from whispercache.server.options import ServerOptions


class Ingress:
    """
    One server, which lets *at_once* requests work with each model. Ray has its
    application built where it will run.
    """

    def __init__(
        self, replicas: DeploymentHandle[Any], at_once: int, options: ServerOptions
    ) -> None:
        self._replicas = replicas
        self._options = replace(options, parallel=at_once)

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = self._options
        engine = RemoteEngine(self._replicas)
        service = Service(options, offers_of(options), engine)
        return application(service, nullcontext())
