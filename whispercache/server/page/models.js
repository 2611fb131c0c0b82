// The models on the server's list, with what can be done to them.

import { ApiError, callJson, modelPath } from "./api.js";
import { announce, bytes, clock, element, hueOf, KeyedList, say, setAttribute } from "./dom.js";
import { stateOf } from "./live.js";

// A second press stops what the first began, but not when it belongs to a double click.
const DOUBLE_CLICK_MS = 700;

// Browsers open six connections to a server, and answers can take long. Half of them
// stay free for asking what goes on, and for a recording.
const MOST_AT_ONCE = 3;
let running = 0;

const ACTIONS = {
  load: { method: "POST", path: "load", label: "Load", doing: "loading" },
  pin: { method: "POST", path: "pin", label: "Pin", doing: "pinning" },
  unpin: { method: "DELETE", path: "pin", label: "Unpin", doing: "unpinning" },
  evict: { method: "DELETE", path: "", label: "Evict", doing: "evicting" },
};

const DONE = {
  loaded: "is in memory.",
  pinned: "is in memory and stays.",
  unpinned: "may leave again.",
  evicted: "has left memory.",
  absent: "was not in memory.",
};

class Button {
  constructor(id, press) {
    this.label = element("span");
    this.root = element("button", { type: "button" },
      this.label, element("span", { className: "unseen" }, ` ${id}`));
    this.root.addEventListener("click", () => {
      if (this.root.getAttribute("aria-disabled") !== "true") press();
    });
  }

  // A button that is out of use for now keeps its place in the order of tabs, and focus.
  update(label, isUsable) {
    say(this.label, label);
    setAttribute(this.root, "aria-disabled", String(!isUsable));
  }
}

class Offer {
  constructor(id, changed) {
    this.id = id;
    this.changed = changed;
    this.models = [];
    this.action = null;
    this.state = element("span", { className: "detail" });
    this.buttons = {
      load: new Button(id, () => this.press("load")),
      pin: new Button(id, () => this.press(this.isPinned ? "unpin" : "pin")),
      evict: new Button(id, () => this.press("evict")),
    };
    this.error = element("p", { className: "error", role: "alert" });
    this.swatch = element("span", { className: `swatch ${hueOf(id)}` });
    this.swatch.setAttribute("aria-hidden", "true");
    this.root = element("li", {}, this.swatch,
      element("span", { className: "two" },
        element("span", { className: "name" }, id), this.state),
      element("span", { className: "buttons" },
        ...Object.values(this.buttons).map((button) => button.root)),
      this.error);
  }

  get isPinned() {
    return this.models.some((model) => model.pinned);
  }

  update(models) {
    this.models = models;
    setAttribute(this.swatch, "data-absent", String(!models.length));
    this.tick(0);
  }

  tick(passed_s) {
    const { action, models, buttons } = this;
    const isHere = models.some((model) => model.state !== "unloading");
    const isFree = action === null;
    say(this.state, action ? this.progress() : where(models, passed_s));
    buttons.load.update(this.labelOf("load"), isFree ? !isHere : action.name === "load");
    const pin = this.isPinned ? "unpin" : "pin";
    const isPinning = action?.name === "pin" || action?.name === "unpin";
    buttons.pin.update(isPinning ? "Cancel" : ACTIONS[pin].label, isFree || isPinning);
    buttons.evict.update(
      this.labelOf("evict"), isFree ? models.length > 0 : action.name === "evict");
  }

  labelOf(name) {
    return this.action?.name === name ? "Cancel" : ACTIONS[name].label;
  }

  progress() {
    const passed_s = (performance.now() - this.action.since) / 1000;
    return `${ACTIONS[this.action.name].doing} ${clock(passed_s)}`;
  }

  press(name) {
    if (this.action === null) this.perform(name);
    else if (performance.now() - this.action.since > DOUBLE_CLICK_MS) this.action.stop.abort();
  }

  async perform(name) {
    const { method, path, doing } = ACTIONS[name];
    if (running >= MOST_AT_ONCE) {
      say(this.error, "Wait until one of the others is done, or cancel it.");
      return;
    }
    running += 1;
    const stop = new AbortController();
    this.action = { name, stop, since: performance.now() };
    say(this.error, "");
    this.tick(0);
    try {
      const { signal } = stop;
      const { status } = await callJson(modelPath(this.id, path), { method, signal });
      announce(`${this.id} ${DONE[status] ?? "is done."}`);
    } catch (error) {
      if (error.name === "AbortError") announce(`Stopped ${doing} ${this.id}.`);
      else if (error instanceof ApiError) say(this.error, error.message);
      else throw error;
    } finally {
      running -= 1;
      this.action = null;
      this.tick(0);
      this.changed();
    }
  }
}

function where(models, passed_s) {
  if (!models.length) return "not in memory";
  return models.map((model) => {
    const pinned = model.pinned ? ", pinned" : "";
    const state = stateOf(model, passed_s);
    return `${state} on ${model.device}, ${bytes(model.bytes)}${pinned}`;
  }).join("; ");
}

/**
 * The models that a name of the list stands for: those of that name, else those of that
 * name in whatever compute type.
 */
export function modelsOf(id, models) {
  const exact = models.filter((model) => model.name === id);
  if (exact.length) return exact;
  return models.filter((model) => model.name === `${id}:${model.compute_type}`);
}

/**
 * The list of models.
 */
export class Offers {
  constructor(changed) {
    this.ids = [];
    this.list = new KeyedList(
      document.getElementById("offers"), ({ id }) => id, ({ id }) => {
        const offer = new Offer(id, changed);
        return {
          root: offer.root,
          update: ({ models }) => offer.update(models),
          tick: (passed_s) => offer.tick(passed_s),
        };
      });
  }

  /**
   * Ask the server which there are.
   */
  async refresh() {
    const empty = document.getElementById("no-offers");
    try {
      const { data } = await callJson("v1/models");
      this.ids = data.map((model) => model.id);
      say(empty, "This server offers no models.");
      empty.hidden = this.ids.length > 0;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      say(empty, error.message);
      empty.hidden = false;
    }
    return this.ids;
  }

  update(models) {
    this.list.update(this.ids.map((id) => ({ id, models: modelsOf(id, models) })));
  }

  tick(passed_s) {
    for (const view of this.list.views.values()) view.tick(passed_s);
  }
}
