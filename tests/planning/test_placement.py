"""
Placement: which of several cards a model goes to that was asked for on "cuda".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whispercache import (
    DeviceUnavailable,
    LoadFailed,
    ModelTooLarge,
    UnsupportedComputeType,
)
from whispercache.engine.naming import ModelSpec
from whispercache.planning.placement import Candidate, choose
from whispercache.server.local import LocalEngine
from whispercache.server.offers import Offers
from whispercache.testing import FakeLoader, FakeMachine, settle, wait_until

if TYPE_CHECKING:
    from conftest import MakeCache
    from driver import Driver

    from whispercache import ModelCache
    from whispercache.testing import FakeClock

GIB = 1024**3
ILLEGAL = "CUDA failed with error an illegal memory access was encountered"


def places(cache: ModelCache) -> list[str]:
    """
    The models that are in memory, or on their way, and where.
    """
    return sorted(f"{info.key.model}@{info.key.device}" for info in cache.models())


# The choice itself --------------------------------------------------------------------


def card(number: int, free: int, **facts: int) -> Candidate:
    """
    A card of ten bytes that are all to be had, for a model of three.
    """
    return Candidate(
        f"cuda:{number}",
        needed_bytes=facts.get("needed", 3),
        free_bytes=free,
        idle_bytes=facts.get("idle", 0),
        ceiling_bytes=facts.get("ceiling", 10),
        free_models=facts.get("free_models", 1),
        idle_models=facts.get("idle_models", 0),
        is_there=bool(facts.get("is_there")),
        leases=facts.get("leases", 0),
        has_copy=bool(facts.get("has_copy")),
    )


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        pytest.param([card(0, 5), card(1, 6)], 1, id="most-room"),
        pytest.param([card(0, 5), card(1, 5)], 0, id="the-first-of-equals"),
        pytest.param([card(0, 2, idle=8), card(1, 3)], 1, id="nobody-has-to-leave"),
        pytest.param([card(0, 2), card(1, 0, idle=3)], 1, id="nobody-has-to-wait"),
        pytest.param([card(0, 0, idle=4), card(1, 1, idle=4)], 1, id="idle-room"),
        pytest.param([card(0, 9, free_models=0), card(1, 3)], 1, id="may-take-no-more"),
        pytest.param(
            [card(0, 9, free_models=0), card(1, 3, free_models=0, idle_models=1)],
            1,
            id="one-leaves-for-one",
        ),
        pytest.param([card(0, 9), card(1, 0, is_there=1)], 1, id="where-it-is"),
        pytest.param(
            [card(0, 9, is_there=1, leases=2), card(1, 0, is_there=1, leases=1)],
            1,
            id="where-fewer-hold-it",
        ),
        pytest.param([card(0, 9), card(1, 3, has_copy=1)], 1, id="its-copy"),
        pytest.param(
            [card(0, 3), card(1, 2, idle=9, has_copy=1)], 0, id="no-copy-for-others"
        ),
        pytest.param([card(0, 2, ceiling=2), card(1, 0)], 1, id="large-enough"),
    ],
)
def test_the_best_card_is_chosen(candidates: list[Candidate], chosen: int) -> None:
    """
    Where the model is; where nobody waits, nobody leaves, nothing is read; most room.
    """
    assert choose(candidates) == candidates[chosen]


def test_no_card_is_chosen_that_can_never_hold_it() -> None:
    """
    Nor one of none.
    """
    assert choose([card(0, 2, ceiling=2), card(1, 1, ceiling=1)]) is None
    assert choose([]) is None


CARDS = st.lists(
    st.builds(
        card,
        st.integers(0, 3),
        st.integers(-3, 9),
        idle=st.integers(0, 9),
        ceiling=st.integers(0, 10),
        is_there=st.integers(0, 1),
        leases=st.integers(0, 2),
        has_copy=st.integers(0, 1),
    ),
    max_size=4,
)


@given(CARDS)
def test_the_choice_is_never_worse_than_another(cards: list[Candidate]) -> None:
    """
    Nobody is made to leave, or to wait, where another card spares that.
    """
    found = choose(cards)
    there = [each for each in cards if each.is_there]
    able = [each for each in cards if each.needed_bytes <= each.ceiling_bytes]
    if found is None:
        assert not there
        assert not able
    elif there:
        assert found in there
        assert found.leases == min(each.leases for each in there)
    else:
        assert found in able
        at_once = [each for each in able if each.needed_bytes <= each.free_bytes]
        assert found in at_once or not at_once
        most_bytes = max(each.free_bytes + each.idle_bytes for each in able)
        fits = found.needed_bytes <= found.free_bytes + found.idle_bytes
        assert fits or most_bytes < found.needed_bytes


@given(CARDS)
def test_the_order_of_the_cards_decides_only_between_equals(
    cards: list[Candidate],
) -> None:
    """
    From the back, the choice is as good.
    """
    one, other = choose(cards), choose(cards[::-1])
    assert (one is None) is (other is None)
    if one is not None and other is not None and not one.is_there:
        assert one.room == other.room


# Through the cache --------------------------------------------------------------------


def test_cuda_is_the_card_with_the_most_room(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The first goes to the large card, the next to the one that has more left then.
    """
    cache = make_cache()
    with driver.lease(cache, "large-v3", "cuda"):
        driver.lease(cache, "small", "cuda").release()
    assert places(cache) == ["large-v3@cuda:0", "small@cuda:1"]


