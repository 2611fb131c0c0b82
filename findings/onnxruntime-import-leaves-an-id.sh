#!/bin/sh
# onnxruntime: since 1.29 its mere import, on Linux too, writes an id of the machine's user
# and a database of usage data into the user's cache directory, and starts a thread for them.
# faster-whisper imports it for voice activity detection. ORT_DISABLE_TELEMETRY=1, set
# before the import, prevents that.
#
# Seen: no file from 1.28.0; deviceid and onnxruntime.db from 1.32.0; none from 1.32.0 with
# the variable.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset ORT_DISABLE_TELEMETRY XDG_CACHE_HOME
files() {
    home=$(mktemp -d -p "$work")
    HOME=$home env "$2" "$work/$1/bin/python" -c 'import onnxruntime; print(end="")'
    sleep 1
    find "$home" -type f | wc -l
}
for version in 1.28.0 1.32.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet "onnxruntime==$version"
done
before=$(files 1.28.0 NOTHING=1)
after=$(files 1.32.0 NOTHING=1)
told=$(files 1.32.0 ORT_DISABLE_TELEMETRY=1)
echo "files after the import of 1.28.0, of 1.32.0, and with the variable: $before $after $told"
test "$before" -eq 0 && test "$after" -gt 0 && test "$told" -eq 0
