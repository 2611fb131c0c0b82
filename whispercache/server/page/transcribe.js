// A recording, read by two models, side by side.

import { ApiError, call, events } from "./api.js";
import { announce, bytes, clock, element, hueOf, KeyedList, say, setAttribute } from "./dom.js";
import { compare } from "./diff.js";

const byId = (id) => document.getElementById(id);
const NONE = "";

class Option {
  constructor({ id, label }) {
    this.root = element("option", { value: id }, label);
  }

  update() {}
}

/**
 * What one model made of the recording.
 */
class Reading {
  constructor(model) {
    this.model = model;
    this.text = "";
    this.isDone = false;
    this.meta = element("p", { className: "detail" }, "waits for its turn");
    this.body = element("p", { className: "transcript", dir: "auto" });
    this.error = element("p", { className: "error", role: "alert" });
    const swatch = element("span", { className: `swatch ${hueOf(model)}` });
    swatch.setAttribute("aria-hidden", "true");
    this.root = element("article", { className: "reading" },
      element("h3", {}, swatch, element("span", { className: "name" }, model)),
      this.meta, this.body, this.error);
  }

  async read(file, signal) {
    const body = new FormData();
    body.append("file", file);
    body.append("model", this.model);
    body.append("stream", "true");
    this.began = performance.now();
    this.root.setAttribute("aria-busy", "true");
    try {
      await this.take(await call("v1/audio/transcriptions", { method: "POST", body, signal }));
      say(this.meta, this.result());
    } finally {
      this.seconds = this.passed();
      this.began = null;
      this.root.removeAttribute("aria-busy");
    }
  }

  async take(response) {
    for await (const event of events(response)) {
      if (event.error) throw new ApiError(event.error.message ?? "It failed in the middle.");
      if (event.type === "transcript.text.delta") {
        this.first_s ??= this.passed();
        this.text += event.delta;
        this.body.append(event.delta);
      } else if (event.type === "transcript.text.done") {
        this.text = event.text;
        this.audio_s = event.duration;
        say(this.body, event.text);
        this.isDone = true;
      }
    }
    if (!this.isDone) throw new ApiError("The answer broke off before its end.");
  }

  passed() {
    return this.began === null ? this.seconds : (performance.now() - this.began) / 1000;
  }

  result() {
    const taken_s = this.passed();
    const parts = [`${taken_s.toFixed(1)} s`];
    if (this.first_s !== undefined) parts.push(`first words after ${this.first_s.toFixed(1)} s`);
    const speed = this.audio_s / taken_s;
    if (this.audio_s) parts.push(`${speed.toFixed(speed < 10 ? 1 : 0)} × real time`);
    return parts.join(" · ");
  }

  tick() {
    if (this.began) say(this.meta, `listens ${clock(this.passed())}`);
  }

  fail(message) {
    say(this.meta, this.seconds ? `ended after ${this.seconds.toFixed(1)} s` : "not begun");
    say(this.error, message);
  }

  mark(runs, tag) {
    this.body.replaceChildren(
      ...runs.map(({ text, differs }) => (differs ? element(tag, {}, text) : text)));
  }
}

/**
 * The part of the page that transcribes.
 */
export class Listen {
  constructor() {
    this.readings = [];
    this.stop = null;
    this.dropped = null;
    this.selects = ["model-a", "model-b"].map((id) => ({
      field: byId(id),
      options: new KeyedList(byId(id), ({ id: value }) => value, (each) => new Option(each)),
    }));
    byId("listen-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    byId("listen-cancel").addEventListener("click", () => this.stop?.abort());
    byId("audio").addEventListener("change", () => this.choose(null));
    this.catchDrops(byId("listen"));
  }

  /**
   * Offer these models; what was chosen stays chosen.
   */
  offer(ids) {
    const models = ids.map((id) => ({ id, label: id }));
    const isNew = !this.selects[0].field.length;
    this.selects[0].options.update(models);
    this.selects[1].options.update([...models, { id: NONE, label: "none" }]);
    if (isNew && ids.length) this.selects[1].field.value = ids[1] ?? NONE;
  }

  tick() {
    for (const reading of this.readings) reading.tick();
  }

  catchDrops(zone) {
    // A file that is dropped beside the zone must not replace the page.
    for (const kind of ["dragover", "drop"]) {
      window.addEventListener(kind, (event) => event.preventDefault());
    }
    zone.addEventListener("dragover", () => zone.toggleAttribute("data-over", true));
    zone.addEventListener("dragleave", (event) => {
      if (!zone.contains(event.relatedTarget)) zone.removeAttribute("data-over");
    });
    zone.addEventListener("drop", (event) => {
      zone.removeAttribute("data-over");
      const file = event.dataTransfer.files[0];
      if (file) this.choose(file);
      else say(byId("listen-error"), "What was dropped is no file.");
    });
  }

  choose(file) {
    this.dropped = file;
    if (file) byId("audio").value = "";
    say(byId("listen-error"), "");
    const chosen = this.file();
    say(byId("listen-hint"), chosen
      ? `Chosen: ${chosen.name}, ${bytes(chosen.size)}.` : "Drop a recording here, or choose one.");
  }

  file() {
    return this.dropped ?? byId("audio").files[0];
  }

  async start() {
    if (this.stop) return;
    const file = this.file();
    const models = this.selects.map(({ field }) => field.value).filter((id) => id !== NONE);
    if (!file || !models.length) {
      say(byId("listen-error"), file ? "Choose a model." : "Choose a recording first.");
      byId(file ? "model-a" : "audio").focus();
      return;
    }
    this.stop = new AbortController();
    this.show(models.map((model) => new Reading(model)));
    // One after the other: at once, each would slow the other down.
    for (const reading of this.readings) await this.readWith(reading, file);
    this.stop = null;
    this.enable();
    this.conclude();
  }

  show(readings) {
    this.readings = readings;
    say(byId("listen-error"), "");
    byId("verdict").hidden = true;
    byId("readings").hidden = false;
    byId("readings").replaceChildren(...readings.map((reading) => reading.root));
    this.enable();
  }

  enable() {
    setAttribute(byId("listen-go"), "aria-disabled", String(this.stop !== null));
    setAttribute(byId("listen-cancel"), "aria-disabled", String(this.stop === null));
  }

  async readWith(reading, file) {
    const { signal } = this.stop;
    if (signal.aborted) {
      reading.fail("Cancelled.");
      return;
    }
    try {
      await reading.read(file, signal);
      announce(`${reading.model} is done after ${reading.seconds.toFixed(1)} seconds.`);
    } catch (error) {
      if (error.name === "AbortError") reading.fail("Cancelled.");
      else if (error instanceof ApiError) reading.fail(error.message);
      else reading.fail("The answer broke off before its end.");
    }
  }

  conclude() {
    const [first, second] = this.readings;
    if (!first?.isDone || !second?.isDone) return;
    const found = compare(first.text, second.text);
    const verdict = byId("verdict");
    say(verdict, found ? inWords(found, first.model, second.model)
      : "The two texts have too little in common to be compared word by word.");
    verdict.hidden = false;
    if (found) {
      first.mark(found.first, "del");
      second.mark(found.second, "ins");
    }
    announce(verdict.textContent);
  }
}

function inWords({ share, words }, first, second) {
  if (!words[0] && !words[1]) return "Neither of them heard a word.";
  if (share === 1) return `Both read the same ${words[0] > 1 ? `${words[0]} words` : "word"}.`;
  const percent = Math.min(99, Math.round(100 * share));
  return `${percent} % of the words agree. Underlined twice: only ${first}; `
    + `dotted: only ${second}.`;
}
