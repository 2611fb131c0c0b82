// The page: asks the server every second what it does, and hands the answer on.

import { ApiError, callJson, key } from "./api.js";
import { announce, clock, element, say, setAttribute } from "./dom.js";
import { Live } from "./live.js";
import { Offers } from "./models.js";
import { Requests } from "./requests.js";
import { Transcribe } from "./transcribe.js";
import { Use } from "./use.js";

const POLL_MS = 1000;
const PATIENCE_MS = 5000;
const OFFERS_MS = 30_000;
const TICK_MS = 100;
const NEEDS_KEY = 401;

const byId = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.live = new Live();
    this.offers = new Offers(() => this.poll());
    this.requests = new Requests();
    this.transcribe = new Transcribe(this.requests);
    this.use = new Use();
    this.snapshot = null;
    this.received = 0; // when, on this machine's clock: the server's may differ
    this.offered = -Infinity;
    this.silent_since = null;
    this.timer = 0;
    this.isPolling = false;
    this.seen = null; // the number of the last event that was looked at
  }

  start() {
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.useKey(byId("key-field").value.trim());
    });
    byId("forget-key").addEventListener("click", () => {
      key.forget();
      this.poll();
    });
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) clearTimeout(this.timer);
      else this.poll();
    });
    setInterval(() => this.tick(), TICK_MS);
    this.poll();
  }

  async poll() {
    if (this.isPolling) return;
    clearTimeout(this.timer);
    this.isPolling = true;
    try {
      const signal = AbortSignal.timeout(PATIENCE_MS);
      this.take(await callJson("api/ps", { signal }));
      await this.requests.refresh({ signal });
      await this.refreshOffers();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === NEEDS_KEY) this.askForKey(error.message);
      else this.complain(error.message);
    } finally {
      this.isPolling = false;
      const isAsking = !byId("key").hidden;
      if (!document.hidden && !isAsking) this.timer = setTimeout(() => this.poll(), POLL_MS);
    }
  }

  take(snapshot) {
    if (!Array.isArray(snapshot.devices)) {
      throw new ApiError("Something else than whispercache answers.");
    }
    if (this.silent_since !== null) announce("The server answers again.");
    this.silent_since = null;
    byId("trouble-place").replaceChildren();
    byId("key").hidden = true;
    byId("live").hidden = false;
    byId("forget-key").hidden = !key.get();
    this.pulse("live", "live");
    say(byId("version"), snapshot.version ? `version ${snapshot.version}` : "");
    this.snapshot = snapshot;
    this.received = performance.now();
    this.live.update(snapshot);
    this.offers.update(snapshot.models);
    this.use.update(byId("model-a").value || "MODEL", snapshot.requires_key);
    this.warn(snapshot.events);
  }

  async refreshOffers() {
    if (performance.now() - this.offered < OFFERS_MS) return;
    this.transcribe.offer(await this.offers.refresh());
    this.offered = this.offers.ids.length ? performance.now() : -Infinity;
    this.offers.update(this.snapshot.models);
  }

  /**
   * Read out what somebody should know: not each load, only what went wrong.
   */
  warn(events) {
    const last = events.at(-1)?.number ?? 0;
    if (this.seen !== null) {
      const news = events.filter(({ kind, number }) => kind === "warning" && number > this.seen);
      if (news.length) announce(`${news.at(-1).model} ${news.at(-1).text}`);
    }
    this.seen = last;
  }

  complain(message) {
    this.silent_since ??= performance.now();
    byId("live").toggleAttribute("data-stale", true);
    this.pulse("silent", "no answer");
    const place = byId("trouble-place");
    if (!place.firstChild) {
      const last = this.snapshot
        ? ` What you see is of ${new Date(this.snapshot.at_s * 1000).toLocaleTimeString()}.` : "";
      place.append(element("p", { className: "notice" },
        element("strong", {}, message), `${last} Asking again every second.`));
    } else say(place.querySelector("strong"), message);
  }

  askForKey(message) {
    const isAgain = !byId("key").hidden || key.get() !== "";
    this.silent_since = null;
    byId("trouble-place").replaceChildren();
    say(byId("key-error"), isAgain && key.get() ? `That key does not fit: ${message}` : "");
    key.forget();
    const wasHidden = byId("key").hidden;
    byId("key").hidden = false;
    byId("live").hidden = true;
    byId("forget-key").hidden = true;
    this.pulse("waiting", "needs a key");
    if (wasHidden) byId("key-field").focus();
  }

  useKey(given) {
    if (!/^[\x21-\x7e]+$/.test(given)) {
      say(byId("key-error"), "A key has letters, digits and marks of ASCII only.");
      return;
    }
    key.set(given);
    this.offered = -Infinity;
    byId("key-field").value = "";
    this.poll().then(() => {
      if (byId("key").hidden) byId("models-title").focus();
    });
  }

  pulse(state, text) {
    setAttribute(byId("pulse"), "data-state", state);
    byId("live").toggleAttribute("data-stale", state !== "live");
    say(byId("pulse-text"), text);
  }

  /**
   * Between two answers the clocks go on; without answers they stand still.
   */
  tick() {
    if (document.hidden || !this.snapshot) return;
    this.transcribe.tick();
    if (this.silent_since !== null) {
      const silent_s = (performance.now() - this.silent_since) / 1000;
      say(byId("pulse-text"), `no answer ${clock(silent_s)}`);
      return;
    }
    const passed_s = (performance.now() - this.received) / 1000;
    this.live.tick(passed_s);
    this.offers.tick(passed_s);
    this.requests.tick(passed_s);
  }
}

new Page().start();
