"""
The resolver: from what a caller asks for to one model, with its files and bytes.

It may touch the disk, ask CTranslate2 what a device supports, and download; so it runs
on the caller's thread, outside the lock. A request that was seen before costs one
look-up.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whispercache.engine.calls.languages import knowledge_of
from whispercache.engine.files import ModelFiles
from whispercache.engine.naming import canonical_model
from whispercache.engine.sizes.architecture import ARCHITECTURES, HUB_COMPUTE_TYPE
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.errors import (
    DeviceUnavailable,
    LoadFailed,
    NotDownloaded,
    UnknownModel,
    UnsupportedComputeType,
)
from whispercache.keys import (
    ModelKey,
    canonical_device,
    canonical_options,
    compute_type_on,
    effective_compute_type,
    frozen_compute_type,
    is_directory,
)
from whispercache.planning import placement

from . import view
from .entries import Entry, State
from .refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, TypeAlias

    from whispercache.engine.calls.languages import Knowledge
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.keys import OptionValue
    from whispercache.planning.placement import Candidate

    from .core import Core

    # Model, device and compute type as given, then pairs of a load option and value.
    Request: TypeAlias = tuple[Any, ...]

_log = logging.getLogger("whispercache")

KNOWN_REQUESTS = 65_536


@dataclass(frozen=True, slots=True)
class Target:
    """
    A model to lease, and how to get its files.

    Attributes:
        entry: The model.
        options: Load options as they were given.
        files: Enough of the model to tell its bytes; None if nothing was looked at.
        is_placed: Its device was chosen, not named.
    """

    entry: Entry
    options: Mapping[str, OptionValue]
    files: ModelFiles | None = None
    is_placed: bool = False

    @property
    def is_outdated(self) -> bool:
        """
        True if what is in memory is of files that others have replaced since.
        """
        loaded, found = self.entry.files, self.files
        if loaded is None or found is None or not self.entry.is_present:
            return False
        loaded = loaded.original or loaded
        return loaded.directory == found.directory and loaded.stamp != found.stamp


class Resolver:
    """
    Finds the one entry that a request means.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._loader = core.loader
        # What a name means is not kept: a link may point elsewhere.
        self._known = core.requests
        # One look at the disk, and one download, at a time for each model.
        self._locating: dict[Entry, threading.Lock] = {}

    def known(self, request: Request) -> Entry | None:
        """
        Returns the model of a request that was resolved before; None if it was not.
        """
        try:
            return self._known.get(request)
        except TypeError:  # an option that cannot be hashed: `resolve` says which
            return None

    def entry(self, request: Request) -> Entry:
        """
        Returns the model of a request, resolved now if it was not before.
        """
        return self.known(request) or self.resolve(request).entry

    def knowledge(self, request: Request, *, download: bool) -> Knowledge | None:
        """
        Returns the knowledge of the model of *request*; None if that cannot be told, as
        with a repository of unknown size that is not on this disk.

        Blocks: not for a model in memory; else for some system calls, and for a
        download if one is needed and allowed.

        Raises:
            UnknownModel, CorruptModel, LoadFailed: as `resolve` would.
        """
        entry = self.known(request)
        if entry is not None and entry.is_present and entry.files is not None:
            # It may be unloaded meanwhile.
            known = None if (loaded := entry.loaded) is None else loaded.knowledge
            return known or knowledge_of(entry.files)
        name, _, _, *pairs = request
        try:
            files = self._peek(canonical_model(name), dict(pairs), download=download)
        except NotDownloaded:
            return None
        return knowledge_of(files)

    def files(self, request: Request) -> ModelFiles:
        """
        Returns enough of the model of *request* to tell what it is.

        Blocks: as `knowledge` does, and raises what that raises.
        """
        entry = self.known(request)
        if entry is not None and entry.files is not None:
            return entry.files
        name, _, _, *pairs = request
        return self._peek(canonical_model(name), dict(pairs), download=True)

    def forget(self) -> None:
        """
        Forgets all requests, so that each is resolved anew.
        """
        self._known.clear()
        self._locating.clear()

    def resolve(
        self,
        request: Request,
        *,
        download: bool = True,
        beside: Iterable[Target] = (),
    ) -> Target:
        """
        Returns the target of *request*, looked up anew: a link may point elsewhere by
        now, and where a device is to be chosen, another one may be better.

        Args:
            request: The model that is asked for.
            download: Files may be downloaded to find out.
            beside: Targets of the same request for several models, chosen already.

        Blocks: for the header of model.bin; for a download, if the name is a repository
        of unknown size that is not on this disk. Without *download*, that fails.

        Raises:
            TypeError, ValueError: a parameter is nonsense.
            UnknownModel, UnsupportedComputeType, DeviceUnavailable: see there.
            CorruptModel, LoadFailed: the files are broken, or cannot be downloaded.
        """
        name, device, compute_type, *pairs = request
        options = dict(pairs)
        wanted = canonical_device(device, options.pop("device_index", None))
        model = canonical_model(name)
        kept = canonical_options(model, options)
        files = self._peek(model, options, download=download)
        wish = _Wish(model, compute_type, kept, files)
        key = self._place(wish, wanted, beside)
        is_placed = wanted == "cuda" or wanted.startswith("auto")
        target = Target(self._core.entry(key), options, files, is_placed)
        # A relative path means another model after os.chdir().
        if not is_directory(model) or os.path.isabs(name):
            if len(self._known) >= KNOWN_REQUESTS:
                self._known.clear()
            self._known[request] = target.entry
        return target

    def matching(
        self,
        model: str | os.PathLike[str] | None,
        device: str | None,
        compute_type: str | None,
    ) -> Callable[[ModelKey], bool]:
        """
        Returns a test for keys that were named; None names all. ``"int8"`` is each type
        of it.

        Raises:
            UnknownModel, LoadFailed: there is no such model, in memory or elsewhere.
            TypeError, ValueError: the device or the compute type is nonsense.
        """
        names = None if model is None else self._names(os.fspath(model))
        place = None if device is None else canonical_device(device)
        wanted = (
            "default" if compute_type is None else frozen_compute_type(compute_type)
        )

        def matches(key: ModelKey) -> bool:
            kind = compute_type_on(wanted, key.device)
            return (
                (names is None or key.model in names)
                and place in (None, "auto", key.device, key.device.partition(":")[0])
                and (
                    kind in ("default", "auto", key.compute_type)
                    or (kind == "int8" and key.compute_type.startswith("int8"))
                )
            )

        return matches

    def _names(self, name: str) -> set[str]:
        """
        Returns the models that *name* means now, or meant when they were asked for: its
        files may be gone since, and a link may point elsewhere.
        """
        # Copies: other threads change them meanwhile.
        known = list(self._known.items())
        asked = [e for (given, *_), e in known if name in (given, os.fspath(given))]
        path = os.path.expanduser(name)
        spelled = {name, os.path.abspath(path), os.path.realpath(path)}
        meant = spelled & {key.model for key in list(self._core.entries)}
        meant |= {entry.key.model for entry in asked}
        try:
            return meant | {canonical_model(name)}
        except (UnknownModel, LoadFailed):
            if not meant:
                raise
            return meant

    def least_choice(self, target: Target) -> tuple[bool, int]:
        """
        Sort key of targets of one request: named devices first, then the largest.
        """
        assert target.files is not None
        key = target.entry.key
        footprint = self._loader.footprint(key, target.files, DEFAULT_WORKLOAD)
        return target.is_placed, -footprint.total_bytes

    def locate(
        self, target: Target, workload: Workload, *, download: bool = True
    ) -> None:
        """
        Finds the files of an absent model, and the bytes that it will take.

        Blocks: for a download, if need be. Callers that want one model share it.

        Raises:
            LoadFailed: the files are not here and cannot be downloaded.
        """
        entry = target.entry
        # Callers that want the same model wait for one download, not for several.
        with self._locating.setdefault(entry, threading.Lock()):
            files = entry.files
            if files is None or entry.state is State.ABSENT:
                model = entry.key.model
                files = self._loader.locate(model, target.options, download=download)
                files = files or self._peek(model, target.options, download=False)
                files = self._loader.choose(entry.key, files)
            wanted = {*entry.footprints, DEFAULT_WORKLOAD, workload}
            footprints = {
                each: self._loader.footprint(entry.key, files, each) for each in wanted
            }
            with self._core.changing():
                entry.locate(files, footprints)
        # The plan for its load goes by what is free now.
        if entry.state is State.ABSENT:
            self._core.gauges.observe(entry.device)
            if entry.host is not entry.device:
                self._core.gauges.observe(entry.host)

    def read(self, target: Target) -> None:
        """
        Reads the files of an absent model into the page cache.

        Blocks: until they are read; for a download, if need be.

        Raises:
            LoadFailed: they are not here and cannot be downloaded, or not be read.
        """
        self.locate(target, DEFAULT_WORKLOAD)
        files = target.entry.files
        if files is not None and not target.entry.is_present:
            self._loader.read(files)

    def _peek(
        self, model: str, options: Mapping[str, OptionValue], *, download: bool
    ) -> ModelFiles:
        """
        Returns enough of a model to tell its key and bytes, without its files if
        possible.
        """
        if architecture := ARCHITECTURES.get(model):
            return ModelFiles("", HUB_COMPUTE_TYPE, source=architecture)
        files = self._loader.locate(model, options, download=download)
        if files is None:
            raise NotDownloaded(
                model, "its files are not all on this disk; preload it first"
            )
        return files

    def _place(self, wish: _Wish, wanted: str, beside: Iterable[Target]) -> ModelKey:
        """
        Returns the key on the wanted device, or on the best one: ``"cuda"`` is any
        card, ``"auto"`` a card that can hold the model, or else the CPU, ``"auto:N"``
        that card, or else the CPU.
        """
        devices = self._loader.devices()
        cards = [device for device in devices if device != "cpu"]
        kind, _, index = wanted.partition(":")
        if kind == "auto" and index and cards:
            named = f"cuda:{index}"
            # Where there are others, one that is missing is a mistake.
            wanted, cards = ("auto", [named]) if named in cards else (named, cards)
        elif kind == "auto":
            wanted = "auto"
        if wanted in ("auto", "cuda"):
            # The usual machine: there is nothing to choose.
            if cards == ["cuda:0"] and wanted == "cuda":
                return self._on("cuda:0", wish)
            candidates = list(self._candidates(wish, cards, list(beside)))
            found = placement.choose(candidates)
            if found is not None:
                return self._on(found.device, wish)
            if wanted == "auto":
                return self._on("cpu", wish)
            # None can hold it. The largest says best why, or that there is none.
            largest = max(candidates, key=lambda each: each.ceiling_bytes, default=None)
            wanted = "cuda:0" if largest is None else largest.device
        if wanted not in devices:
            self._core.probe.read(wanted)  # knows better why there is none
            reason = f"CTranslate2 sees {', '.join(devices)}; is the driver too old?"
            raise DeviceUnavailable(wanted, reason)
        return self._on(wanted, wish)

    def _on(self, device: str, wish: _Wish) -> ModelKey:
        supported = self._loader.supported_compute_types(device)
        wanted = compute_type_on(wish.compute_type, device)
        effective = effective_compute_type(
            wanted, wish.files.saved_compute_type, device, supported
        )
        return ModelKey(wish.model, device, effective, wish.options)

    def _candidates(
        self, wish: _Wish, cards: Sequence[str], beside: Sequence[Target]
    ) -> Iterator[Candidate]:
        """
        Yields the cards that work, can compute so, and whose gauge can be read.
        """
        core = self._core
        for device in cards:
            try:
                key = self._on(device, wish)
            except UnsupportedComputeType:
                continue
            place = core.device(device)
            if (reason := place.lost_to) is not None:
                _log.warning("passing over %s, which was lost: %s", device, reason)
                continue
            try:
                core.gauges.observe(place)
            except DeviceUnavailable as error:
                _log.warning("passing over %s: %s", device, error)
                continue
            footprint = self._loader.footprint(key, wish.files, DEFAULT_WORKLOAD)
            own = {target.entry for target in beside}
            with core.changing():
                entry = core.entries.get(key)
                refused = entry and refusal(entry, core.clock.now())
                card = view.candidate(core.state, key, footprint.total_bytes, own)
            if refused:
                _log.warning("passing over %s: %s", device, refused)
            else:
                yield card


@dataclass(frozen=True, slots=True)
class _Wish:
    model: str
    compute_type: str | tuple[tuple[str, str], ...]
    options: tuple[tuple[str, OptionValue], ...]
    files: ModelFiles
