"""
Host memory: what this process may still take, what it holds, how to give it back.

In a container the machine's free memory means little: the kernel kills a process that
exceeds the limit of its control group. Both are read, and the tighter one counts.
"""

from __future__ import annotations

import ctypes
import functools
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Flavour(NamedTuple):
    """
    The names that one version of the kernel's control groups uses.
    """

    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    mounted_at: str


# memory.high does not kill, but the kernel slows a process above it to a crawl.
_V2 = _Flavour(
    ("memory.max", "memory.high"), "memory.current", "inactive_file", "sys/fs/cgroup"
)
_V1 = _Flavour(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    "sys/fs/cgroup/memory",
)

# Three numbers, what is shown where, options, a dash, the file system and its options.
_MOUNT = re.compile(
    r"^\S+ \S+ \S+ (?P<shown>\S+) (?P<folder>\S+) .* - "
    r"(?P<kind>cgroup2?) \S+ (?P<options>\S+)$",
    re.MULTILINE,
)


def host_room(root: Path = Path("/")) -> tuple[int, int, str]:
    """
    Returns total bytes, free bytes, and their source: ``"psutil"`` or ``"cgroup"``.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory and
    cgroup-v1/memory.html, section 4.
    """
    import psutil

    machine = psutil.virtual_memory()
    total_bytes, free_bytes, source = machine.total, machine.available, "psutil"
    for flavour, levels in _control_groups(root):
        for level in levels:
            limit_bytes = _limit_bytes(level, flavour)
            # Version 1 shows "no limit" as a number far above any machine's memory.
            if limit_bytes is None or limit_bytes >= machine.total:
                continue
            left_bytes = max(0, limit_bytes - _held_bytes(level, flavour))
            total_bytes = min(total_bytes, limit_bytes)
            if left_bytes < free_bytes:
                free_bytes, source = left_bytes, "cgroup"
    return total_bytes, min(free_bytes, total_bytes), source


def anonymous_bytes(pid: int | None = None) -> int | None:
    """
    Returns the resident bytes of a process, by default of this one, that no file backs;
    None if unknown, or if it has ended.

    Model weights are among them. Pages of files, which the kernel can drop, are not.
    Only Linux tells the two apart; elsewhere this is the resident set.
    """
    status = _text(Path(f"/proc/{'self' if pid is None else pid}/status"))
    match = re.search(r"^RssAnon:\s*(\d+) kB", status, re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def return_free_memory() -> None:
    """
    Returns the C library's free heap pages to the system; does nothing without glibc.

    Freed weights would stay in the process without it.

    Blocks: other threads' allocations, arena by arena, for some milliseconds.
    Source: 107 MiB stayed of an unloaded model, 28 MiB (1 above the base line) after
    this; CTranslate2 4.8.5, base, CPU.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def user_cache() -> Path:
    """
    Returns this program's directory in the cache directory of the user.

    Raises:
        OSError: The user has none.
    """
    from platformdirs import user_cache_dir

    return _of_user(lambda: user_cache_dir("whispercache"), "XDG_CACHE_HOME")


def user_config() -> Path:
    """
    Returns this program's directory in the configuration directory of the user.

    Raises:
        OSError: The user has none.
    """
    from platformdirs import user_config_dir

    # Without the author, for whom Windows would have another directory around it.
    return _of_user(
        lambda: user_config_dir("whispercache", appauthor=False), "XDG_CONFIG_HOME"
    )


def _of_user(find: Callable[[], str], variable: str) -> Path:
    # Without HOME, and with a user id that has no name, older versions of platformdirs
    # start with "~", and newer ones raise a RuntimeError.
    with suppress(RuntimeError):
        path = Path(find())
        if path.is_absolute():
            return path
    raise FileNotFoundError(f"the user has no home directory; set {variable}")


def cpu_name(root: Path = Path("/")) -> str:
    """
    Returns the processor's model name, or at least its architecture.
    """
    match = re.search(
        r"^model name\s*:\s*(\S.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE
    )
    if match:
        return match[1].strip()
    import platform

    return platform.processor().strip() or platform.machine() or "cpu"


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    # No such function (musl, macOS), or no such library (Windows: TypeError).
    except (AttributeError, OSError, TypeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    # ctypes declares no signature of its own.
    found: Callable[[int], int] = trim
    return found


def _control_groups(root: Path) -> Iterator[tuple[_Flavour, list[Path]]]:
    """
    Yields the folders whose limits bind this process, by version, innermost first.
    """
    mounts = _mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            flavour = _V2
        elif "memory" in controllers.split(","):
            flavour = _V1
        else:
            continue
        shown, folder = mounts.get(flavour, ("/", root / flavour.mounted_at))
        inner = PurePosixPath("/", path)
        # A container often sees only its own group, mounted as if it were the root.
        relative = inner.relative_to(shown if inner.is_relative_to(shown) else "/")
        steps = [part for part in relative.parts if part != ".."]
        yield (
            flavour,
            [folder.joinpath(*steps[:n]) for n in range(len(steps), -1, -1)],
        )


def _mounts(root: Path) -> dict[_Flavour, tuple[str, Path]]:
    """
    Returns the mount of each version: which group is shown there, and the folder.
    """
    found: dict[_Flavour, tuple[str, Path]] = {}
    for mount in _MOUNT.finditer(_text(root / "proc/self/mountinfo")):
        shown, folder = mount["shown"], root / mount["folder"].lstrip("/")
        if mount["kind"] == "cgroup2":
            found.setdefault(_V2, (shown, folder))
        elif "memory" in mount["options"].split(","):
            found.setdefault(_V1, (shown, folder))
    return found


def _limit_bytes(level: Path, flavour: _Flavour) -> int | None:
    # "max" is no number, hence no limit.
    texts = (_text(level / name).strip() for name in flavour.limits)
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def _held_bytes(level: Path, flavour: _Flavour) -> int:
    """
    Returns the bytes charged to a group, without the file pages that can be dropped.
    """
    usage = _text(level / flavour.usage).strip()
    match = re.search(
        rf"^{flavour.reclaimable} (\d+)$", _text(level / "memory.stat"), re.MULTILINE
    )
    held = int(usage) if usage.isdecimal() else 0
    return max(0, held - (int(match[1]) if match else 0))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
