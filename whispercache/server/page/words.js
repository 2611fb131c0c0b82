// A transcript as pieces with times, and as files. Nothing of the page in here.

/**
 * The text of a segment in pieces: its words with their times, and what stands between
 * them. Put together again they are the text, to the letter.
 */
export function piecesOf(text, words = []) {
  const pieces = [];
  let place = 0;
  for (const { word, start, end } of words) {
    const bare = word.trim();
    const at = bare ? text.indexOf(bare, place) : -1;
    // Not in the text: it cannot be clicked, and nothing else is lost.
    if (at < 0) continue;
    if (at > place) pieces.push({ text: text.slice(place, at) });
    pieces.push({ text: bare, start, end });
    place = at + bare.length;
  }
  if (place < text.length) pieces.push({ text: text.slice(place) });
  return pieces;
}

/**
 * Segments with their own words each, of the answer's one list of all words.
 */
export function withWords(segments, words = []) {
  let next = 0;
  return segments.map((segment, number) => {
    const until_s = segments[number + 1]?.start ?? Infinity;
    const first = next;
    while (next < words.length && words[next].start < until_s) next += 1;
    return { ...segment, words: words.slice(first, next) };
  });
}

/**
 * The whole text, as two transcripts are compared by it.
 */
export function textOf(segments) {
  return segments.map(({ text }) => text.trim()).join("\n");
}

/**
 * The runs of `compare` for each segment of a text that `textOf` made.
 */
export function shareOut(segments, runs) {
  const rest = runs.map((run) => ({ ...run }));
  return segments.map(({ text }, number) => {
    // The line break after the segment before it belongs to none.
    if (number) take(rest, 1);
    return take(rest, text.trim().length);
  });
}

function take(runs, length) {
  const taken = [];
  let missing = length;
  while (missing > 0 && runs.length) {
    const [{ text, differs }] = runs;
    taken.push({ text: text.slice(0, missing), differs });
    if (text.length <= missing) runs.shift();
    else runs[0].text = text.slice(missing);
    missing -= text.length;
  }
  return taken;
}

/**
 * Pieces, cut where runs begin and end, in groups that are one run each.
 */
export function overlay(pieces, runs) {
  const rest = pieces.map((piece) => ({ ...piece }));
  return runs.map(({ text, differs }) => {
    const within = [];
    let missing = text.length;
    while (missing > 0 && rest.length) {
      const [piece] = rest;
      within.push({ ...piece, text: piece.text.slice(0, missing) });
      const length = piece.text.length;
      if (length <= missing) rest.shift();
      else rest[0].text = piece.text.slice(missing);
      missing -= length;
    }
    return { differs, pieces: within };
  });
}

/**
 * The place of the last of *starts*, which ascend, that is not after *time_s*; -1 before
 * the first.
 */
export function placeAt(starts, time_s) {
  let [low, high] = [0, starts.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= time_s) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/**
 * The files that a transcript is offered as, by their ending, as the server writes them.
 */
export const FILES = {
  srt: (segments) => spans(segments).map(({ start, end, text }, number) => (
    // SubRip has no escape: an arrow in the text would be read as the times of a cue.
    `${number + 1}\n${stamp(start, ",")} --> ${stamp(end, ",")}\n${text.replaceAll("-->", "->")}\n\n`
  )).join(""),
  vtt: (segments) => `WEBVTT\n\n${spans(segments).map(({ start, end, text }) => (
    `${stamp(start, ".")} --> ${stamp(end, ".")}\n${escaped(text)}\n\n`)).join("")}`,
  txt: (segments) => spans(segments).map(({ text }) => `${inOneLine(text)}\n`).join(""),
};

function inOneLine(text) {
  return text.split(/\s+/).filter(Boolean).join(" ");
}

function spans(segments) {
  return segments.map(({ start, end, text }) => {
    const start_ms = Math.max(0, Math.round(1000 * start));
    return {
      start: start_ms,
      // A cue that ends when it starts is never shown.
      end: Math.max(Math.round(1000 * end), start_ms + 1),
      // An empty line would end the cue.
      text: text.split("\n").map(inOneLine).filter(Boolean).join("\n"),
    };
  }).filter(({ text }) => text);
}

function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function stamp(total_ms, point) {
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  const rest = String(total_ms % 1000).padStart(3, "0");
  return `${two(total_ms / 3_600_000)}:${two((total_ms / 60_000) % 60)}:`
    + `${two((total_ms / 1000) % 60)}${point}${rest}`;
}
