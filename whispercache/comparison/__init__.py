"""
Comparison: the same speech through several models, scored, timed and told apart.

::

    from whispercache.comparison import compare

    comparison = compare(
        ["talk.wav", "call.wav"],
        models=["tiny.en", "base", "base:int8"],
        references="references.tsv",
        out="report",
    )
    for model in comparison.models:
        print(model.name, model.wer, model.real_time_factor)

Models take turns, each with all files, so that each is loaded once. Needs the extra
``whispercache[compare]``; importing this package does not.
"""

from .run import compare
from .values import (
    Agreement,
    Comparison,
    Difference,
    Edit,
    Failure,
    FileInfo,
    Interval,
    ModelFailure,
    ModelSummary,
    Progress,
    Reference,
    Result,
    Tally,
)

__all__ = [
    "Agreement",
    "Comparison",
    "Difference",
    "Edit",
    "Failure",
    "FileInfo",
    "Interval",
    "ModelFailure",
    "ModelSummary",
    "Progress",
    "Reference",
    "Result",
    "Tally",
    "compare",
]