def test_a_model_is_found_where_it_is(make_cache: MakeCache, driver: Driver) -> None:
    """
    It is on the small card; "cuda" and "auto" mean that one.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda:1").release()
    for device in ("cuda", "auto", "cuda"):
        with driver.lease(cache, "base", device) as whisper:
            assert whisper.key.device == "cuda:1"
    assert cache.stats().loads == 1


def test_a_model_is_joined_where_it_is_loading(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Who asks for it meanwhile shares the load.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        first = driver.start(cache, "lease", "base", "cuda:1")
        gate.wait_reached()
        second = driver.waiting(cache, "base", "cuda")
        gate.open()
        leases = [first.result(10), second.result(10)]
    assert [lease.key.device for lease in leases] == ["cuda:1", "cuda:1"]
    assert loader.loads == {"base": 1}
    for lease in leases:
        lease.release()


def test_a_card_that_is_named_is_obeyed(make_cache: MakeCache, driver: Driver) -> None:
    """
    By its number in either place, even if another has more room or has the model.
    """
    cache = make_cache()
    driver.lease(cache, "tiny", "cuda:1").release()
    driver.lease(cache, "base", "cuda", device_index=1).release()
    assert places(cache) == ["base@cuda:1", "tiny@cuda:1"]
    driver.lease(cache, "tiny", "cuda", device_index=0).release()
    assert places(cache) == ["base@cuda:1", "tiny@cuda:0", "tiny@cuda:1"]


def test_auto_with_an_index_is_that_card_or_the_cpu(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Not another card, which may have more room or the model.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda:1").release()
    for index in (0, [0]):
        driver.lease(cache, "base", "auto", device_index=index).release()
    assert places(cache) == ["base@cuda:0", "base@cuda:1"]
    with pytest.raises(DeviceUnavailable):
        driver.lease(cache, "base", "auto", device_index=5)


def test_auto_with_an_index_and_no_room_there_is_the_cpu(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Also where there is no card at all.
    """
    cache = make_cache(vram={"cuda:1": "100MiB"})
    driver.lease(cache, "base", "auto", device_index=1).release()
    assert places(cache) == ["base@cpu"]
    machine = FakeMachine({"cpu": "8GiB"})
    cache = make_cache(loader=FakeLoader(machine), probe=machine)
    driver.lease(cache, "base", "auto", device_index=1).release()
    assert places(cache) == ["base@cpu"]


