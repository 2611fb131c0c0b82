#!/bin/sh
# PyAV 18.1 (FFmpeg's resampler): how loud the mono of a recording is depends on the sample
# format that is asked for. With 16-bit output the gains of the mix are scaled down until
# nothing can clip; with float output they are not. So the same file is 3 dB louder as
# floats, which then exceed 1, and of 5.1, where films have their speech in the centre,
# the 16-bit mono has the speech 11 dB quieter.
#
# Seen: 0.5 in both channels of stereo is 0.50 as s16 and 0.71 as flt; 0.5 in the centre of 5.1
# is 0.15 as s16 and 0.50 as flt.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet av==18.1.0 numpy
"$work/venv/bin/python" - <<'PYTHON'
import av
import numpy as np

RATE = 16_000


def mono(layout: str, channels: list[float], form: str) -> float:
    samples = np.repeat(np.float32(channels)[:, None], RATE, axis=1)
    frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
    frame.sample_rate = RATE
    resampler = av.AudioResampler(format=form, layout="mono", rate=RATE)
    made = [piece.to_ndarray() for piece in resampler.resample(frame)]
    level = float(np.concatenate(made, axis=1)[0, RATE // 2])
    return level / 32_768 if form == "s16" else level


print("PyAV", av.__version__)
stereo = [mono("stereo", [0.5, 0.5], form) for form in ("s16", "flt")]
centre = [mono("5.1", [0, 0, 0.5, 0, 0, 0], form) for form in ("s16", "flt")]
print("0.5 in both channels of stereo, as s16 and flt:", *np.round(stereo, 2))
print("0.5 in the centre of 5.1, as s16 and flt:", *np.round(centre, 2))
assert abs(stereo[0] - 0.5) < 0.01 and abs(stereo[1] - 0.707) < 0.01, "stereo has changed"
assert centre[0] < 0.2 and centre[1] > 0.45, "5.1 has changed"
PYTHON
