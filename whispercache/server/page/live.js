// What the cache is doing: devices as bars, the queue, the last events, the counters.

import { bytes, clock, element, hueOf, KeyedList, say, setAttribute } from "./dom.js";

const MOST_SHOWN = 50;
const RING = 2 * Math.PI * 6;
const KINDS = new Set(["loading", "loaded", "failed", "granted", "stopped", "evicted", "warning"]);

const byId = (id) => document.getElementById(id);

/**
 * What a model does, in words; *passed_s* seconds after the snapshot.
 */
export function stateOf(model, passed_s = 0) {
  if (model.state === "loading") return "loading";
  if (model.state === "unloading") return "leaving";
  if (model.leases) return model.leases > 1 ? `in use by ${model.leases}` : "in use";
  return model.idle_s === null ? "idle" : `idle ${clock(model.idle_s + passed_s)}`;
}

function look(model) {
  if (model.state !== "resident") return model.state;
  return model.leases ? "busy" : "idle";
}

/**
 * The models with an `id` each: names need not be unique, and one model can be on two
 * devices.
 */
function withIds(models) {
  const seen = new Map();
  return models.map((model) => {
    const name = `${model.device} ${model.name}`;
    const n = (seen.get(name) ?? 0) + 1;
    seen.set(name, n);
    return { ...model, id: `${name} ${n}` };
  });
}

// A cache lists its models by their last use. Bars that shuffle cannot be read, so each
// model keeps the place in which it was first seen.
const places = new Map();

function inPlace(models) {
  for (const { id } of models) if (!places.has(id)) places.set(id, places.size);
  return [...models].sort((a, b) => places.get(a.id) - places.get(b.id));
}

class Segment {
  constructor(model) {
    this.name = element("span", { className: "name" });
    this.size = element("span", { className: "size" });
    this.root = element("div", { className: `segment ${hueOf(model.name)}` },
      this.name, this.size);
  }

  update(model) {
    say(this.name, model.name.split("/").at(-1));
    say(this.size, bytes(model.bytes));
    setAttribute(this.root, "data-look", look(model));
    this.root.title = `${model.name}: ${bytes(model.bytes)}, ${stateOf(model)}`;
    this.root.style.width = `${(100 * model.bytes) / model.scale_bytes}%`;
    const share = model.bytes ? model.weights_bytes / model.bytes : 1;
    this.root.style.setProperty("--weights", `${100 * share}%`);
  }
}

class ModelRow {
  constructor(model) {
    this.name = element("span", { className: "name" });
    this.detail = element("span", { className: "detail" });
    this.state = element("span", { className: "chip" });
    this.memory = element("span");
    this.workspace = element("span", { className: "detail" });
    this.ring = ring();
    this.leaves = element("span");
    const swatch = element("span", { className: `swatch ${hueOf(model.name)}` });
    swatch.setAttribute("aria-hidden", "true");
    this.root = element("tr", { role: "row" },
      element("th", { scope: "row", role: "rowheader" },
        element("span", { className: "who" }, swatch,
          element("span", { className: "two" }, this.name, this.detail))),
      cell("State", this.state),
      cell("Memory", element("span", { className: "two" }, this.memory, this.workspace)),
      cell("Leaves", element("span", { className: "leaves" }, this.ring.root, this.leaves)));
  }

  update(model) {
    this.model = model;
    say(this.name, model.name);
    say(this.detail, detail(model));
    say(this.memory, bytes(model.bytes));
    say(this.workspace, model.workspace_bytes ? `${bytes(model.workspace_bytes)} for work` : "");
    setAttribute(this.root, "data-look", look(model));
  }

  tick(passed_s) {
    const { model } = this;
    say(this.state, stateOf(model, passed_s));
    const left_s = model.expires_in_s === null ? null : model.expires_in_s - passed_s;
    say(this.leaves, leaves(model, left_s));
    // An idle model has all of its keep-alive either behind it or before it.
    const whole_s = (model.idle_s ?? 0) + (model.expires_in_s ?? 0);
    this.ring.show(left_s === null || !whole_s ? null : Math.max(0, left_s / whole_s));
  }
}