def test_a_lost_card_is_passed_over(
    make_cache: MakeCache,
    loader: FakeLoader,
    driver: Driver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    The next request goes to the other card, and it is said why.
    """
    cache = make_cache()
    loader.fail_loads["tiny"] = [RuntimeError(ILLEGAL)]
    with pytest.raises(LoadFailed):
        driver.lease(cache, "tiny", "cuda")
    with driver.lease(cache, "tiny", "cuda") as whisper:
        assert whisper.key.device == "cuda:1"
    assert "passing over cuda:0, which was lost" in caplog.text


def test_a_hit_of_a_lost_card_is_passed_over(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A model is not had from a lost card, though it was there and was asked for before.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda").release()
    loader.fail_loads["tiny"] = [RuntimeError(ILLEGAL)]
    with pytest.raises(LoadFailed):
        driver.lease(cache, "tiny", "cuda:0")
    with driver.lease(cache, "base", "cuda") as whisper:
        assert whisper.key.device == "cuda:1"


def test_a_card_without_a_reading_is_passed_over(
    make_cache: MakeCache,
    machine: FakeMachine,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    A gauge that fails takes its card out of the choice, not the request.
    """
    read = FakeMachine.read

    def fails(self: FakeMachine, device: str) -> object:
        if device == "cuda:0":
            raise DeviceUnavailable(device, "it fell off the bus")
        return read(self, device)

    monkeypatch.setattr(FakeMachine, "read", fails)
    cache = make_cache(probe=machine)
    with driver.lease(cache, "tiny", "cuda") as whisper:
        assert whisper.key.device == "cuda:1"
    assert "passing over cuda:0" in caplog.text
    assert "it fell off the bus" in caplog.text


@pytest.fixture
def _old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The large card computes in float32 only.
    """
    typical = FakeLoader.supported_compute_types

    def supported(self: FakeLoader, device: str) -> frozenset[str]:
        if device == "cuda:0":
            return frozenset({"float32"})
        return typical(self, device)

    monkeypatch.setattr(FakeLoader, "supported_compute_types", supported)


@pytest.mark.usefixtures("_old_card")
def test_a_card_without_the_type_is_passed_over(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    In the type that was asked for; by default a card may use its own.
    """
    cache = make_cache()
    driver.lease(cache, "tiny", "cuda", "float16").release()
    driver.lease(cache, "base", "cuda").release()
    found = {str(info.key) for info in cache.models()}
    assert found == {"tiny/cuda:1/float16", "base/cuda:0/float32"}


def test_a_type_that_no_card_has_is_told(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    """
    The error is that of the first card.
    """
    cache = make_cache()
    monkeypatch.setattr(
        FakeLoader, "supported_compute_types", lambda *_: frozenset({"float32"})
    )
    with pytest.raises(UnsupportedComputeType, match="cuda:0"):
        driver.lease(cache, "tiny", "cuda", "float16")


def test_a_model_may_return_to_another_card(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    Once it has left, the room decides anew; the hits that follow find it there.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda").release()
    assert places(cache) == ["base@cuda:0"]
    cache.evict("base")
    machine.others("cuda:0", "8GiB")
    for _ in range(2):
        driver.lease(cache, "base", "cuda").release()
    assert places(cache) == ["base@cuda:1"]
    stats = cache.stats()
    assert (stats.loads, stats.hits, stats.misses) == (2, 1, 2)


def test_who_names_a_card_moves_the_hits_of_who_does_not(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    A model that left one card and was asked for on another is a hit there.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda").release()
    cache.evict("base")
    driver.lease(cache, "base", "cuda:1").release()
    driver.lease(cache, "base", "cuda").release()
    assert places(cache) == ["base@cuda:1"]
    assert cache.stats().loads == 2


def test_evicting_from_cuda_means_all_cards(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    And not the CPU; a number means that card.
    """
    cache = make_cache()
    for device in ("cpu", "cuda:0", "cuda:1"):
        driver.lease(cache, "tiny", device).release()
    assert driver.call(cache, "evict", "tiny", "cuda") == 2
    assert places(cache) == ["tiny@cpu"]
    for device in ("cuda:0", "cuda:1"):
        driver.lease(cache, "tiny", device).release()
    assert driver.call(cache, "evict", "tiny", "cuda:0") == 1
    assert places(cache) == ["tiny@cpu", "tiny@cuda:1"]


def test_a_group_is_spread_where_one_card_cannot_hold_it(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Each of two models sees what the other one will take.
    """
    cache = make_cache()
    pair = [("large-v3", "cuda"), ("large-v3", "cuda", "int8")]
    leases = driver.call(cache, "lease_many", pair)
    assert sorted(lease.key.device for lease in leases) == ["cuda:0", "cuda:1"]
    leases.release()


def test_a_group_does_not_push_out_its_own(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    An idle model that the group wants as well gives no room to the other.
    """
    cache = make_cache()
    driver.lease(cache, "large-v3", "cuda:0").release()
    with driver.lease(cache, "small", "cuda:1"):
        wanted = [("large-v3", "cuda"), ("medium", "cuda"), ("tiny", "cuda")]
        leases = driver.call(cache, "lease_many", wanted)
        assert cache.stats().loads == 4
        leases.release()


def test_a_copy_is_preferred_where_nobody_has_to_leave(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A model returns to the card that its copy is for, though the other has more room.
    """
    cache = make_cache(park=True)
    driver.lease(cache, "medium", "cuda:1", keep_alive=0).release()
    settle(cache)
    assert [key.device for key in loader.host_copies()] == ["cuda:1"]
    driver.lease(cache, "medium", "cuda").release()
    assert places(cache) == ["medium@cuda:1"]
    assert cache.stats().restores == 1


def test_a_copy_is_left_where_others_would_have_to_leave(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    A read from the disk costs less than what another model's return would.
    """
    cache = make_cache(park=True)
    driver.lease(cache, "medium", "cuda:1", keep_alive=0).release()
    driver.lease(cache, "large-v3", "cuda:1").release()
    driver.lease(cache, "medium", "cuda").release()
    assert places(cache) == ["large-v3@cuda:1", "medium@cuda:0"]
    assert cache.stats().restores == 0


def test_two_cards_load_at_the_same_time(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A load is reached on one card while that of the other one is held.
    """
    cache = make_cache()
    with (
        loader.holding_loads("large-v3") as one,
        loader.holding_loads("medium") as other,
    ):
        asked = [
            driver.waiting(cache, "large-v3", "cuda"),
            driver.waiting(cache, "medium", "cuda"),
        ]
        one.wait_reached()
        other.wait_reached()
        assert places(cache) == ["large-v3@cuda:0", "medium@cuda:1"]
        other.open()
        asked[1].result(10).release()
        assert not asked[0].done()
        one.open()
        asked[0].result(10).release()


def test_an_error_names_the_largest_card(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Where none can hold a model, the best of them says what it lacks.
    """
    cache = make_cache()
    loader.sizes = {"large-v3": "20GiB"}
    with pytest.raises(ModelTooLarge) as caught:
        driver.lease(cache, "large-v3", "cuda")
    assert caught.value.device == "cuda:0"
    cache.resize(vram={"cuda:0": "2GiB"})
    with pytest.raises(ModelTooLarge) as caught:
        driver.lease(cache, "large-v3", "cuda")
    assert caught.value.device == "cuda:1"


def test_auto_takes_the_host_where_no_card_can_hold_it(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Though it would be slower.
    """
    cache = make_cache()
    loader.sizes = {"large-v3": "20GiB"}
    with driver.lease(cache, "large-v3", "auto") as whisper:
        assert whisper.key.device == "cpu"


def test_a_machine_without_cards_says_so(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    "cuda" is then as wrong as "cuda:0".
    """
    machine = FakeMachine({"cpu": "8GiB"})
    cache = make_cache(loader=FakeLoader(machine), probe=machine, clock=clock)
    with pytest.raises(DeviceUnavailable, match="cuda:0"):
        driver.lease(cache, "tiny", "cuda")


def test_any_card_will_do_as_a_fallback(make_cache: MakeCache, driver: Driver) -> None:
    """
    What the named card cannot hold goes to the one that can.
    """
    cache = make_cache(vram={"cuda:0": "1GiB"}, fallback=["cuda"])
    with driver.lease(cache, "medium", "cuda:0") as whisper:
        assert whisper.key.device == "cuda:1"
    assert cache.stats().fallbacks == 1


# Where less than the best would be chosen ---------------------------------------------


def test_a_card_that_may_take_no_more_models_is_not_the_best(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    With one model a card, the second goes to the second card.
    """
    cache = make_cache(max_models=1)
    with driver.lease(cache, "tiny", "cuda"):
        asked = driver.waiting(cache, "base", "cuda")
        settle(cache)
        was_served = asked.done()
    asked.result(10).release()
    assert was_served, "it waited for the first card, while the second one was empty"
    assert places(cache) == ["base@cuda:1", "tiny@cuda:0"]


def test_an_idle_model_leaves_rather_than_that_somebody_waits(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    With one model a card: the one card's is leased, the other's is idle.
    """
    cache = make_cache(max_models=1)
    driver.lease(cache, "large-v3", "cuda:1").release()
    with driver.lease(cache, "tiny", "cuda:0"):
        waiting = driver.waiting(cache, "base", "cuda")
        settle(cache)
        was_served = places(cache) == ["base@cuda:1", "tiny@cuda:0"]
    waiting.result(10).release()
    assert was_served, "it waited for the first card's lease"


def test_a_pinned_model_takes_its_room_for_good(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Who can only be served on the other card waits for that one, and does not fail.
    """
    cache = make_cache()
    cache.pin("large-v3", "cuda:0")
    with driver.lease(cache, "medium", "cuda:1"):
        waiting = driver.waiting(cache, "large-v3", "cuda", "int8")
        if waiting.done():
            waiting.result()  # ModelTooLarge: on the card with the pinned one
    waiting.result(10).release()
    assert places(cache) == ["large-v3@cuda:0", "large-v3@cuda:1"]


def test_a_member_of_a_group_never_goes_where_it_cannot_be_served(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Both cannot be on the large card; the small one is taken just now, so both wait.
    """
    cache = make_cache()
    pair = [("large-v3", "cuda"), ("large-v3", "cuda", "int8")]
    with driver.lease(cache, "medium", "cuda:1"):
        before = cache.stats().waiting
        asked = driver.start(cache, "lease_many", pair)
        wait_until(lambda: cache.stats().waiting > before or asked.done())
        if asked.done():
            asked.result()  # ModelTooLarge: two of 6 GiB do not fit 10
    asked.result(10).release()


def test_a_group_is_placed_whatever_its_order(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A small model first must not take the only card that holds the large one.
    """
    cache = make_cache()
    loader.sizes = {"large-v3": "9GiB", "small": "2GiB"}
    leases = driver.call(cache, "lease_many", [("small", "cuda"), ("large-v3", "cuda")])
    assert [lease.key.device for lease in leases] == ["cuda:1", "cuda:0"]
    leases.release()


def test_a_group_that_names_a_model_twice_loads_it_once(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    The second goes where the first will be, though another card has more room now.
    """
    cache = make_cache()
    wanted = [("medium", "cuda"), ("large-v3", "cuda"), ("medium", "cuda")]
    driver.call(cache, "lease_many", wanted).release()
    assert loader.loads == {"medium": 1, "large-v3": 1}


def test_a_card_where_its_loads_keep_failing_is_passed_over(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It is not tried there just now, so another card is better than an error.
    """
    cache = make_cache()
    loader.fail_loads["base"] = [RuntimeError("odd"), RuntimeError("odd")]
    for _ in range(2):
        with pytest.raises(LoadFailed):
            driver.lease(cache, "base", "cuda")
    with driver.lease(cache, "base", "cuda") as whisper:
        assert whisper.key.device == "cuda:1"


def test_a_server_calls_a_model_the_same_on_any_card(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    Where it was when its name was learned does not matter.
    """
    cache = make_cache()
    offers = Offers([ModelSpec("mine", "base")], "cuda")
    engine = LocalEngine(offers, cache)
    cache.lease("base", "cuda", keep_alive=0).release()
    settle(cache)
    before = cache._resolver.entry(("base", "cuda", "default")).key
    machine.others(before.device, machine.total_bytes[before.device])
    with cache.lease("base", "cuda"):
        after = cache.models()[0].key
        assert after.device != before.device
        assert [engine.name_of(key) for key in (before, after)] == ["mine", "mine"]
