"""
The start of each Python under ``whispercache run``, through its PYTHONPATH.

Nothing of whispercache is imported until the program imports faster-whisper, or
CTranslate2 if that is to be changed by itself: other programs among the children start
as they did. So this is written for old Pythons, too, and imports nothing that they have
not imported yet.

A ``sitecustomize`` that is there besides, of a distribution or another such tool, runs
as well. This is an import hook, and no stand-in for the module: who asks whether
faster-whisper is installed, or takes a copy of it from elsewhere, gets the right
answer.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, Callable, Optional, Sequence

_VARIABLE = "WHISPERCACHE_RUN"


class _Loader:
    """
    A module's loader, with something to do before and after.
    """

    def __init__(self, loader: "Any") -> None:  # noqa: ANN401 - of any kind
        self._loader = loader

    def create_module(self, spec: object) -> object:
        """
        Returns what the loader makes.
        """
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        """
        Runs the module, and installs.
        """
        # From here on nothing reminds of this.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        start = _start(module.__name__)
        self._loader.exec_module(module)
        if start is not None:
            start()

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _Finder:
    """
    A finder of what the others find, for the modules that are waited for.
    """

    def __init__(self, names: "Sequence[str]") -> None:
        self._names = names

    def find_spec(
        self,
        name: str,
        path: "Optional[Sequence[str]]" = None,
        target: "Optional[ModuleType]" = None,
    ) -> "Optional[ModuleSpec]":
        """
        Returns what the others find, with a loader that installs.
        """
        if name not in self._names:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None  # type: Optional[ModuleSpec]
            if find is not None:
                spec = find(name, path, target)
            if spec is not None:
                # A folder without __init__.py has no loader to speak of.
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def _start(name: str) -> "Optional[Callable[[], None]]":
    """
    Returns the function that installs; None where there is no whispercache.
    """
    try:
        from whispercache.engine.process import ctranslate2
        from whispercache.installing import start
    except ImportError as error:
        sys.stderr.write(
            "whispercache: {} is as it always was in this program: {} cannot import "
            "whispercache ({}); install it there, too\n".format(
                name, sys.executable, error
            )
        )
        return None
    if name != "ctranslate2":
        # Imported by us, its idle threads sleep.
        ctranslate2()
    return start


def _wait() -> None:
    words = os.environ.get(_VARIABLE, "").split(",")
    names = [name for name in ("faster_whisper", "ctranslate2") if name in words]
    if names:
        sys.meta_path.insert(0, _Finder(names))


def _go_on() -> None:
    """
    Imports the ``sitecustomize`` that would be there without this one.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    mine = sys.modules.pop(__name__, None)
    try:
        # The next one.
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401
    except ImportError as error:
        # site passes over one that is not there, as it does without this.
        if getattr(error, "name", None) != "sitecustomize":
            raise
        if mine is not None:
            sys.modules[__name__] = mine


# Nothing to do where it is imported as a part of the package.
if __name__ == "sitecustomize":
    _wait()
    _go_on()
