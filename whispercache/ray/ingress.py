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
    One server, which lets as many requests work with each model as all replicas may
    together: *n* of them, or those that run, if that is more. Ray has its application
    built where it will run.
    """

    def __init__(
        self, replicas: DeploymentHandle[Any], n: int, options: ServerOptions
    ) -> None:
        self._replicas = replicas
        self._n = n
        self._options = options

    def __serve_build_asgi_app__(self) -> FastAPI:
        each, n = self._options.parallel, self._n
        options = replace(self._options, parallel=each * n)

        def counted(running: int) -> None:
            service.let_in(each * max(n, running))

        engine = RemoteEngine(self._replicas, counted)
        service = Service(options, offers_of(options), engine)
        return application(service, nullcontext())
