"""
``whispercache serve --ray``: the same server, on a Ray cluster.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, cast

from whispercache.engine.naming import canonical_model, parse_spec
from whispercache.errors import WhisperCacheError
from whispercache.server import command
from whispercache.settings.arguments import settings_of
from whispercache.settings.table import SERVE, SETTINGS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from whispercache.settings.sources import Held

# What goes into ``user_config``: it may change while models are in memory.
LIVE = ("vram", "ram", "keep_alive", f"{SERVE}.pin")
# Ray's proxies have these.
_OF_PROXIES = (f"{SERVE}.host", f"{SERVE}.port", f"{SERVE}.drain")


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds those of a cluster to the command's parameters.
    """
    add = parser.add_argument_group("on a Ray cluster").add_argument
    add("--ray", action="store_true", help="serve by replicas on Ray Serve")
    add("--ray-address", metavar="ADDRESS", help="of a cluster; else one is started")
    add("--replicas", default="1", metavar="N", help="with models: 4, or 2-8 (1)")
    add("--ingresses", type=int, default=2, metavar="N", help="servers in front (2)")
    add("--gpus", type=float, default=0.0, metavar="N", help="cards of each (0)")
    add("--cpus", type=float, default=1.0, metavar="N", help="processors of each (1)")
    add("--print-config", action="store_true", help="print YAML for `serve deploy`")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """
    Serves as the options say, and returns the exit code.
    """
    if not options.ray:
        if options.print_config:
            raise ValueError("--print-config goes with --ray")
        return command.run(options)
    held = settings_of(options)
    if options.print_config:
        sys.stdout.write(config_of(options, held))
        return 0
    return _serve(options, held)


def _args_of(options: argparse.Namespace, held: Mapping[str, Held]) -> dict[str, Any]:
    """
    Returns what `build` takes for settings that are not as usual.
    """
    said = {
        key.rpartition(".")[2]: each.value
        for key, each in held.items()
        if each.value != SETTINGS[key].default
        # A cache of a server has no queue of its own.
        and key != "max_waiting"
    }
    size = {
        "replicas": options.replicas,
        "ingresses": options.ingresses,
        "gpus": options.gpus,
        "cpus": options.cpus,
    }
    return {**said, **size}


def config_of(options: argparse.Namespace, held: Mapping[str, Held]) -> str:
    """
    Returns a file for ``serve deploy``. A change in ``args`` makes new replicas; one in
    ``user_config`` or in the numbers of replicas leaves those that there are.
    """
    import yaml

    live = {key.rpartition(".")[2]: held[key].value for key in LIVE}
    args = _args_of(options, held)
    for key in (*LIVE, *_OF_PROXIES):
        if key != f"{SERVE}.host":  # which tells the names of the server
            args.pop(key.rpartition(".")[2], None)
    engine: dict[str, Any] = {"name": "engine", "user_config": live}
    if "-" not in options.replicas:
        engine["num_replicas"] = int(options.replicas)
    document = {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": held[f"{SERVE}.host"].value,
            "port": held[f"{SERVE}.port"].value,
        },
        "applications": [
            {
                "name": "whispercache",
                "route_prefix": "/",
                "import_path": "whispercache.ray:build",
                "args": args,
                "deployments": [
                    engine,
                    {"name": "ingress", "num_replicas": options.ingresses},
                ],
            }
        ],
    }
    text: str = yaml.safe_dump(document, sort_keys=False)
    return text


def _serve(options: argparse.Namespace, held: Mapping[str, Held]) -> int:
    try:
        import ray
        from ray import serve

        from .application import build
    except ModuleNotFoundError as missing:
        raise WhisperCacheError(
            f"{missing.name} is missing; pip install 'whispercache[ray]'"
        ) from missing
    # First: nonsense is told before Ray starts.
    app = build(_args_of(options, held))

    host, port = held[f"{SERVE}.host"].value, held[f"{SERVE}.port"].value
    is_local = options.ray_address is None
    if is_local:
        # Ray would try again and again, and keep the reason to its logs.
        models = cast("list[str]", held[f"{SERVE}.models"].value)
        for spec in map(parse_spec, models):
            canonical_model(spec.model)
        # A cluster of one's own tells nobody what runs on it, unless you say so.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local" if is_local else options.ray_address)
    try:
        serve.start(
            proxy_location="EveryNode", http_options={"host": host, "port": port}
        )
        serve.run(app, name="whispercache", route_prefix="/")
        sys.stderr.write(f"whispercache: on Ray, at http://{host}:{port}\n")
        # A cluster that was there goes on without this command.
        if is_local:
            _wait_for_the_end()
            serve.shutdown()
    finally:
        ray.shutdown()
    return 0


def _wait_for_the_end() -> None:
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    signal.signal(signal.SIGINT, lambda *_: over.set())
    over.wait()