function detail(model) {
  const parts = model.name.endsWith(`:${model.compute_type}`) ? [] : [model.compute_type];
  if (model.load_s) parts.push(`loaded in ${model.load_s.toFixed(1)} s`);
  if (model.loads > 1) parts.push(`${model.loads} times`);
  return parts.join(" · ");
}

function leaves(model, left_s) {
  if (model.state !== "resident") return "–";
  if (model.pinned) return "pinned";
  if (left_s !== null) return left_s > 0 ? `in ${clock(Math.ceil(left_s))}` : "now";
  return model.leases ? "after use" : "never";
}

function cell(label, ...children) {
  return element("td", { role: "cell", "data-label": label }, ...children);
}

/**
 * A small clock face that empties. Only for the eye: the time stands beside it.
 */
function ring() {
  const make = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const hand = make("circle", { class: "left", cx: 8, cy: 8, r: 6 });
  const root = make("svg", { class: "ring", viewBox: "0 0 16 16", "aria-hidden": "true" });
  root.append(make("circle", { class: "whole", cx: 8, cy: 8, r: 6 }), hand);
  return {
    root,
    show(share) {
      root.toggleAttribute("data-off", share === null);
      hand.style.strokeDasharray = `${RING * (share ?? 0)} ${RING}`;
    },
  };
}

class DeviceCard {
  constructor(device) {
    const id = `device-${device.device}`.replaceAll(/[^\w-]/g, "-");
    this.title = element("h3", { id });
    this.figures = element("p", { className: "figures" });
    this.segments = element("div", { className: "segments" });
    this.peak = element("div", { className: "peak" });
    this.full = element("div", { className: "full" });
    this.bar = element("div", { className: "bar", role: "img" },
      this.segments, this.peak, this.full);
    this.end = element("span");
    this.notes = element("span");
    const scale = element("p", { className: "scale" }, this.notes, this.end);
    const head = ["Model", "State", "Memory", "Leaves"].map(
      (text) => element("th", { scope: "col", role: "columnheader" }, text));
    const body = element("tbody", { role: "rowgroup" });
    this.table = element("table", { role: "table" },
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...head)), body);
    this.table.setAttribute("aria-labelledby", id);
    this.root = element("article", { className: "panel device" },
      element("header", {}, this.title, this.figures), this.bar, scale, this.table);
    this.root.setAttribute("aria-labelledby", id);
    this.rows = new KeyedList(body, (model) => model.id, (model) => new ModelRow(model));
    this.parts = new KeyedList(
      this.segments, (model) => model.id, (model) => new Segment(model));
  }

  update({ device, models }) {
    const { charged_bytes, capacity_bytes, limit_bytes, peak_bytes } = device;
    const scale_bytes = Math.max(capacity_bytes, charged_bytes, 1);
    const free_bytes = Math.max(0, capacity_bytes - charged_bytes);
    say(this.title, device.device);
    this.figures.replaceChildren(
      element("strong", {}, bytes(charged_bytes)), ` of ${bytes(capacity_bytes)}`);
    say(this.end, `${bytes(free_bytes)} free`);
    say(this.notes, notes(limit_bytes, capacity_bytes, peak_bytes));
    this.peak.style.left = `${Math.min(100, (100 * peak_bytes) / scale_bytes)}%`;
    this.peak.hidden = peak_bytes <= charged_bytes;
    this.full.style.left = `${(100 * capacity_bytes) / scale_bytes}%`;
    this.full.hidden = capacity_bytes >= scale_bytes;
    setAttribute(this.bar, "aria-label", inWords(device, models));
    this.parts.update(models.map((model) => ({ ...model, scale_bytes })));
    this.rows.update(models);
    this.table.hidden = !models.length;
    this.root.toggleAttribute("data-empty", !models.length);
  }

  tick(passed_s) {
    for (const row of this.rows.views.values()) row.tick(passed_s);
  }
}

