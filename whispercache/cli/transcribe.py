"""
The command ``whispercache transcribe``: some files through some models, in turns.

Transcripts go to stdout or into files, everything else to stderr.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whispercache.cache import ModelCache
from whispercache.console import WRONG_USE, distinct, error_line, interruptible
from whispercache.engine.calls.languages import check_language
from whispercache.engine.calls.prepare import workload_of
from whispercache.engine.naming import short_name
from whispercache.errors import AudioError, WhisperCacheError
from whispercache.events import ModelLoaded, ModelLoading
from whispercache.keys import MODELS, is_directory
from whispercache.settings.arguments import hooks_of, settings_of
from whispercache.settings.sources import cache_options
from whispercache.settings.table import ONE_BY_ONE_KEYS
from whispercache.transcripts import FORMATS, Cue, Transcript

from .progress import Bar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from whispercache.events import Event
    from whispercache.model import CachedModel


def transcribe(options: argparse.Namespace) -> int:
    """
    Transcribes, and returns the exit code.
    """
    # One job, after which the process ends.
    if options.owns_process:
        # As few ticks as there may be for which OpenBLAS' threads spin, on the cores
        # that others need. Fewer threads would change the last bits of features.
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    bar = Bar()
    work = _Transcription(options, bar)

    def interrupted() -> None:
        bar.close()
        work.discard()

    try:
        return interruptible(work.run, name="transcribe", interrupted=interrupted)
    finally:
        bar.close()


@dataclass(slots=True)
class _Transcription:
    """
    A run of the command: some files through some models.
    """

    options: argparse.Namespace
    bar: Bar
    partial: Path | None = None  # the file that is being written
    bad: set[str] = field(default_factory=set)  # could not be decoded
    damaged: set[str] = field(default_factory=set)  # and that was said

    def run(self) -> int:
        options = self.options
        # Each once, in order.
        files = list(dict.fromkeys(options.files))
        held = settings_of(options)
        with (
            ModelCache(**cache_options(held, ONE_BY_ONE_KEYS)) as cache,
            hooks_of(held, cache),
        ):
            # Before the first is loaded, all are known to exist and to fit.
            models = self._models(cache)
            if options.output_dir is not None:
                options.output_dir.mkdir(parents=True, exist_ok=True)
            # Before the first line of progress, which a download's own would spoil.
            for model in models.values():
                place = (model.key.model, model.key.device, model.key.compute_type)
                cache.download(*place)
                known = cache.knowledge(*place)
                check_language(str(model.key), options.language, known)
            cache.subscribe(self._watch)
            stems = distinct(Path(file).stem for file in files)
            last = next(reversed(models), None)
            for name, model in models.items():
                for file, stem in zip(files, stems, strict=True):
                    # Broken once, broken for the next model too.
                    if file not in self.bad:
                        self._one(file, stem, name, model)
                # Its turn is over; the next one has the memory.
                if name != last:
                    cache.evict(model.key.model)
        return WRONG_USE if self.bad else 0

    def _models(self, cache: ModelCache) -> dict[str, CachedModel]:
        options = self.options
        place = (options.device, options.compute_type)
        workload = workload_of({"beam_size": options.beam_size}, options.batch_size)
        models: dict[object, CachedModel] = {}
        for text in options.models:
            model = cache.get_model(text, *place)
            # A repository of unknown size is downloaded to know its key.
            models.setdefault(model.key, model)
            plan = cache.explain(text, *place, workload=workload)
            if plan.outcome == "never":
                raise WhisperCacheError(plan.reason)
        names = distinct(_short(model.key.model) for model in models.values())
        return dict(zip(names, models.values(), strict=True))

    def _watch(self, event: Event) -> None:
        if isinstance(event, (ModelLoading, ModelLoaded)):
            is_loading = isinstance(event, ModelLoading)
            self.bar.stage("loading" if is_loading else "listening")

    def _one(self, file: str, stem: str, name: str, model: CachedModel) -> None:
        options = self.options
        self.bar.begin(f"{Path(file).name} · {name}")
        try:
            segments, info = model.transcribe(
                self._samples(file), batch_size=options.batch_size, **self._call()
            )
        except (AudioError, OSError) as error:
            self.bad.add(file)
            self.bar.say(error_line(error))
            return
        with closing(segments):
            cues = (Cue(each.start, each.end, each.text) for each in segments)
            transcript = Transcript(
                file,
                str(model.key),
                info.language,
                info.duration,
                self.bar.follow(cues, info.duration),
            )
            pieces = FORMATS[options.format](transcript)
            if options.output_dir is None:
                self._print(pieces, f"{file} · {name}")
            else:
                target = options.output_dir / f"{stem}.{name}.{options.format}"
                self._save(pieces, target)
                self.bar.say(f"{file} · {name}: {target}")

    def _samples(self, file: str) -> NDArray[np.float32]:
        """
        Returns the samples of a file, and warns once of damage to it.
        """
        from whispercache.engine.audio.decoder import read_audio

        audio = read_audio(file)
        if audio.damage is not None and file not in self.damaged:
            self.damaged.add(file)
            self.bar.say(f"whispercache: warning: {file} is damaged: {audio.damage}")
        return audio.samples

    def _call(self) -> dict[str, Any]:
        """
        Returns the options of ``transcribe`` that were asked for.
        """
        options = self.options
        call: dict[str, Any] = {
            "language": options.language,
            "task": options.task,
            "beam_size": options.beam_size,
        }
        # Left out otherwise, since batches have it on by default.
        if options.vad:
            call["vad_filter"] = True
        if options.batch_size is not None and options.format != "txt":
            # Batches come without, as one segment for each stretch of speech.
            call["without_timestamps"] = False
        return call

    def _print(self, pieces: Iterator[str], heading: str) -> None:
        # One text needs no heading.
        several = len(self.options.files) > 1 or len(self.options.models) > 1
        if several and self.options.format != "json":
            pieces = chain([f"==> {heading} <==\n"], pieces, ["\n"])
        for piece in pieces:
            with self.bar.aside():
                sys.stdout.write(piece)
                sys.stdout.flush()

    def _save(self, pieces: Iterator[str], target: Path) -> None:
        """
        Writes a file that appears only when it is whole.
        """
        # Beside it, since a rename works within one disk.
        self.partial = target.with_name(f"{target.name}.partial")
        try:
            with self.partial.open(
                "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            ) as file:
                file.writelines(pieces)
            self.partial.replace(target)
        except BaseException:
            self.discard()
            raise
        self.partial = None

    def discard(self) -> None:
        if self.partial is not None:
            with suppress(OSError):
                self.partial.unlink()


def _short(model: str) -> str:
    """
    Returns a name for headings and files.
    """
    if is_directory(model):
        return short_name(model)
    return model if model in MODELS else model.replace("/", "--")
