"""
Priority in the scheduler: who goes first, who is asked for a lease, and for how long.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import pytest
from test_scheduler import KEPT, World

from whispercache.core.effects import AskBack, Settle
from whispercache.core.entries import State
from whispercache.core.waiters import Waiter, Wanted
from whispercache.engine.api import Released
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.options import PATIENCE_S
from whispercache.planning.policies import Resident
from whispercache.planning.priority import LEVEL_S, parse_priority

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache.core.entries import Entry
    from whispercache.lease import Lease


class Night(World):
    """
    A card with room for ten, people and batches.
    """

    def want(
        self, *entries: Entry, level: float = 0.0, resumes: bool = False
    ) -> Waiter:
        """
        Returns a request, queued.
        """
        wanted = tuple(Wanted(entry, DEFAULT_WORKLOAD) for entry in entries)
        waiter = Waiter(wanted, None, self.now_s, None, priority=level, resumes=resumes)
        self.scheduler.enqueue(waiter, None)
        return waiter

    def batch(self, name: str, weights: int) -> Entry:
        """
        Returns a model that a batch works on.
        """
        entry = self.held(name, weights)
        (serial,) = entry.leases
        self.held_leases.offer(entry, serial, -1.0)
        return entry

    def is_asked(self, entry: Entry, level: float = -1.0) -> bool:
        """
        Whether the one lease on a model is asked for.
        """
        (serial,) = entry.leases
        return self.held_leases.is_asked(entry, serial, level)

    def leases(self) -> list[Lease]:
        """
        Returns the leases that were granted since.
        """
        return [lease for each in self.of(Settle) for lease in each.leases]

    def names(self) -> list[str]:
        """
        Returns the models that are waited for, in the order of the line.
        """
        return [waiter.entries[0].key.model for waiter in self.state.queue]


@pytest.fixture
def night() -> Iterator[Night]:
    """
    A scheduler whose books agree in the end.
    """
    made = Night()
    yield made
    made.scheduler.check()
    for entry in made.state.entries.values():
        made.release(entry)


def test_people_wait_before_batches_of_the_last_minute(night: Night) -> None:
    """
    The order of two never changes.
    """
    night.held("all", 10)
    for name, level in (("film", -1.0), ("talk", 0.0), ("archive", -2.0)):
        night.want(night.model(name, 10), level=level)
    assert night.names() == ["talk", "film", "archive"]
    night.now_s += LEVEL_S + 1
    night.want(night.model("late", 10))
    assert night.names() == ["talk", "film", "late", "archive"]


def test_a_clock_that_is_set_back_changes_no_order(night: Night) -> None:
    """
    Among equals it is that of arrival.
    """
    night.held("all", 10)
    night.want(night.model("first", 10))
    night.now_s -= 30
    night.want(night.model("second", 10))
    assert night.names() == ["first", "second"]


def test_a_batch_that_goes_on_comes_before_those_that_begin(night: Night) -> None:
    """
    But after people, and after those that have waited for long enough.
    """
    night.held("all", 10)
    night.want(night.model("film", 10), level=-1.0)
    night.now_s += 10
    night.want(night.model("stopped", 10), level=-1.0, resumes=True)
    night.want(night.model("talk", 10))
    assert night.names() == ["talk", "stopped", "film"]
    night.now_s += LEVEL_S
    night.want(night.model("again", 10), level=-1.0, resumes=True)
    assert night.names() == ["talk", "stopped", "film", "again"]


def test_a_person_asks_a_batch_for_its_memory_at_once(night: Night) -> None:
    """
    And a batch asks none, nor does anybody ask a lease that is not offered.
    """
    film = night.batch("film", 10)
    night.want(night.model("other film", 10), level=-1.0)
    assert not night.is_asked(film)
    assert not night.of(AskBack)
    talk = night.want(night.model("talk", 10))
    assert night.is_asked(film)
    assert [each.serials for each in night.of(AskBack)] == [tuple(film.leases)]
    night.release(film)
    assert film.state is State.UNLOADING
    assert not film.yielding
    assert talk in night.state.queue


def test_nobody_is_asked_in_vain(night: Night) -> None:
    """
    As long as others hold more than the batch could give; and then it is.
    """
    film, held = night.batch("film", 5), night.held("held", 4)
    night.want(night.model("talk", 9))
    assert not night.is_asked(film)
    night.release(held)
    assert night.is_asked(film)


def test_a_lease_that_is_offered_later_is_asked_for_at_once(night: Night) -> None:
    """
    Nothing else has to happen.
    """
    film = night.held("film", 10)
    night.want(night.model("talk", 10))
    (serial,) = film.leases
    assert not night.is_asked(film)
    night.held_leases.offer(film, serial, -1.0)
    assert night.is_asked(film)


def test_who_shares_the_load_of_a_batch_lends_it_its_priority(night: Night) -> None:
    """
    Or a person would wait as long as the batch whose load it shares.
    """
    film, wanted = night.batch("film", 10), night.model("wanted", 10)
    night.want(wanted, level=-1.0)
    night.now_s += LEVEL_S + 1
    night.state.impatient_at_s = math.inf
    assert not night.is_asked(film)
    person = night.want(wanted)
    assert night.is_asked(film)
    night.scheduler.abandon(person)
    night.scheduler.admit()


def test_a_batch_that_waited_for_long_is_asked_only_by_the_impatient(
    night: Night,
) -> None:
    """
    It gets on for some seconds at least, however many people come.
    """
    film = night.model("film", 10)
    held = night.held("held", 10)
    night.want(film, level=-1.0)
    night.now_s += LEVEL_S + 1
    night.release(held)
    night.reports.unloaded(held, Released(confirmed=True), KEPT)
    night.load(film)
    (lease,) = night.leases()
    assert lease.is_firm
    serial = lease._serial
    night.held_leases.offer(film, serial, math.inf)
    night.want(night.model("talk", 10))
    assert not night.is_asked(film)
    # Its patience ends without any other event.
    night.now_s += PATIENCE_S
    night.ticks.tick(night.state.wake_at_s)
    assert night.is_asked(film)


def test_what_is_asked_ends_with_the_one_that_asks(night: Night) -> None:
    """
    One that gives up asks for nothing any more.
    """
    film = night.batch("film", 10)
    talk = night.want(night.model("talk", 10))
    assert night.is_asked(film)
    night.scheduler.abandon(talk)
    assert not night.is_asked(film)


def test_a_full_queue_refuses_no_second_half(night: Night) -> None:
    """
    A batch that gave its memory away gets its place.
    """
    night.held("all", 10)
    night.scheduler._rules = cast(
        "Any", type(night.scheduler._rules)(**{**rules_of(night), "max_waiting": 1})
    )
    night.want(night.model("one", 10))
    night.want(night.model("stopped", 10), level=-1.0, resumes=True)
    assert night.names() == ["one", "stopped"]


def rules_of(night: Night) -> dict[str, Any]:
    """
    Returns the rules as parameters.
    """
    rules = night.scheduler._rules
    return {name: getattr(rules, name) for name in rules.__dataclass_fields__}


@pytest.mark.parametrize(
    ("value", "level"),
    [("interactive", 0), ("batch", -1), (3, 3), (-0.5, -0.5), ("-2", -2)],
)
def test_priorities_are_names_or_numbers(value: object, level: float) -> None:
    """
    Numbers as text, too: settings come as text.
    """
    assert parse_priority(value) == level


@pytest.mark.parametrize("value", ["soon", "nan", math.inf, "-inf", True, None, []])
def test_other_priorities_are_refused(value: object) -> None:
    """
    With the name of the parameter.
    """
    with pytest.raises((TypeError, ValueError), match=r"^priority must be"):
        parse_priority(value)


def test_policies_of_users_may_still_make_residents() -> None:
    """
    What was added to them has a default.
    """
    assert Resident(cast("Any", None), "cpu", 1, 0.0, 0.0, 1.0).yields_to == math.inf