function notes(limit_bytes, capacity_bytes, peak_bytes) {
  const limit = limit_bytes === null ? "no limit set" : `limit ${bytes(limit_bytes)}`;
  const less = limit_bytes !== null && capacity_bytes < limit_bytes
    ? `, others leave ${bytes(capacity_bytes)}` : "";
  return `${limit}${less} · peak ${bytes(peak_bytes)}`;
}

function inWords(device, models) {
  const used = `${bytes(device.charged_bytes)} of ${bytes(device.capacity_bytes)} used`;
  const each = models.map((model) => `${model.name} ${bytes(model.bytes)}`);
  return `${device.device}: ${[used, ...each].join("; ")}`;
}

// Cards come first, by number; the host, which every load passes through, last.
function cardsFirst(devices) {
  const rank = ({ device }) => (device === "cpu" ? 1 : 0);
  return [...devices].sort((a, b) => (
    rank(a) - rank(b) || a.device.localeCompare(b.device, "en", { numeric: true })));
}

class QueueRow {
  constructor() {
    this.models = element("span", { className: "name" });
    this.waited = element("span", { className: "time" });
    this.root = element("li", {}, this.models, this.waited);
  }

  update(request) {
    this.request = request;
    say(this.models, request.models.join(" + "));
  }

  tick(passed_s) {
    say(this.waited, clock(this.request.waited_s + passed_s));
  }
}

class EventRow {
  constructor(event) {
    const at = new Date(event.at_s * 1000);
    const time = element("time", { className: "time" }, at.toLocaleTimeString());
    time.dateTime = at.toISOString();
    const kind = KINDS.has(event.kind) ? event.kind : "other";
    this.root = element("li", { className: kind }, time,
      element("span", { className: "chip" }, event.kind),
      element("span", { className: "what" },
        element("span", { className: "name" }, event.model), ` ${event.text}`));
  }

  update() {} // what happened does not change
}

/**
 * The live part of the page.
 */
export class Live {
  constructor() {
    this.devices = new KeyedList(
      byId("devices"), ({ device }) => device.device, ({ device }) => new DeviceCard(device));
    this.queue = new KeyedList(byId("queue"), ({ place }) => place, () => new QueueRow());
    this.events = new KeyedList(
      byId("events"), (event) => `${event.at_s} ${event.number}`, (event) => new EventRow(event));
    this.counters = new Map();
  }

  update(snapshot) {
    const models = inPlace(withIds(snapshot.models));
    this.devices.update(cardsFirst(snapshot.devices).map((device) => (
      { device, models: models.filter((model) => model.device === device.device) })));
    byId("no-devices").hidden = snapshot.devices.length > 0;

    const { waiting } = snapshot;
    this.queue.update(
      waiting.slice(0, MOST_SHOWN).map((request, place) => ({ ...request, place })));
    say(byId("queue-count"), waiting.length ? `${waiting.length}` : "");
    const more = waiting.length - MOST_SHOWN;
    say(byId("no-queue"), more > 0 ? `and ${more} more` : "Nobody waits.");
    byId("no-queue").hidden = waiting.length > 0 && more <= 0;

    this.events.update(snapshot.events.slice(-MOST_SHOWN).reverse());
    byId("events-scroll").hidden = !snapshot.events.length;
    byId("no-events").hidden = snapshot.events.length > 0;
    this.count(snapshot.stats);
    this.tick(0);
  }

  count(stats) {
    const hits = stats.requests ? `${Math.round((100 * stats.hits) / stats.requests)} %` : "–";
    const shown = {
      requests: stats.requests, hits, loads: stats.loads, evictions: stats.evictions,
      "in use": stats.leases,
    };
    for (const [name, value] of Object.entries(shown)) {
      if (!this.counters.has(name)) {
        const figure = element("dd");
        byId("counters").append(element("div", {}, element("dt", {}, name), figure));
        this.counters.set(name, figure);
      }
      say(this.counters.get(name), String(value));
    }
  }

  /**
   * Let the clocks go on between two snapshots.
   */
  tick(passed_s) {
    for (const card of this.devices.views.values()) card.tick(passed_s);
    for (const row of this.queue.views.values()) row.tick(passed_s);
  }
}
