#!/bin/sh
# FFmpeg 9: subtitles in MP4 (mov_text) end where the next one begins. Two voices that speak at
# the same time overlap in SRT, WebVTT and Matroska; by way of MP4 the first is cut, and with no
# warning. From WebVTT, text in braces comes out as markup of another format, and a no-break
# space, as French has before "?", as "\h".
#
# Seen: a subtitle from 0 to 5 s, with the next at 2 s, ends at 2 s after MP4, at 5 s after
# Matroska; "{laughs} Oui&nbsp;?" becomes "\{{}laughs} Oui\h?".
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet imageio-ffmpeg==0.8.1
ffmpeg=$("$work/venv/bin/python" -c 'import imageio_ffmpeg as it; print(it.get_ffmpeg_exe())')
"$ffmpeg" -version | head -n 1
cat > "$work/two.srt" <<'SRT'
1
00:00:00,000 --> 00:00:05,000
one

2
00:00:02,000 --> 00:00:07,000
other
SRT
cat > "$work/text.vtt" <<'VTT'
WEBVTT

00:00.000 --> 00:02.000
{laughs} Oui&nbsp;?
VTT
convert() {
    "$ffmpeg" -nostdin -loglevel error -i "$@"
}
convert "$work/two.srt" -c:s mov_text "$work/two.mp4"
convert "$work/two.srt" "$work/two.mkv"
for way in mp4 mkv; do
    convert "$work/two.$way" "$work/$way.srt"
    echo "by way of $way: $(grep -e '-->' "$work/$way.srt" | head -n 1)"
done
convert "$work/text.vtt" "$work/text.srt"
cat "$work/text.srt"
grep -q '^00:00:00,000 --> 00:00:02,000' "$work/mp4.srt"
grep -q '^00:00:00,000 --> 00:00:05,000' "$work/mkv.srt"
grep -qxF '\{{}laughs} Oui\h?' "$work/text.srt"
