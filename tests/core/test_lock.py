"""
The lock of a cache: effects are performed after it was let go, whatever happens.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from whispercache.core.effects import Stop, WakeAt
from whispercache.core.lock import StateLock

if TYPE_CHECKING:
    from whispercache.core.effects import Effect


class Performed:
    """
    A lock, and the effects that it had performed; each time it must be free.
    """

    def __init__(self) -> None:
        self.lock = StateLock(self.perform)
        self.effects: list[Effect] = []

    def perform(self, effects: list[Effect]) -> None:
        """
        Notes them.
        """
        assert not self.lock.mutex.locked()
        self.effects += effects


@pytest.fixture
def performed() -> Performed:
    """
    Nothing was performed yet.
    """
    return Performed()


def test_effects_are_performed_when_the_lock_was_let_go(performed: Performed) -> None:
    """
    In their order, and not before.
    """
    with performed.lock.changing():
        performed.lock.note(WakeAt(1.0))
        performed.lock.note(Stop())
        assert performed.effects == []
        assert performed.lock.mutex.locked()
    assert performed.effects == [WakeAt(1.0), Stop()]


def test_what_was_noted_before_an_error_is_performed(performed: Performed) -> None:
    """
    What was changed has happened; only the error goes on.
    """
    with suppress(KeyboardInterrupt), performed.lock.changing():
        performed.lock.note(Stop())
        raise KeyboardInterrupt
    assert performed.effects == [Stop()]
    assert not performed.lock.mutex.locked()


def test_what_is_put_off_is_done_by_the_next_holder(performed: Performed) -> None:
    """
    Under the lock, and its effects after that.
    """
    lock = performed.lock

    def change() -> None:
        assert lock.mutex.locked()
        lock.note(Stop())

    with lock.changing():
        lock.later(change)  # as the garbage collector may
        lock.note(WakeAt(1.0))
    assert performed.effects == [WakeAt(1.0), Stop()]
    lock.catch_up()
    assert performed.effects == [WakeAt(1.0), Stop()]


def test_nothing_that_was_put_off_waits_for_the_lock(performed: Performed) -> None:
    """
    Where another thread has it, that one will see to it.
    """
    lock = performed.lock
    lock.later(lambda: lock.note(Stop()))
    with lock.mutex:
        lock.catch_up()
        assert performed.effects == []
    lock.catch_up()
    assert performed.effects == [Stop()]
