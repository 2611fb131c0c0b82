"""
The real clock, and the permanent thread of a device.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref

import pytest

from whispercache.core.threads import DeviceThread, MonotonicClock
from whispercache.testing import wait_until


def test_timed_calls_run_in_the_order_of_their_times() -> None:
    """
    Not in the order in which they were made.
    """
    clock = MonotonicClock()
    ran: list[str] = []
    done = threading.Event()
    start_s = clock.now()
    clock.call_at(math.inf, lambda: ran.append("never"))
    clock.call_at(start_s + 0.04, done.set)
    clock.call_at(start_s + 0.03, lambda: ran.append("third"))
    clock.call_at(start_s + 0.02, lambda: ran.append("second"))
    clock.call_at(start_s - 1, lambda: ran.append("first"))
    assert done.wait(10)
    assert clock.now() >= start_s + 0.04
    assert ran == ["first", "second", "third"]
    clock.close()


def test_a_timed_call_that_fails_does_not_stop_the_clock(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    It is logged.
    """
    clock = MonotonicClock()
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("out of order")

    clock.call_at(clock.now(), fail)
    clock.call_at(clock.now(), done.set)
    assert done.wait(10)
    assert "out of order" in caplog.text
    clock.close()


def test_a_clock_whose_thread_did_not_start_starts_it_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A process may be out of threads for a moment.
    """
    clock, called = MonotonicClock(), threading.Event()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            clock.call_at(clock.now(), called.set)
    clock.call_at(clock.now(), called.set)
    assert called.wait(3)
    clock.close()


def test_a_closed_clock_forgets_its_calls_and_ends_its_thread() -> None:
    """
    Closing one that never began is fine too.
    """
    MonotonicClock().close()
    clock = MonotonicClock()
    ran: list[int] = []
    clock.call_at(clock.now() + 3600, lambda: ran.append(1))
    thread = clock._thread
    assert thread is not None
    clock.close()
    thread.join(10)
    assert not thread.is_alive()
    clock.call_at(clock.now(), lambda: ran.append(2))
    assert clock._thread is thread
    assert not ran


def test_a_device_thread_works_in_order_and_survives_failures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    It ends when it is told to, after all that was submitted before.
    """
    thread = DeviceThread("cuda:7")
    ran: list[object] = []

    def fail() -> None:
        ran.append("fails")
        raise RuntimeError("the card fell off")

    thread.submit(fail)
    thread.submit(lambda: ran.append(threading.current_thread().name))
    thread.submit(lambda: thread.join(10))
    thread.stop()
    thread.join(10)
    assert ran == ["fails", "whispercache-cuda:7"]
    assert "the card fell off" in caplog.text


def test_a_device_thread_keeps_nothing_alive_between_calls() -> None:
    """
    A model that it handled last must not outlive its unload.
    """

    class Model:
        def unload(self) -> None:
            logging.getLogger("test").debug("unloaded")

    thread = DeviceThread("cpu")
    model = Model()
    alive = weakref.ref(model)
    thread.submit(model.unload)
    del model
    wait_until(lambda: alive() is None, "the end of the model")
    thread.stop()
    thread.join(10)
