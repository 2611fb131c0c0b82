"""
Memory of audio: the bytes that a call takes beside the samples, with and without voice
activity detection, and those predicted for it.

Each figure is from a process of its own: the growth of resident memory, at its peak
while the call begins and while its segments are iterated over. A micro model takes next
to nothing itself.

    python benchmarks/audio_memory.py [MINUTES ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

from micro import build_micro
from real import clip
from report import Table, machine, write

MIB = 1024**2
CALLS = {
    "plain": {},
    "vad": {"vad_filter": True},
    "batched": {"batch_size": 2},
}

CHILD = """
import json, sys
import numpy as np
from faster_whisper.vad import get_vad_model
from whispercache import ModelCache, read_audio
from whispercache.engine.sizes.footprint import Workload, audio_bytes, read_header
from whispercache.engine.calls.prepare import workload_of

directory, minutes, options, clip, is_ours = map(json.loads, sys.argv[1:])

def status(name):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024

speech = read_audio(clip).samples
samples = np.tile(speech, 1 + minutes * 60 * 16000 // len(speech))
samples = np.ascontiguousarray(samples[: minutes * 60 * 16000], np.float32)
with ModelCache(variants=False) as cache, cache.lease(directory, "cpu") as whisper:
    batch = options.pop("batch_size", None)
    call = whisper.transcribe
    if not is_ours:
        from faster_whisper import BatchedInferencePipeline, WhisperModel
        whisper = WhisperModel(directory, "cpu")
        call = whisper.transcribe
    if batch:
        if is_ours:
            call = cache._core.loader.batched(whisper)
        else:
            call = BatchedInferencePipeline(whisper).transcribe
        options["batch_size"] = batch
    get_vad_model()
    next(call(speech[:16000], **options)[0], None)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    segments, _ = call(samples, language="en", **options)
    making = status("VmHWM") - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    next(segments, None)
    keeping = status("VmHWM") - before
architecture = read_header(directory).architecture
workload = workload_of(options, batch, len(samples))
print(json.dumps([making, keeping, *audio_bytes(architecture, workload)]))
"""


def figures(model: str, name: str, minutes: int, *, is_ours: bool) -> list[str]:
    """
    Measures a call in a process of its own; returns MiB, and those predicted for ours.
    """
    arguments = [model, minutes, CALLS[name], clip("en-harbour-long"), is_ours]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(json.dumps, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [f"{each / MIB:.0f}" for each in json.loads(done.stdout)]
    return found if is_ours else [*found[:2], "", ""]


def main() -> None:
    lengths = [int(text) for text in sys.argv[1:]] or [10, 30]
    head = ["", "minutes", "making, MiB", "keeping, MiB", "predicted", "predicted"]
    table = Table("Memory of a call, beside its samples", head)
    with tempfile.TemporaryDirectory() as folder:
        model = str(build_micro(Path(folder, "micro"), "hello world"))
        for name in CALLS:
            for minutes in lengths:
                for whose in ("faster-whisper", "whispercache"):
                    is_ours = whose == "whispercache"
                    cells = figures(model, name, minutes, is_ours=is_ours)
                    table.add(f"{name}, {whose}", str(minutes), *cells)
    write("audio_memory", [machine(), table], to_file=False)


if __name__ == "__main__":
    main()
