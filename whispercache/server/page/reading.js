// What one model makes of a recording: its request, its times, and its text.

import { ApiError, call, events } from "./api.js";
import {
  announce, clock, copyButton, element, hueOf, say, setAttribute, titled,
} from "./dom.js";
import { Transcript } from "./transcript.js";
import { FILES, textOf, withWords } from "./words.js";

const REFUSED = 400;

const PHASES = {
  arriving: "is sent", decoding: "is decoded", waiting: "waits",
  downloading: "the model is downloaded", loading: "the model is loaded",
};

// Models that cannot tell when words were said; they are not asked for it twice.
const wordless = new Set();

export class Reading {
  /**
   * What the server knows of a request comes from *requests*.
   */
  constructor(model, player, requests) {
    this.model = model;
    this.requests = requests;
    this.isDone = false;
    this.began = null;
    this.seconds = null;
    this.transcript = new Transcript(player);
    this.meta = element("p", { className: "detail" }, "waits for its turn");
    this.error = element("p", { className: "error", role: "alert" });
    this.tools = element("p", { className: "buttons tools", hidden: true });
    const swatch = element("span", { className: `swatch ${hueOf(model)}` });
    swatch.setAttribute("aria-hidden", "true");
    this.root = element("article", { className: "reading" },
      element("header", {},
        element("h3", {}, swatch, element("span", { className: "name" }, model)), this.tools),
      this.meta, this.transcript.root, this.error);
    this.root.setAttribute("aria-label", model);
  }

  /**
   * Ask the model. Raises `ApiError`, or AbortError if it was cancelled.
   */
  async read(file, language, signal) {
    this.began = performance.now();
    setAttribute(this.root, "aria-busy", "true");
    try {
      await this.take(await this.ask(file, language, signal));
      this.isDone = true;
    } finally {
      this.seconds = (performance.now() - this.began) / 1000;
      this.began = null;
      this.root.removeAttribute("aria-busy");
    }
    this.offer(file);
    this.explain(await this.requests.spent(this.id));
  }

  async ask(file, language, signal) {
    const body = new FormData();
    body.append("file", file);
    body.append("model", this.model);
    if (language) body.append("language", language);
    body.append("stream", "true");
    body.append("response_format", "verbose_json");
    const wantsWords = !wordless.has(this.model);
    for (const each of wantsWords ? ["segment", "word"] : ["segment"]) {
      body.append("timestamp_granularities[]", each);
    }
    // Its name in the server's list of requests.
    this.id = newId();
    const headers = { "X-Request-ID": this.id };
    try {
      return await call("v1/audio/transcriptions", { method: "POST", body, headers, signal });
    } catch (error) {
      const isAboutWords = error.status === REFUSED && error.param === "timestamp_granularities";
      if (!wantsWords || !isAboutWords) throw error;
      wordless.add(this.model);
      return this.ask(file, language, signal);
    }
  }

  /**
   * Take the text as it comes. The times of its lines and words come with the end.
   */
  async take(response) {
    let last;
    for await (const event of events(response)) {
      if (event.error) throw new ApiError(event.error.message ?? "It failed in the middle.");
      if (event.type === "transcript.text.delta") this.transcript.sketch(event.delta);
      if (event.type === "transcript.text.done") last = event;
    }
    if (!last) throw new ApiError("The answer broke off before its end.");
    const { segments, words, ...about } = last;
    this.about = about;
    this.transcript.fill(withWords(segments, words));
  }

  get segments() {
    return this.transcript.segments;
  }

  get text() {
    return textOf(this.segments);
  }

  follow(time_s) {
    this.transcript.follow(time_s);
  }

  mark(runs, tag) {
    this.transcript.mark(runs, tag);
  }

  /**
   * Tell what is done for it, and the time that it has taken so far.
   */
  tick() {
    if (this.began === null) return;
    const doing = PHASES[this.requests.find(this.id)?.phase] ?? "at work";
    say(this.meta, `${doing}, ${clock((performance.now() - this.began) / 1000)}`);
  }

  /**
   * Tell the time that it took: the model's work apart from all that came before it.
   */
  explain(spent) {
    const audio_s = this.about.duration;
    const work_s = spent?.working ?? this.seconds;
    const parts = [`${spent ? "worked" : "took"} ${work_s.toFixed(1)} s`];
    if (audio_s && work_s) {
      const speed = audio_s / work_s;
      parts.push(`${speed.toFixed(speed < 10 ? 1 : 0)} × real time`);
    }
    if (spent) {
      const load_s = spent.loading + spent.downloading;
      parts.push(load_s ? `loaded in ${load_s.toFixed(1)} s` : "was in memory");
      if (spent.waiting >= 0.05) parts.push(`waited ${spent.waiting.toFixed(1)} s`);
    }
    if (this.about.language) parts.push(titled(this.about.language));
    say(this.meta, parts.join(" · "));
    announce(`${this.model} is done after ${this.seconds.toFixed(1)} seconds.`);
  }

  offer(file) {
    if (!this.segments.length) {
      this.root.append(element("p", { className: "empty" }, "No word was heard."));
      return;
    }
    const name = file.name.replace(/\.\w+$/, "");
    const plain = () => this.segments.map(({ text }) => text).join("").trim();
    this.tools.append(copyButton(plain, `what ${this.model} heard`));
    for (const [ending, write] of Object.entries(FILES)) {
      const blob = new Blob([write(this.segments)], { type: "text/plain" });
      const link = element("a", { className: "button", download: `${name}.${ending}` },
        `.${ending}`);
      link.href = URL.createObjectURL(blob);
      link.setAttribute("aria-label", `Download ${name}.${ending} of ${this.model}`);
      this.tools.append(link);
    }
    this.tools.hidden = false;
  }

  cancel() {
    say(this.meta, this.seconds === null
      ? "cancelled before it began" : `cancelled after ${this.seconds.toFixed(1)} s`);
  }

  fail(message) {
    say(this.meta, `ended after ${this.seconds.toFixed(1)} s`);
    say(this.error, message);
  }

  /**
   * Let go of the files that it offered.
   */
  dispose() {
    for (const { href } of this.tools.querySelectorAll("a")) URL.revokeObjectURL(href);
  }
}

// `crypto.randomUUID` is for pages of https alone.
function newId() {
  return `page-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;
}
