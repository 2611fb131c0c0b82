"""
The command ``whispercache serve --ray``, without a cluster.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import yaml

from whispercache.cli.main import main
from whispercache.console import WRONG_USE


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """
    The configuration that the command prints.
    """
    assert main(["serve", *arguments, "--ray", "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """
    What may change without new replicas is apart from what may not.
    """
    arguments = (
        *("base", "tiny:int8", "--device", "cuda", "--gpus", "1", "--replicas", "4"),
        *("--vram", "20GiB", "--pin", "base", "--port", "9000", "--timeout", "2m"),
    )
    found = printed(capsys, *arguments)
    assert found["http_options"] == {"host": "127.0.0.1", "port": 9000}
    (application,) = found["applications"]
    engine, ingress = application["deployments"]
    assert engine["num_replicas"] == 4
    assert engine["user_config"] == {
        "vram": "20GiB",
        "ram": "auto",
        "keep_alive": "5m",
        "pin": ["base"],
    }
    assert ingress == {"name": "ingress", "num_replicas": 2}
    assert application["args"] == {
        "models": ["base", "tiny:int8"],
        "device": "cuda",
        "timeout": "2m",
        "replicas": "4",
        "ingresses": 2,
        "gpus": 1.0,
        "cpus": 1.0,
    }
    if importlib.util.find_spec("ray"):
        from whispercache.ray import build

        assert build(application["args"]) is not None


def test_a_range_of_replicas_is_left_to_the_policy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    A number of them would be a second opinion.
    """
    found = printed(capsys, "base", "--replicas", "2-8")
    engine, _ = found["applications"][0]["deployments"]
    assert "num_replicas" not in engine
    assert found["applications"][0]["args"]["replicas"] == "2-8"


def test_options_of_a_cluster_want_one(capsys: pytest.CaptureFixture[str]) -> None:
    """
    Otherwise they would do nothing.
    """
    assert main(["serve", "base", "--print-config"]) == WRONG_USE
    assert "--ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": "base"}, "list of models"),
        ({"models": ["base"], "replicas": 0}, "there must be"),
        ({"models": ["base"], "replicas": (3, 2)}, "there must be"),
        ({"models": ["base"], "vramm": "1GiB"}, "vram"),
        ({"models": ["base"], "vram": "much"}, "vram"),
        ({"models": ["base"], "pin": ["tiny"]}, "tiny is not among"),
    ],
)
def test_nonsense_is_told_before_anything_starts(
    given: dict[str, Any], message: str
) -> None:
    """
    In the words of the settings.
    """
    pytest.importorskip("ray.serve", reason="this needs the extra [ray]")
    from whispercache.ray import deployment

    with pytest.raises((TypeError, ValueError), match=message):
        deployment(**given)


def test_messages_that_grpc_would_cut_off_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A minute of audio is too long for it.
    """
    pytest.importorskip("ray.serve", reason="this needs the extra [ray]")
    from whispercache.ray import deployment

    monkeypatch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    with pytest.raises(ValueError, match="4 MiB"):
        deployment(["base"])
