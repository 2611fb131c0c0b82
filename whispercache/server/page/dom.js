// Small parts of the document: made once, updated in place, and never out of strings.

/**
 * An element with properties and children. Text is always text, never markup.
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/**
 * Change what an element says, if it says something else. Untouched text is not read
 * out again, and a selection in it stays.
 */
export function say(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

export function setAttribute(where, name, value) {
  if (where.getAttribute(name) !== value) where.setAttribute(name, value);
}

/**
 * Show *items* as the children of *parent*: one view for each key, made once.
 *
 * A view is an object with a `root` and an `update(item)`. Views stay where they are
 * unless the order changes, so that focus in them survives every update.
 */
export class KeyedList {
  constructor(parent, keyOf, make) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.make = make;
    this.views = new Map();
  }

  update(items) {
    const keys = new Set(items.map(this.keyOf));
    for (const [key, view] of this.views) {
      if (!keys.has(key)) {
        view.root.remove();
        this.views.delete(key);
      }
    }
    let next = this.parent.firstElementChild;
    for (const item of items) {
      const key = this.keyOf(item);
      let view = this.views.get(key);
      if (!view) {
        view = this.make(item);
        this.views.set(key, view);
      }
      if (view.root === next) next = next.nextElementSibling;
      else this.parent.insertBefore(view.root, next);
      view.update(item);
    }
  }
}

const announcer = document.getElementById("announcer");
let clearing = 0;

/**
 * Tell those who listen to the page, once.
 */
export function announce(text) {
  announcer.textContent = text;
  clearTimeout(clearing);
  clearing = setTimeout(() => { announcer.textContent = ""; }, 10_000);
}

const UNITS = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];

/**
 * Bytes for people, as the library writes them: "1.5 GiB".
 */
export function bytes(n) {
  for (const [unit, size] of UNITS) {
    if (Math.abs(n) >= size) return `${(n / size).toFixed(1)} ${unit}`;
  }
  return `${n} B`;
}

/**
 * Seconds as a clock shows them: "0:42", "12:05", "1:00:00"; days in words.
 */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  if (hours >= 48) return `${Math.floor(hours / 24)} days`;
  const rest = String(whole % 60).padStart(2, "0");
  return hours
    ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}`
    : `${minutes}:${rest}`;
}

/**
 * The name of a language as it is written: "English", "Haitian Creole".
 */
export function titled(name) {
  return name.replace(/\b[a-z]/g, (letter) => letter.toUpperCase());
}

const HUES = 12;

/**
 * The colour of a model: its name's, on every page and for ever.
 *
 * This is FNV-1a, but for its first value: that one gives the usual sizes of Whisper a
 * colour each.
 */
export function hueOf(name) {
  let hash = 112;
  for (const byte of new TextEncoder().encode(name)) {
    hash = Math.imul(hash ^ byte, 16_777_619);
  }
  return `hue-${(hash >>> 0) % HUES}`;
}

/**
 * A button that copies what *text* returns. *what* is for those who hear the button's
 * name without seeing what stands beside it.
 */
export function copyButton(text, what) {
  const label = element("span", {}, "Copy");
  const button = element("button", { type: "button" },
    label, element("span", { className: "unseen" }, ` ${what}`));
  let saying = 0;
  button.addEventListener("click", async () => {
    const isDone = await copy(text());
    say(label, isDone ? "Copied" : "Not allowed");
    announce(isDone ? `Copied ${what}.` : "The browser does not let the page copy.");
    clearTimeout(saying);
    saying = setTimeout(() => say(label, "Copy"), 2000);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // There is none for pages that come over a network in the clear. They have the old way.
    const focused = document.activeElement;
    const field = element("textarea", { className: "unseen", value: text });
    document.body.append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    focused.focus();
    return isDone;
  }
}
