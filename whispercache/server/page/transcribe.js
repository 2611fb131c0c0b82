// The part of the page that transcribes: a recording, a language, one model or two.

import { ApiError, callJson } from "./api.js";
import {
  announce, bytes, clock, element, KeyedList, say, setAttribute, titled,
} from "./dom.js";
import { compare } from "./diff.js";
import { Reading } from "./reading.js";
import { Microphone, Player } from "./sound.js";

const byId = (id) => document.getElementById(id);
const NONE = "";

class Option {
  constructor({ id, label }) {
    this.root = element("option", { value: id }, label);
  }

  update() {}
}

function optionsOf(field) {
  return new KeyedList(field, ({ id }) => id, (each) => new Option(each));
}

export class Transcribe {
  constructor(requests) {
    this.requests = requests;
    this.readings = [];
    this.stop = null;
    this.file = null;
    this.isAsking = false;
    this.player = new Player();
    this.microphone = new Microphone((file) => {
      say(byId("record"), "Record");
      byId("record").removeAttribute("data-on");
      this.choose(file);
    });
    this.fields = [byId("model-a"), byId("model-b")];
    this.options = this.fields.map(optionsOf);
    byId("transcribe-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    byId("cancel").addEventListener("click", () => this.stop?.abort());
    byId("audio").addEventListener("change", () => {
      if (byId("audio").files[0]) this.choose(byId("audio").files[0]);
      // The same file may be chosen once more, when it has changed.
      byId("audio").value = "";
    });
    byId("record").addEventListener("click", () => this.record());
    this.catchDrops();
  }

  /**
   * Offer these models; what was chosen stays chosen.
   */
  offer(ids) {
    const models = ids.map((id) => ({ id, label: id }));
    this.options[0].update(models);
    const isNew = !this.fields[1].length;
    this.options[1].update([{ id: NONE, label: "No, one will do" },
      ...ids.map((id) => ({ id, label: `with ${id}` }))]);
    if (isNew) this.fields[1].value = NONE;
    if (byId("language").length === 1) this.offerLanguages();
  }

  async offerLanguages() {
    let names;
    try {
      names = Object.entries(await callJson("api/languages"));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      return; // it can be detected; the next round asks again
    }
    const all = names.map(([id, name]) => ({ id, label: titled(name) }))
      .sort((a, b) => a.label.localeCompare(b.label, "en"));
    // Those of the reader come first.
    const own = new Set(navigator.languages.map((tag) => tag.split("-")[0].toLowerCase()));
    const [near, far] = [all.filter(({ id }) => own.has(id)), all.filter(({ id }) => !own.has(id))];
    byId("language").append(...[...near, ...far].map(
      ({ id, label }) => element("option", { value: id }, label)));
  }

  tick() {
    for (const reading of this.readings) reading.tick();
    if (this.microphone.isOn) {
      say(byId("record"), `Stop, ${clock(this.microphone.passed_s)}`);
    }
  }

  catchDrops() {
    let depth = 0;
    const over = (n) => {
      depth = n;
      document.body.toggleAttribute("data-over", depth > 0);
    };
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    window.addEventListener("dragenter", (event) => carriesFiles(event) && over(depth + 1));
    window.addEventListener("dragleave", (event) => carriesFiles(event) && over(depth - 1));
    // What is dropped must not replace the page.
    window.addEventListener("dragover", (event) => event.preventDefault());
    window.addEventListener("drop", (event) => {
      event.preventDefault();
      over(0);
      const file = event.dataTransfer.files[0];
      if (file) this.choose(file);
      else this.complain("What was dropped is no file.");
      byId("transcribe").scrollIntoView({ block: "nearest" });
    });
  }

  choose(file) {
    this.file = file;
    byId("source").toggleAttribute("data-chosen", true);
    say(byId("chosen"), file.name);
    say(byId("chosen-size"), bytes(file.size));
    say(byId("transcribe-error"), "");
    announce(`${file.name} is chosen.`);
  }

  async record() {
    if (this.microphone.isOn) {
      this.microphone.stop();
      return;
    }
    // The browser may ask its user first; a second press is none for a second recording.
    if (this.isAsking) return;
    this.isAsking = true;
    say(byId("transcribe-error"), "");
    try {
      await this.microphone.start();
      byId("record").toggleAttribute("data-on", true);
      this.tick();
    } catch (error) {
      this.complain(error.message);
    } finally {
      this.isAsking = false;
    }
  }

  complain(message) {
    say(byId("transcribe-error"), message);
  }

  async start() {
    if (this.stop) return;
    if (this.microphone.isOn) await this.microphone.stop();
    const { file } = this;
    const models = this.fields.map(({ value }) => value).filter((id) => id !== NONE);
    if (!file || !models.length) {
      this.complain(file ? "Choose a model." : "Choose a recording first.");
      byId(file ? "model-a" : "audio").focus();
      return;
    }
    this.stop = new AbortController();
    this.show(file, models.map((model) => new Reading(model, this.player, this.requests)));
    const language = byId("language").value;
    try {
      // One after the other: at once, each would slow the other down.
      for (const reading of this.readings) await this.readWith(reading, file, language);
    } finally {
      this.stop = null;
      this.enable();
    }
    this.conclude();
  }

  show(file, readings) {
    for (const reading of this.readings) reading.dispose();
    this.readings = readings;
    say(byId("transcribe-error"), "");
    say(byId("result-title"), file.name);
    byId("verdict").hidden = true;
    byId("result").hidden = false;
    byId("readings").replaceChildren(...readings.map((reading) => reading.root));
    this.player.open(file, readings);
    this.enable();
  }

  enable() {
    setAttribute(byId("go"), "aria-disabled", String(this.stop !== null));
    const cancel = byId("cancel");
    if (this.stop === null && document.activeElement === cancel) byId("go").focus();
    cancel.hidden = this.stop === null;
  }

  async readWith(reading, file, language) {
    const { signal } = this.stop;
    if (signal.aborted) {
      reading.cancel();
      return;
    }
    try {
      await reading.read(file, language, signal);
    } catch (error) {
      if (error instanceof ApiError) {
        reading.fail(error.message);
        return;
      }
      if (error.name !== "AbortError") throw error;
      reading.cancel();
      announce("Cancelled.");
    }
  }

  conclude() {
    const [first, second] = this.readings;
    if (!first.isDone || !second?.isDone) return;
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
