"""
The cache of the process, with limits from outside and from `configure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from whispercache import ModelTooLarge, configure, default, default_cache, get_model
from whispercache.testing import check, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache import ModelCache
    from whispercache.testing import FakeClock, FakeLoader, FakeMachine

GIB = 1024**3


@pytest.fixture(autouse=True)
def _unused(
    monkeypatch: pytest.MonkeyPatch,
    loader: FakeLoader,
    machine: FakeMachine,
    clock: FakeClock,
) -> Iterator[None]:
    """
    A process in which nobody has used it yet, on the fakes.
    """
    monkeypatch.setattr(default, "_default", None)
    parts = {"loader": loader, "probe": machine, "clock": clock}
    monkeypatch.setattr(default, "_configured", parts)
    yield
    if default._default is not None:
        check(default._default)
        default._default.close()


def capacities(cache: ModelCache) -> dict[str, int]:
    """
    The bytes that a cache may use of each device that it has used.
    """
    return {each.device: each.capacity_bytes for each in cache.devices()}


def test_its_limits_come_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    What is too large for them is refused, as by a limit of one's own.
    """
    monkeypatch.setenv("WHISPERCACHE_RAM", "3GiB")
    with get_model("small", "cpu").lease():
        pass
    with pytest.raises(ModelTooLarge):
        get_model("large-v3", "cpu").lease()


def test_its_limits_come_from_a_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    clock: FakeClock,
) -> None:
    """
    That of ``WHISPERCACHE_CONFIG``, where no command line can name one.
    """
    file = tmp_path_factory.mktemp("etc") / "limits.toml"
    file.write_text('keep_alive = "1m"\nvram = {"cuda:0" = "3GiB"}', encoding="utf-8")
    monkeypatch.setenv("WHISPERCACHE_CONFIG", str(file))
    cache = default_cache()
    cache.preload("small", "cuda:0")
    assert capacities(cache)["cuda:0"] == 3 * GIB
    clock.tick(59)
    settle(cache)
    assert cache.models()
    clock.tick(1)
    settle(cache)
    assert not cache.models()


def test_nonsense_outside_is_told_at_the_first_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Importing the package reads nothing; once mended, the next use works.
    """
    monkeypatch.setenv("WHISPERCACHE_KEEPALIVE", "1m")
    with pytest.raises(ValueError, match="did you mean WHISPERCACHE_KEEP_ALIVE"):
        get_model("small", "cpu")
    monkeypatch.delenv("WHISPERCACHE_KEEPALIVE")
    assert get_model("small", "cpu")


def test_a_program_wins_over_what_is_said_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    And leaves alone what it does not name; a later call adds to an earlier one.
    """
    monkeypatch.setenv("WHISPERCACHE_RAM", "3GiB")
    monkeypatch.setenv("WHISPERCACHE_VRAM", "4GiB")
    configure(ram="20GiB")
    configure(max_models=1)
    cache = default_cache()
    cache.preload("tiny", "cpu")
    cache.preload("base", "cpu")
    assert len(cache.models()) == 1
    cache.preload("tiny", "cuda:0")
    assert capacities(cache) == {"cpu": 20 * GIB, "cuda:0": 4 * GIB}


def test_once_it_is_in_use_nothing_can_be_configured() -> None:
    """
    A limit that came too late must not look as if it held.
    """
    default_cache()
    with pytest.raises(RuntimeError, match="in use already"):
        configure(ram="1GiB")
    default_cache().close()
    configure(ram="3GiB")
    with pytest.raises(ModelTooLarge):
        default_cache().preload("large-v3", "cpu")


def test_what_is_configured_is_checked_at_once() -> None:
    """
    Where the line is that said it; nothing of it holds then.
    """
    with pytest.raises(TypeError, match="no setting vrm; did you mean vram"):
        configure(vrm="1GiB")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="ram must be an amount"):
        configure(max_models=1, ram="lots")
    with pytest.raises(TypeError, match="max_models must be a whole number"):
        configure(max_models="two")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither a compute type"):
        configure(fallback=["int9"])
    for name in ("keep_alive", "patience_s", "pressure"):
        nothing: Any = {name: None}
        with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
            configure(**nothing)
    assert "max_models" not in default._configured


def test_words_mean_what_they_mean_in_a_file() -> None:
    """
    A program may pass on what it read in a configuration of its own.
    """
    configure(coordinate="off", max_models="2", fallback="int8, cpu")  # type: ignore[arg-type]
    assert default._configured["coordinate"] is False
    assert default._configured["max_models"] == 2
    assert default._configured["fallback"] == ["int8", "cpu"]


def test_all_that_a_model_cache_takes_can_be_configured(clock: FakeClock) -> None:
    """
    Functions, tuples, mappings and None, which no file could say.
    """
    configure(
        vram={"cuda:0": 0.5},
        ram=None,
        max_models=None,
        policy=lambda _model, now_s: now_s,
        fallback=("int8", "cpu"),
        variants=False,
        clock=clock,
    )
    default_cache().preload("tiny", "cuda:0")
    assert capacities(default_cache())["cuda:0"] < 10 * GIB
