"""
Progress: a line on stderr, if that is a terminal, that tells how far a job is.

rich is imported when the first line is shown, not with this module.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Progress, ProgressColumn, Task, TaskID

    from whispercache.transcripts import Cue

__all__ = ["Bar", "remaining_s"]


def remaining_s(fraction: float, reached_after_s: float, elapsed_s: float) -> float:
    """
    Seconds still to go, for a job that was at *fraction* after *reached_after_s*.

    Segments come in bursts, a window of 30 s at a time; in between, time runs down.
    """
    return max(0.0, reached_after_s / fraction - elapsed_s)


class Bar:
    """
    The line of one job after the other. Without a terminal it shows nothing.

    Safe to use from any thread. A context manager that removes the line on exit.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            self._progress = _progress()

    def begin(self, job: str) -> None:
        """
        Show a new *job*, of which nothing is known yet.
        """
        if self._progress is None:
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(
            job, start=False, total=None, stage="reading", reached_after_s=0.0
        )
        self._progress.start()

    def stage(self, stage: str) -> None:
        """
        Say what is being done, before the first segment.
        """
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, stage=stage, refresh=True)

    def follow(self, cues: Iterable[Cue], duration_s: float) -> Iterator[Cue]:
        """
        *cues*, as they are computed; the line shows how much of the audio is done.
        """
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=duration_s, stage="")
            self._progress.start_task(self._task)
        for cue in cues:
            if self._progress is not None and self._task is not None:
                elapsed_s = self._progress.tasks[0].elapsed or 0.0
                self._progress.update(
                    self._task,
                    completed=min(cue.end_s, duration_s),
                    reached_after_s=elapsed_s,
                )
            yield cue

    @contextmanager
    def aside(self) -> Iterator[None]:
        """
        Take the line away while something else is written to the terminal.
        """
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
        Write a line to stderr.
        """
        with self.aside():
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """
        Remove the line, and give the terminal its cursor back.
        """
        if self._progress is not None:
            self._progress.stop()


def _progress() -> Progress:
    """
    The line: job, bar, per cent, time to go.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    job = Column(no_wrap=True, overflow="ellipsis", ratio=3)
    return Progress(
        TextColumn("{task.description}", table_column=job, markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=2)),
        TaskProgressColumn(),
        _remaining_column(),
        console=Console(stderr=True, highlight=False),
        expand=True,
        transient=True,
        # What goes to stdout is the transcript, and nobody else's.
        redirect_stdout=False,
    )


def _remaining_column() -> ProgressColumn:
    """
    A column with the time to go or, before the first segment, what is being done.
    """
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Remaining(ProgressColumn):
        """
        See above.
        """

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
            minutes, seconds = divmod(round(left_s), 60)
            hours, minutes = divmod(minutes, 60)
            text = f"{hours}:{minutes:02}" if hours else f"{minutes}"
            return Text(f"{text}:{seconds:02} left", style="progress.remaining")

    return Remaining()
