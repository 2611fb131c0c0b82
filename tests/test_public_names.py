"""
The public names, and the modules that they can be imported from.

A name that is missing here was added by accident; one that is missing there was lost.
"""

from __future__ import annotations

import importlib
import inspect
import pickle

import pytest

import whispercache

PUBLIC = {
    "whispercache": """
        AsyncCachedModel AsyncModelCache Audio AudioDamage AudioError BatchStopped
        CacheClosed CacheForked CachedModel CorruptModel DeviceInfo DeviceLost
        DeviceUnavailable DeviceWarmedUp DeviceWarmingUp DownloadTimeout Event
        EvictionCause EvictionTimeout Explanation FellBack Footprint Lease LeaseDeadlock
        LeaseTimeout Leases LoadFailed ModelCache ModelEvicted ModelGranted
        ModelInfo ModelKey ModelLoadFailed ModelLoaded ModelLoading
        ModelStillReferenced ModelTooLarge NoRoom NotDownloaded ReleaseUnconfirmed Stats
        TooManyWaiters UnknownModel UnsupportedComputeType WaitingInfo
        WhisperCacheError Workload __version__ compare configure default_cache
        footprint get_model install installed read_audio uninstall use_huge_pages
    """,
    "whispercache.comparison": """
        Agreement Comparison Difference Edit Failure FileInfo Interval ModelFailure
        ModelSummary Progress Reference Result Tally compare
    """,
    "whispercache.errors": """
        AudioError CacheClosed CacheForked CorruptModel DeviceUnavailable
        DownloadTimeout EvictionTimeout LeaseDeadlock LeaseTimeout LoadFailed
        ModelTooLarge NotDownloaded TooManyWaiters UnknownModel
        UnsupportedComputeType WhisperCacheError format_bytes
    """,
    "whispercache.metrics": """
        BUCKETS_S CacheCollector
    """,
    "whispercache.server": """
        ServerOptions create_app
    """,
    "whispercache.testing": """
        FakeClock FakeLoader FakeMachine FakeSegment FakeWhisper Gate check settle
        wait_until
    """,
}


@pytest.mark.parametrize("module", PUBLIC)
def test_a_module_has_its_public_names_and_no_others(module: str) -> None:
    """
    Each of them can be imported from there.
    """
    found = importlib.import_module(module)
    assert sorted(found.__all__) == PUBLIC[module].split()
    for name in found.__all__:
        assert getattr(found, name) is not None, name


def test_all_errors_can_be_had_from_the_top() -> None:
    """
    All but a helper for messages, and each is the same class in both places.
    """
    names = set(PUBLIC["whispercache.errors"].split()) - {"format_bytes"}
    for name in names:
        assert getattr(whispercache, name) is getattr(whispercache.errors, name)


def test_errors_stay_in_their_module() -> None:
    """
    A pickle names it: processes of different versions send errors to each other.
    """
    for name in PUBLIC["whispercache.errors"].split():
        value = getattr(whispercache.errors, name)
        if inspect.isclass(value):
            assert value.__module__ == "whispercache.errors"
    assert b"whispercache.errors" in pickle.dumps(whispercache.CacheClosed(), 0)


def test_footprint_is_a_function_and_no_module() -> None:
    """
    To import it as a module fails, where it once gave the function in its place.
    """
    with pytest.raises(ModuleNotFoundError, match=r"'whispercache\.footprint'"):
        importlib.import_module("whispercache.footprint")
    assert callable(whispercache.footprint)
