// The requests that the server works on, and those that it has answered lately.

import { ApiError, callJson } from "./api.js";
import { clock, element, hueOf, KeyedList, say, setAttribute } from "./dom.js";

const MOST_SHOWN = 50;
const MISSING = 404;

const byId = (id) => document.getElementById(id);

const KINDS = {
  "POST /v1/audio/transcriptions": "transcript",
  "POST /v1/audio/translations": "translation",
  "POST /asr": "transcript",
  "POST /inference": "transcript",
  "POST /api/models/{name}/load": "load",
  "POST /api/models/{name}/pin": "pin",
  "DELETE /api/models/{name}/pin": "unpin",
  "DELETE /api/models/{name}": "eviction",
};

const OUTCOMES = {
  answered: "done", refused: "refused", failed: "failed", left: "cancelled",
};

// The phases of which people ask, and how they are told once they are over.
const SPENT = [
  ["waiting", "waited"], ["downloading", "downloaded"], ["loading", "loaded"],
  ["working", "worked"],
];
const LEAST_TOLD_S = 0.05;

class Row {
  constructor(request) {
    this.chip = element("span", { className: "chip" });
    this.name = element("span", { className: "name" });
    this.kind = element("span");
    this.detail = element("span", { className: "detail" });
    const swatch = element("span", { className: `swatch ${hueOf(request.model ?? "")}` });
    swatch.setAttribute("aria-hidden", "true");
    swatch.hidden = request.model === null;
    const at = new Date(request.at_s * 1000);
    const time = element("time", { className: "time" }, at.toLocaleTimeString());
    time.dateTime = at.toISOString();
    this.root = element("li", {}, time, this.chip,
      element("span", { className: "two" },
        element("span", { className: "who" }, swatch,
          element("span", {}, this.name, " ", this.kind)), this.detail));
  }

  update(request) {
    this.request = request;
    setAttribute(this.root, "data-outcome", request.outcome ?? "under way");
    say(this.name, request.model ?? "");
    say(this.kind, KINDS[request.route] ?? request.route ?? "");
    this.tick(0);
  }

  tick(passed_s) {
    const { request } = this;
    const { outcome, phase, seconds } = request;
    say(this.chip, outcome ? OUTCOMES[outcome] ?? outcome : phase);
    const parts = request.who ? [request.who] : [];
    for (const [name, told] of SPENT) {
      const isNow = !outcome && name === phase;
      const spent_s = seconds[name] + (isNow ? passed_s : 0);
      if (isNow) parts.push(`${name} ${clock(spent_s)}`);
      else if (spent_s >= LEAST_TOLD_S) parts.push(`${told} ${spent_s.toFixed(1)} s`);
    }
    if (request.audio_s) parts.push(`${clock(Math.round(request.audio_s))} of audio`);
    if (request.error) parts.push(request.error);
    say(this.detail, parts.join(" · "));
  }
}

/**
 * The list of requests. A server that keeps none has no such part of the page.
 */
export class Requests {
  constructor() {
    this.isThere = true;
    this.all = [];
    this.rows = new KeyedList(byId("requests-list"), ({ id }) => id, (each) => new Row(each));
  }

  /**
   * Ask the server. Raises `ApiError`.
   */
  async refresh(options) {
    if (!this.isThere) return;
    try {
      this.update(await callJson("api/requests", options));
    } catch (error) {
      if (error.status !== MISSING) throw error;
      this.isThere = false;
      byId("requests").hidden = true;
    }
  }

  update({ under_way, lately }) {
    this.all = [...under_way, ...lately];
    this.rows.update(this.all.slice(0, MOST_SHOWN));
    byId("requests").hidden = false;
    say(byId("requests-count"), under_way.length ? `${under_way.length}` : "");
    byId("requests-scroll").hidden = !this.all.length;
    byId("no-requests").hidden = this.all.length > 0;
  }

  tick(passed_s) {
    for (const row of this.rows.views.values()) row.tick(passed_s);
  }

  /**
   * The seconds that a request has spent in each phase; null if the server does not tell.
   */
  async spent(id) {
    try {
      await this.refresh();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
    }
    return this.find(id)?.seconds ?? null;
  }

  find(id) {
    return this.all.find((request) => request.id === id);
  }
}
