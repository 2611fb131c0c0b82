"""
Progress of a transcription: a line on stderr, if that is a terminal.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from whispercache.console import bars, clock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Progress, ProgressColumn, Task

    from whispercache.transcripts import Cue


def remaining_s(fraction: float, reached_after_s: float, elapsed_s: float) -> float:
    """
    Returns the seconds to go for work that was at *fraction* after *reached_after_s*.
    Segments come in bursts, of 30 s at a time; in between, time runs down.
    """
    return max(0.0, reached_after_s / fraction - elapsed_s)


class Bar:
    """
    A line for one piece of work after the other; nothing without a terminal. Safe to
    use from any thread.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = bars(_remaining_column())

    def begin(self, work: str) -> None:
        """
        Shows new *work*, of which nothing is known yet.
        """
        if self._progress is None:
            return
        # One line, for the work at hand.
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(
            work, start=False, total=None, stage="reading", reached_after_s=0.0
        )
        self._progress.start()

    def stage(self, stage: str) -> None:
        """
        Shows what is being done before the first segment.
        """
        if self._progress is not None:
            for task in self._progress.task_ids:
                self._progress.update(task, stage=stage, refresh=True)

    def follow(self, cues: Iterable[Cue], duration_s: float) -> Iterator[Cue]:
        """
        Yields *cues* as they are computed, and shows how much of the audio is done.
        """
        if self._progress is None:
            yield from cues
            return
        (task,) = self._progress.tasks
        self._progress.update(task.id, total=duration_s, stage="")
        self._progress.start_task(task.id)
        for cue in cues:
            # rich's own estimate takes bursts for speed.
            self._progress.update(
                task.id,
                completed=min(cue.end_s, duration_s),
                reached_after_s=task.elapsed or 0.0,
            )
            yield cue

    @contextmanager
    def aside(self) -> Iterator[None]:
        """
        Removes the line while something else is written to the terminal.
        """
        # stdout may be the same terminal.
        if self._progress is None or not self._progress.live.is_started:
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def say(self, text: str) -> None:
        """
        Writes a line to stderr.
        """
        with self.aside():
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """
        Removes the line, and gives the terminal its cursor back.
        """
        if self._progress is not None:
            self._progress.stop()


def _remaining_column() -> ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Remaining(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.fields["stage"]:
                return Text(task.fields["stage"])
            if not task.total or not task.completed:
                return Text("-:-- left", style="progress.remaining")
            left_s = remaining_s(
                task.completed / task.total,
                task.fields["reached_after_s"],
                task.elapsed or 0.0,
            )
            return Text(f"{clock(left_s)} left", style="progress.remaining")

    return Remaining()
