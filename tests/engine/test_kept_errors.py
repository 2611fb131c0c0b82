"""
Errors that a program keeps, with the frames of all that ran: they hold no model.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from real import SILENCE, clip, micro, micro_copy, model_of

from whispercache import (
    AsyncModelCache,
    CorruptModel,
    ModelCache,
    ModelStillReferenced,
)
from whispercache.engine.construct import genuine
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from whispercache.events import Event


class Strict(ModelCache):
    """
    A cache that must let go of all that it unloads.
    """

    def __init__(self) -> None:
        super().__init__(variants=False)
        self._found: list[Event] = []
        self.subscribe(self._found.append)

    def evict_one(self) -> None:
        """
        Unload the one model there is.
        """
        assert not self.stats().leases
        assert self.evict() == 1
        kept = [each for each in self._found if isinstance(each, ModelStillReferenced)]
        assert not kept


@pytest.fixture
def cache() -> Iterator[Strict]:
    """
    A strict one.
    """
    with Strict() as cache:
        yield cache


def broken(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """
    Break a method of faster-whisper's models.
    """

    def fail(self: object, *_args: object, **_options: object) -> None:
        raise RuntimeError(f"{name} of {type(self).__name__} is broken")

    monkeypatch.setattr(genuine().model, name, fail)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("transcribe", None),
        ("encode", None),
        ("generate_with_fallback", None),
        ("encode", 2),
    ],
)
def test_an_error_of_a_call_may_be_kept(
    cache: Strict, monkeypatch: pytest.MonkeyPatch, name: str, batch_size: int | None
) -> None:
    """
    Of the call, or of its segments.
    """
    model = model_of(cache, micro())
    broken(monkeypatch, name)
    kept = []
    for language in (None, "en"):
        with pytest.raises(RuntimeError, match="is broken") as caught:
            list(
                model.transcribe(
                    clip("en-bread"), language=language, batch_size=batch_size
                )[0]
            )
        kept.append(caught)
        cache.evict_one()


def test_an_error_within_a_lease_may_be_kept(
    cache: Strict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    With the frame in which the model has a name.
    """
    broken(monkeypatch, "encode")

    def use() -> None:
        with model_of(cache, micro()).lease() as whisper:
            list(whisper.transcribe(SILENCE)[0])

    kept = None
    try:
        use()
    except RuntimeError as error:
        kept = error
    cache.evict_one()
    assert kept is not None


def test_an_error_of_an_awaited_call_may_be_kept(
    cache: Strict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    With its task.
    """
    broken(monkeypatch, "encode")

    async def use(language: str | None) -> asyncio.Future[None]:
        shared = AsyncModelCache(cache)
        model = await shared.get_model(str(micro()), "cpu", cpu_threads=1)

        async def call() -> None:
            segments, _ = await model.transcribe(SILENCE, language=language)
            async for _ in segments:
                pass

        task = asyncio.ensure_future(call())
        await asyncio.wait((task,))
        cache.evict_one()
        return task

    for language in (None, "en"):
        task = asyncio.run(use(language))
        assert "is broken" in str(task.exception())


def test_a_call_that_was_cancelled_holds_nothing(cache: Strict) -> None:
    """
    Nor does the iterator that was dropped in the middle, or kept at its end.
    """

    async def use() -> list[object]:
        shared = AsyncModelCache(cache)
        model = await shared.get_model(str(micro()), "cpu", cpu_threads=1)
        task = asyncio.ensure_future(model.transcribe(SILENCE))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        segments, _ = await model.transcribe(SILENCE)
        await anext(segments)
        await segments.aclose()
        return [task, segments]

    kept = asyncio.run(use())
    wait_until(lambda: not cache.stats().leases, "the end of the cancelled call")
    cache.evict_one()
    assert kept


def test_an_error_of_a_raw_call_may_be_kept(cache: Strict, tmp_path: Path) -> None:
    """
    Of CTranslate2's own methods, through a model that was put in the place of another.
    """
    directory = micro_copy(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["alignment_heads"] = []
    (directory / "config.json").write_text(json.dumps(config))
    model: Any = model_of(cache, directory)
    features = model.encode(np.zeros((80, 3000), np.float32))
    kept = []
    for asked, error in (([1], CorruptModel), (["nonsense"], TypeError)):
        name = "align" if error is CorruptModel else "detect_language"
        with pytest.raises(error) as caught:
            getattr(model.model, name)(features, asked, [[2]], 100)
        kept.append(caught)
    with pytest.raises(CorruptModel, match="alignment_heads") as caught:
        list(model.transcribe(SILENCE, word_timestamps=True)[0])
    kept.append(caught)
    del features
    cache.evict_one()
