#!/bin/sh
# benchmarks/gpu and tests/gpu/test_gpu.py on a machine with a card, CUDA 13 and no
# network: one line, which ends within LIMIT_S seconds (570). See docs/gpu.md.
#
#     sh benchmarks/gpu/offline.sh [all|benchmark|suite] [the benchmark's options]
#
# WHEELS   directory with the wheels (wheels)
# OUT      where results go (benchmarks/results)
# SCRATCH  for models, kernels and packages; a second run goes on from there
# PYTHON   Python 3.12 with numpy, tokenizers and the others of docs/gpu.md (python3)
set -u
started=$(date +%s)
what=all
case ${1:-} in all | benchmark | suite) what=$1 && shift ;; esac
cd "$(dirname "$0")/../.." || exit 1
PYTHON=${PYTHON:-python3}
LIMIT_S=${LIMIT_S:-570}
SUITE_S=150 # what `all` leaves for the suite: a guess, no card has run it
WHEELS=${WHEELS:-wheels}
OUT=${OUT:-benchmarks/results}
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}/whispercache-card}

left() {
    left_s=$((LIMIT_S - ($(date +%s) - started)))
    echo $((left_s > 1 ? left_s : 1)) # none at all would mean for ever
}

fail() {
    echo "offline.sh: $*" >&2
    exit 2
}

# Packages -----------------------------------------------------------------------------

mkdir -p "$OUT" "$SCRATCH/links" || fail "cannot write to $OUT and $SCRATCH"
SCRATCH=$(cd "$SCRATCH" && pwd)
site=$SCRATCH/site
if [ ! -e "$site/av.py" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" \
        "$WHEELS"/*.whl || fail "the wheels in $WHEELS were not installed"
    touch "$site/av.py" # stands for PyAV, which decodes files
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

# cuBLAS -------------------------------------------------------------------------------

# Version 12 where there is one, else 13 in its place: PyTorch's, or the toolkit's.
cublas=$("$PYTHON" -c '
import glob, sys
from whispercache.devices.cublas import cublas_problem
places = [f"{entry}/nvidia/*/lib" for entry in sys.path]
places += ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib"]
found = [name for place in places for name in glob.glob(f"{place}/libcublas.so.13")]
print([*found, "look"][0] if cublas_problem() else "")')
[ "$cublas" != look ] || cublas=$(find / -path /proc -prune -o \
    -name libcublas.so.13 -print 2> /dev/null | head -n 1)
if [ -n "$cublas" ]; then
    ln -sf "$cublas" "$SCRATCH/links/libcublas.so.12"
    # The folder of the real one, too: it needs its neighbours. What was in the variable
    # may be where the driver is.
    inherited=${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH="$SCRATCH/links:$(dirname "$cublas")$inherited"
fi

# What there is ------------------------------------------------------------------------

{
    date -u
    nvidia-smi
    "$PYTHON" --version
    echo "in the place of libcublas.so.12: ${cublas:-nothing}"
    "$PYTHON" -c '
from whispercache.devices.cublas import cublas_problem
print(cublas_problem() or "libcublas.so.12 can be loaded")
import ctranslate2, faster_whisper, filelock, platformdirs, psutil, pynvml
print("CTranslate2", ctranslate2.__version__, "sees", end=" ")
print(ctranslate2.get_cuda_device_count(), "cards")
'
    df -h "$SCRATCH" "$OUT"
} > "$OUT/machine.txt" 2>&1
cat "$OUT/machine.txt"

# Both ---------------------------------------------------------------------------------

export CUDA_CACHE_PATH="$SCRATCH/kernels"
export WHISPERCACHE_GPU_MODELS="$SCRATCH/models"
worst=0

if [ "$what" = all ] || [ "$what" = benchmark ]; then
    budget=$(($(left) - 15))
    [ "$what" = all ] && budget=$((budget - SUITE_S))
    timeout -k 10 "$(left)" "$PYTHON" benchmarks/gpu --out "$OUT" \
        --models "$WHISPERCACHE_GPU_MODELS" --budget "$budget" "$@" || worst=$?
fi
if [ "$what" = all ] || [ "$what" = suite ]; then
    export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # whatever else is installed there
    timeout -k 10 "$(left)" "$PYTHON" -m pytest -c /dev/null --rootdir=. \
        -p no:cacheprovider -v -rs --durations=0 -o faulthandler_timeout=120 \
        tests/gpu/test_gpu.py > "$OUT/suite.txt" 2>&1 || worst=$?
    tail -n 60 "$OUT/suite.txt"
fi
exit "$worst"
