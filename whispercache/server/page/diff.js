// Where two texts differ, word by word. Nothing of the page in here.

// Beyond this many differences the texts have so little in common that marking each word
// would say nothing, and take long.
const MOST_DIFFERENCES = 3000;

/**
 * The pieces of a text: words, and what stands between them. Splits languages that
 * write no spaces, too.
 */
function pieces(text) {
  const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });
  return Array.from(segmenter.segment(text), ({ segment, isWordLike }) => ({
    text: segment,
    // Upper case and composed letters are the same word.
    word: isWordLike ? segment.normalize("NFKC").toLowerCase() : null,
  }));
}

/**
 * The pairs of places that a shortest edit script leaves alone; null if it is too long.
 * This is Myers' greedy algorithm: after *d* edits, `reach` holds for each diagonal how
 * far the first text can be read.
 */
function matches(first, second) {
  const [n, m] = [first.length, second.length];
  const most = Math.min(n + m, MOST_DIFFERENCES);
  let reach = new Int32Array(2 * most + 3);
  const middle = most + 1;
  const trail = [];
  for (let d = 0; d <= most; d += 1) {
    trail.push(reach.slice(middle - d - 1, middle + d + 2));
    for (let k = -d; k <= d; k += 2) {
      const isDown = k === -d || (k !== d && reach[middle + k - 1] < reach[middle + k + 1]);
      let x = isDown ? reach[middle + k + 1] : reach[middle + k - 1] + 1;
      while (x < n && x - k < m && first[x] === second[x - k]) x += 1;
      reach[middle + k] = x;
      if (x >= n && x - k >= m) return walkBack(trail, n, m);
    }
  }
  return null;
}

function walkBack(trail, n, m) {
  const pairs = [];
  let [x, y] = [n, m];
  for (let d = trail.length - 1; d >= 0; d -= 1) {
    const [reach, middle, k] = [trail[d], d + 1, x - y];
    const isDown = k === -d || (k !== d && reach[middle + k - 1] < reach[middle + k + 1]);
    const before = isDown ? k + 1 : k - 1;
    const from = d === 0 ? 0 : reach[middle + before];
    const start = d === 0 ? 0 : from + (isDown ? 0 : 1);
    while (x > start) pairs.push([(x -= 1), (y -= 1)]);
    if (d > 0) [x, y] = [from, from - before];
  }
  return pairs;
}

/**
 * Runs of text that are the same in both or not.
 */
function runs(all, common) {
  const found = [];
  let place = 0;
  for (const { text, word } of all) {
    // What stands between two words goes with the one before it, but for its mark.
    const differs = word !== null && !common.has(place);
    if (word !== null) place += 1;
    const last = found.at(-1);
    if (last && last.differs === differs) last.text += text;
    else found.push({ text, differs });
  }
  return joined(found);
}

/**
 * Marks with only a space in between are one mark.
 */
function joined(found) {
  const result = [];
  for (const run of found) {
    const [before, gap] = [result.at(-2), result.at(-1)];
    if (run.differs && before?.differs && /^\s+$/.test(gap.text)) {
      result.pop();
      before.text += gap.text + run.text;
    } else result.push(run);
  }
  return result;
}

/**
 * Both texts in runs, and the share of their words that are the same; null if they have
 * too little in common.
 */
export function compare(first, second) {
  const [left, right] = [pieces(first), pieces(second)];
  const words = [left, right].map(
    (all) => all.filter(({ word }) => word !== null).map(({ word }) => word));
  const pairs = matches(...words);
  if (pairs === null) return null;
  const n = words[0].length + words[1].length;
  return {
    first: runs(left, new Set(pairs.map(([x]) => x))),
    second: runs(right, new Set(pairs.map(([, y]) => y))),
    words: words.map((each) => each.length),
    share: n ? (2 * pairs.length) / n : 1,
  };
}
