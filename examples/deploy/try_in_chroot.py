"""
Carries out the Dockerfile where no registry of images can be reached, and tries that.

``python examples/deploy/try_in_chroot.py cpu`` as root on Debian, with mmdebstrap: a
root file system takes the place of python:slim. The instructions are run in it one by
one, the server is started as the image's user, and its health check is run.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
# Where this machine says how to reach its package registry.
FROM_HERE = ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt", "/etc/hosts")


def main() -> None:
    """
    Builds the target that the command line names, and starts what was built.
    """
    [target] = sys.argv[1:] or ["cpu"]
    with tempfile.TemporaryDirectory(prefix="whispercache-image-") as scratch:
        image = Image(Path(scratch, "root"))
        image.begin()
        with ExitStack() as stack:
            for folder in ("/proc", "/dev", "/dev/shm"):  # noqa: S108
                stack.enter_context(image.mounted(folder))
            for instruction, rest in instructions(target):
                print(instruction, rest[:100], flush=True)
                image.carry_out(instruction, rest)
            image.start()


def instructions(target: str) -> list[tuple[str, str]]:
    """
    Returns the instructions of a stage, after those of the stages that it is made from.
    """
    text = (HERE / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages.setdefault(name, list(stages.get(base, [])))
        elif instruction != "ARG":
            stage.append((instruction, rest))
    return stages[target]


class Image:
    """
    A root file system, and what the instructions have said of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.user = "root"
        self.check: list[str] = []
        self.entry: list[str] = []
        # pip may write beside Debian's own packages: there are no others in an image.
        self.env = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/root",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",
        }

    def begin(self) -> None:
        """
        Makes the root file system, with Python in it.
        """
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        command = ["mmdebstrap", "--quiet", "--variant=apt", packages, "bookworm"]
        subprocess.run([*command, self.root], check=True)
        for name in FROM_HERE:
            if Path(name).exists():
                shutil.copy(name, self.root / name[1:])
        for name in ("python", "pip"):
            (self.root / "usr/bin" / name).unlink(missing_ok=True)
            (self.root / "usr/bin" / name).symlink_to(f"{name}3")

    @contextmanager
    def mounted(self, folder: str) -> Iterator[None]:
        """
        Shows it a folder of this machine, as containers have one of their own.
        """
        place = f"{self.root}{folder}"
        subprocess.run(["mount", "--bind", folder, place], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)

    def carry_out(self, instruction: str, rest: str) -> None:
        """
        Does what one line of the Dockerfile says.
        """
        if instruction == "RUN":
            self.run(["sh", "-euc", rest], "root")
        elif instruction == "ENV":
            for name, _, value in (each.partition("=") for each in shlex.split(rest)):
                self.env[name] = value
        elif instruction == "COPY":
            *sources, target = rest.split()
            for source in sources:
                self.copy(CHECKOUT / source, target)
        elif instruction == "USER":
            self.user = rest
        elif instruction == "HEALTHCHECK":
            self.check = json.loads(rest.partition("CMD")[2])
        elif instruction == "ENTRYPOINT":
            self.entry = json.loads(rest)

    def copy(self, source: Path, target: str) -> None:
        """
        Copies a file into a folder, or a folder to a place.
        """
        place = self.root / target[1:]
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)

    def run(self, command: list[str], user: str) -> None:
        """
        Runs a command in it, with its variables.
        """
        subprocess.run(self.command(command, user), env=self.env, check=True)

    def command(self, command: list[str], user: str) -> list[str]:
        """
        Returns the command that runs another one in it as *user*.
        """
        return ["/usr/sbin/chroot", f"--userspec={user}", str(self.root), *command]

    def start(self) -> None:
        """
        Starts the server as its user, until it is healthy, and ends it.
        """
        self.run([*self.entry, "doctor"], self.user)
        serve = [*self.entry, "serve", "base", "--port", "8765"]
        self.env["WHISPERCACHE_SERVE_PORT"] = "8765"
        server = subprocess.Popen(self.command(serve, self.user), env=self.env)
        try:
            deadline_s = time.monotonic() + 60
            while True:
                time.sleep(1)
                try:
                    self.run(self.check, self.user)
                    break
                except subprocess.CalledProcessError:
                    if server.poll() is not None or time.monotonic() > deadline_s:
                        raise
        finally:
            server.terminate()
            code = server.wait(timeout=60)
        print(f"healthy as {self.user}; exit code {code}")


if __name__ == "__main__":
    main()
