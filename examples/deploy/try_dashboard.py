"""
Asks a real Prometheus, beside a real server, all that the dashboard asks.

``.venv/bin/python examples/deploy/try_dashboard.py`` after ``make test``. Prometheus
and promtool are those in PATH, or else Debian's, whose package is unpacked in a
temporary directory. Two models take turns in memory for one, on the CPU, and each query
of grafana.json has to give a number. promtool judges ``/metrics`` as well.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
SERVER, PROMETHEUS = "127.0.0.1:8765", "127.0.0.1:8766"
# As Grafana's are, were its scrape interval that of the configuration below.
VARIABLES = {"$__rate_interval": "30s", "$instance": ".*"}
PATIENCE_S = 120
CONFIGURATION = f"""
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: whispercache
    static_configs: [{{targets: ["{SERVER}"]}}]
"""


def main() -> None:
    """
    Prints each query with what it gave, and fails if one gave nothing.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tools = find_tools(scratch)
        stack.enter_context(running(server(), f"http://{SERVER}/readyz"))
        command = prometheus(tools, scratch)
        stack.enter_context(running(command, f"http://{PROMETHEUS}/-/ready"))

        deadline_s = time.monotonic() + PATIENCE_S
        is_complete = False
        while not is_complete and time.monotonic() < deadline_s:
            transcribe("tiny.en")
            transcribe("base")
            found = [(title, name, ask(query)) for title, name, query in queries()]
            is_complete = all(has_numbers(values) for *_, values in found)
        lint(tools)

    for panel, legend, values in found:
        shown = ", ".join(f"{value:.4g}" for value in values) or "nothing"
        print(f"{panel:30} {legend:24} {shown}")
    if not is_complete:
        sys.exit("a query gave no number")


def find_tools(scratch: Path) -> Path:
    """
    Returns the directory of prometheus and promtool.
    """
    if (found := shutil.which("promtool")) and shutil.which("prometheus"):
        return Path(found).parent
    subprocess.run(
        ["apt-get", "download", "-qq", "prometheus"], cwd=scratch, check=True
    )
    [package] = scratch.glob("prometheus_*.deb")
    subprocess.run(["dpkg", "-x", package, scratch], check=True)
    return scratch / "usr" / "bin"


def server() -> list[str | Path]:
    """
    Returns the command of a server with two models, and room for one.
    """
    sys.path.insert(0, str(EXAMPLES))
    from weights import find_model

    models = (f"{name}={find_model(name)}" for name in ("tiny.en", "base"))
    limits = ("--max-models", "1", "--port", SERVER.rpartition(":")[2])
    command = [sys.executable, "-m", "whispercache", "serve", *models, *limits]
    return [*command, "--device", "cpu"]


def prometheus(tools: Path, scratch: Path) -> list[str | Path]:
    """
    Returns the command of a Prometheus that reads the server's metrics.
    """
    configuration = scratch / "prometheus.yml"
    configuration.write_text(CONFIGURATION, encoding="utf-8")
    return [
        tools / "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={scratch / 'data'}",
        f"--web.listen-address={PROMETHEUS}",
        "--log.level=warn",
    ]


@contextmanager
def running(command: list[str | Path], ready: str) -> Iterator[None]:
    """
    Runs a program, from when it is ready until the block ends.
    """
    program = subprocess.Popen(command)
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_there(ready):
            if program.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"{command[0]} is not ready")
            time.sleep(0.5)
        yield
    finally:
        program.terminate()
        program.wait(timeout=60)


def is_there(url: str) -> bool:
    """
    Returns True if an address answers well.
    """
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def transcribe(model: str) -> None:
    """
    Has the server transcribe a clip.
    """
    audio = (EXAMPLES / "clips" / "en-bread.flac").read_bytes()
    url = f"http://{SERVER}/v1/audio/transcriptions"
    form = {"model": model}
    httpx.post(url, data=form, files={"file": audio}, timeout=60).raise_for_status()


def queries() -> Iterator[tuple[str, str, str]]:
    """
    Yields the title of the panel, the legend and the query, of each query.
    """
    text = (HERE / "grafana.json").read_text(encoding="utf-8")
    for panel in json.loads(text)["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield panel["title"], target["legendFormat"], query


def ask(query: str) -> list[float]:
    """
    Returns the values that Prometheus has for a query now.
    """
    url = f"http://{PROMETHEUS}/api/v1/query"
    found = httpx.get(url, params={"query": query}).raise_for_status().json()
    return [float(each["value"][1]) for each in found["data"]["result"]]


def has_numbers(values: list[float]) -> bool:
    """
    Returns True if there are values, and all of them are numbers.
    """
    return bool(values) and not any(map(math.isnan, values))


def lint(tools: Path) -> None:
    """
    Has promtool judge the server's metrics: their names, units and help.
    """
    metrics = httpx.get(f"http://{SERVER}/metrics").raise_for_status().content
    subprocess.run([tools / "promtool", "check", "metrics"], input=metrics, check=True)


if __name__ == "__main__":
    main()
