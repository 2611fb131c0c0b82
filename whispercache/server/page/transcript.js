// What a model heard, line by line with times; it follows the player, and leads it.

import { element, setAttribute } from "./dom.js";
import { overlay, piecesOf, placeAt, shareOut } from "./words.js";

/**
 * One line: the time at which it was said, and the words.
 */
class Line {
  constructor(segment) {
    this.segment = segment;
    const text = segment.text.trim();
    this.pieces = piecesOf(text, segment.words);
    this.said = element("p", { className: "said", dir: "auto" });
    const time = timeOf(segment.start);
    this.button = element("button", { type: "button", className: "at", tabIndex: -1 }, time);
    setAttribute(this.button, "aria-label", `Play from ${time}`);
    this.button.dataset.at = segment.start;
    this.root = element("li", {}, this.button, this.said);
    // Without the times of words, a click anywhere in it means its beginning.
    if (!this.pieces.some(({ start }) => start !== undefined)) {
      this.said.dataset.start = segment.start;
    }
    this.fill([{ text, differs: false }]);
  }

  fill(runs, tag) {
    this.said.replaceChildren(...overlay(this.pieces, runs).flatMap(({ differs, pieces }) => {
      const made = pieces.map(({ text, start }) => {
        if (start === undefined) return text;
        const word = element("span", {}, text);
        word.dataset.start = start;
        return word;
      });
      return differs ? [element(tag, {}, ...made)] : made;
    }));
  }
}

function timeOf(seconds) {
  const [minutes, rest] = [Math.floor(seconds / 60), Math.floor(seconds) % 60];
  return `${minutes}:${String(rest).padStart(2, "0")}`;
}

/**
 * The lines of a transcript. A line can be reached by Tab, and from there all others by
 * arrow keys: an hour of speech has too many of them for Tab alone.
 */
export class Transcript {
  constructor(player) {
    this.player = player;
    this.lines = [];
    this.spots = [];
    this.starts = [];
    this.now = null;
    this.root = element("ol", { className: "transcript" });
    this.root.addEventListener("click", (event) => this.click(event.target));
    this.root.addEventListener("keydown", (event) => {
      if (this.press(event.key)) event.preventDefault();
    });
    this.root.addEventListener("focusin", ({ target }) => this.rove(target));
  }

  get segments() {
    return this.lines.map(({ segment }) => segment);
  }

  /**
   * Show text that has no times yet.
   */
  sketch(delta) {
    if (!this.root.firstChild) {
      this.root.append(element("li", {}, element("p", { className: "said", dir: "auto" })));
    }
    this.root.querySelector("p").append(delta);
    this.root.scrollTop = this.root.scrollHeight;
  }

  /**
   * Show these segments, in place of what was there.
   */
  fill(segments) {
    this.lines = segments.map((segment) => new Line(segment));
    this.root.replaceChildren(...this.lines.map(({ root }) => root));
    this.root.scrollTop = 0;
    if (this.lines.length) this.lines[0].button.tabIndex = 0;
    this.index();
  }

  /**
   * Mark what differs from another transcript.
   */
  mark(runs, tag) {
    const shares = shareOut(this.segments, runs);
    this.lines.forEach((line, number) => line.fill(shares[number], tag));
    this.index();
    this.follow(this.player.time_s);
  }

  index() {
    this.spots = [...this.root.querySelectorAll("[data-start]")];
    this.starts = this.spots.map(({ dataset }) => Number(dataset.start));
  }

  click(target) {
    const { at } = target.dataset;
    const start = at ?? target.closest("[data-start]")?.dataset.start;
    // Who marks text to copy it does not want to hear it.
    if (start === undefined || !getSelection().isCollapsed) return;
    this.player.play(Number(start));
  }

  press(key) {
    const here = this.lines.findIndex(({ button }) => button === document.activeElement);
    if (here < 0) return false;
    const lines = { ArrowUp: here - 1, ArrowDown: here + 1, Home: 0, End: this.lines.length - 1 };
    const words = { ArrowLeft: -1, ArrowRight: 1 };
    if (key in lines) this.lines[lines[key]]?.button.focus();
    else if (key in words) this.step(words[key]);
    else return false;
    return true;
  }

  step(n) {
    const start_s = this.starts[placeAt(this.starts, this.player.time_s) + n];
    if (start_s !== undefined) this.player.seek(start_s);
  }

  rove(button) {
    for (const line of this.lines) line.button.tabIndex = line.button === button ? 0 : -1;
  }

  /**
   * Show which word is heard at this time.
   */
  follow(time_s) {
    const spot = this.spots[placeAt(this.starts, time_s)] ?? null;
    if (spot === this.now) return;
    this.now?.removeAttribute("data-now");
    this.now = spot;
    if (spot) {
      spot.dataset.now = "";
      this.reveal(spot.closest("li"));
    }
  }

  reveal(line) {
    const { root } = this;
    const [top, bottom] = [line.offsetTop, line.offsetTop + line.offsetHeight];
    if (top >= root.scrollTop && bottom <= root.scrollTop + root.clientHeight) return;
    root.scrollTop = top - root.clientHeight / 3;
  }
}
