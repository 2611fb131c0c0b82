"""
The application for Ray Serve: servers in front, replicas with models behind them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray import serve
from ray.serve.config import RequestRouterConfig

from whispercache.planning.routing import RELUCTANCE
from whispercache.server.command import server_options
from whispercache.settings.sources import read
from whispercache.settings.table import SERVE, SERVED_CACHE_KEYS, SETTINGS, unknown

from .command import LIVE
from .engine import EngineReplica
from .ingress import Ingress
from .router import STATS_S, ModelRouter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray.serve import Application, Deployment

    from whispercache.options import CacheOptions

# Ray's default, 20 s, cuts off calls when a replica ends; one takes minutes.
_DRAIN_S = 600.0
_HEALTH_S = 5.0

# Requests that wait in Ray's router are polled for, and seen by nobody. So all reach a
# server, and all that it lets through a replica; both refuse what is too much.
_NO_BOUND = 100_000


@dataclass(frozen=True, slots=True)
class Size:
    """
    The processes of an application, and what Ray reserves for each.

    Attributes:
        replicas: Number of replicas with models, or the least and the most.
        ingresses: Number of servers in front of them.
        gpus: Cards of each replica; below 1, several share one.
        cpus: Processors of each replica, and so the threads of a call on a CPU.
        reluctance: How much a load counts beside waiting; see `planning.routing`.
    """

    replicas: tuple[int, int] = (1, 1)
    ingresses: int = 2
    gpus: float = 0.0
    cpus: float = 1.0
    reluctance: float = RELUCTANCE


def deployment(
    models: Sequence[str],
    *,
    replicas: int | tuple[int, int] = 1,
    gpus: float = 0.0,
    cpus: float = 1.0,
    ingresses: int = 2,
    **settings: object,
) -> Application:
    """
    Returns an application for ``ray.serve.run``: OpenAI's audio API over *models*, in
    replicas that each have a cache.

    Args:
        models: Those that are served, as for ``whispercache serve``.
        replicas: Number of replicas with models; a pair is the least and the most, by
            `by_pressure`.
        gpus: Cards of each replica. With 0 it computes on the CPU; below 1, several on
            one card take turns by ``coordinate``. See `gpus_for`.
        cpus: Processors of each replica.
        ingresses: Number of servers in front, each with the limits of one. If one dies,
            its requests are lost; the other goes on.
        settings: What ``whispercache serve`` has besides: ``vram``, ``keep_alive``,
            ``timeout`` and so on, each for one replica or one server.

    Raises:
        TypeError, ValueError: a setting is unknown or nonsense.
    """
    if isinstance(models, str):
        raise TypeError(f"models must be a list of models, not {models!r}")
    least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 1 <= least <= most or ingresses < 1 or gpus < 0:
        raise ValueError("there must be replicas and ingresses, and no negative cards")
    if os.environ.get("RAY_SERVE_USE_GRPC_BY_DEFAULT", "0") not in ("", "0"):
        raise ValueError(
            "RAY_SERVE_USE_GRPC_BY_DEFAULT is set: by gRPC, Ray passes no more than "
            "4 MiB, a minute of audio"
        )
    size = Size((least, most), ingresses, gpus, cpus)
    return bound(size, values_of({"models": list(models), **settings}))


def build(args: Mapping[str, str]) -> Application:
    """
    Returns what `deployment` does, for ``serve run whispercache.ray:build models=a,b``
    and for ``args:`` of a YAML file. Lists may be written with commas, and the range of
    replicas as ``2-8``.
    """
    given: dict[str, Any] = dict(args)
    for name in ("gpus", "cpus"):
        if name in given:
            given[name] = float(given[name])
    if "ingresses" in given:
        given["ingresses"] = int(given["ingresses"])
    if "replicas" in given:
        least, _, most = str(given["replicas"]).partition("-")
        given["replicas"] = (int(least), int(most or least))
    for name, value in given.items():
        setting = SETTINGS.get(f"{SERVE}.{name}") or SETTINGS.get(name)
        if setting is not None and setting.kind.is_list and isinstance(value, str):
            given[name] = value.split(",")
    if "models" not in given:
        raise ValueError("name at least one model: models=large-v3,small")
    return deployment(**given)


def values_of(given: Mapping[str, object]) -> dict[str, Any]:
    """
    Returns all settings by their keys, as the cache and the server take them.
    """
    values = {key: setting.default for key, setting in SETTINGS.items()}
    keys = {key.rpartition(".")[2]: key for key in SERVED_CACHE_KEYS}
    # A server's own win: its limits are of requests, and those of caches of leases.
    keys |= {
        key.removeprefix(f"{SERVE}."): key
        for key in SETTINGS
        if key.startswith(f"{SERVE}.")
    }
    for name, value in given.items():
        if name not in keys:
            raise TypeError(str(unknown(name, keys)))
        # None is as good as not said.
        if value is not None:
            values[keys[name]] = read(SETTINGS[keys[name]], value, name)
    return values


def bound(
    size: Size, values: Mapping[str, Any], kind: type[EngineReplica] = EngineReplica
) -> Application:
    """
    Returns the application with these settings, and with replicas of a *kind*.
    """
    served = {
        key.removeprefix(f"{SERVE}."): value
        for key, value in values.items()
        if key.startswith(f"{SERVE}.")
    }
    options = server_options(served)
    cache = {key: values[key] for key in SERVED_CACHE_KEYS}
    if 0 < size.gpus < 1:
        # Others are on the same card; Ray limits nothing.
        cache["coordinate"] = True
    engines = _engines(size, kind).options(
        user_config={key.rpartition(".")[2]: values[key] for key in LIVE}
    )
    front = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=size.ingresses,
        max_ongoing_requests=_NO_BOUND,
        ray_actor_options=_actor_options(0, 1),
        graceful_shutdown_timeout_s=_DRAIN_S,
        health_check_period_s=_HEALTH_S,
    )
    behind = engines.bind(options, cast("CacheOptions", cache))
    return front.bind(behind, size.replicas[1], options)


def _engines(size: Size, kind: type[EngineReplica]) -> Deployment:
    return serve.deployment(
        kind,
        name="engine",
        max_ongoing_requests=_NO_BOUND,
        ray_actor_options=_actor_options(size.gpus, size.cpus),
        graceful_shutdown_timeout_s=_DRAIN_S,
        health_check_period_s=_HEALTH_S,
        # The servers' logs have each request.
        logging_config={"enable_access_log": False},
        request_router_config=RequestRouterConfig(
            request_router_class=f"{ModelRouter.__module__}.{ModelRouter.__name__}",
            request_router_kwargs={"reluctance": size.reluctance},
            request_routing_stats_period_s=STATS_S,
        ),
        **_scale(size),
    )


def _scale(size: Size) -> dict[str, Any]:
    least, most = size.replicas
    if least == most:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "policy": {"policy_function": "whispercache.ray.scaling:by_pressure"},
        }
    }


def _actor_options(gpus: float, cpus: float) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if not gpus:
        # Ray shows all cards of a node to whoever asked for none.
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    return options
