// How other programs use this server: its address, and what to write.

import { copyButton, say } from "./dom.js";

const byId = (id) => document.getElementById(id);
const KEY = "YOUR-KEY";

// For a shell and for Python, whatever a model is called.
const quoted = (text) => (
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const literal = (text) => JSON.stringify(text);

function curl(base, model, needsKey) {
  return [
    `curl ${quoted(`${base}/audio/transcriptions`)}`,
    ...(needsKey ? [`  -H 'Authorization: Bearer ${KEY}'`] : []),
    `  -F file=@talk.wav -F ${quoted(`model=${model}`)}`,
  ].join(" \\\n");
}

function python(base, model, needsKey) {
  return `from pathlib import Path
from openai import OpenAI

client = OpenAI(
    base_url=${literal(base)},
    api_key=${literal(needsKey ? KEY : "none")},
)
heard = client.audio.transcriptions.create(
    model=${literal(model)},
    file=Path("talk.wav"),
)
print(heard.text)`;
}

const WAYS = { "use-base": (base) => base, "use-curl": curl, "use-python": python };

export class Use {
  constructor() {
    this.base = new URL("v1", document.baseURI).href;
    for (const id of Object.keys(WAYS)) {
      const what = byId(`${id}-title`).textContent;
      byId(`${id}-title`).after(copyButton(() => byId(id).textContent, what));
    }
  }

  /**
   * Show it for this model.
   */
  update(model, needsKey) {
    for (const [id, write] of Object.entries(WAYS)) {
      say(byId(id), write(this.base, model, needsKey));
    }
  }
}
