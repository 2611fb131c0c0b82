// OpenAI's client for Node: prints what it hears in CLIP at URL, in the way of asking
// that is named.
import { createReadStream } from "node:fs";
import OpenAI from "openai";

const [url, clip, way, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const file = createReadStream(clip);

async function hear() {
  if (way === "models") {
    const names = [];
    for await (const each of client.models.list()) names.push(each.id);
    return { names, one: (await client.models.retrieve(model)).id };
  }
  if (way === "translation") return client.audio.translations.create({ file, model });
  if (way === "stream") {
    const events = [];
    const stream = true;
    const asked = client.audio.transcriptions.create({ file, model, stream });
    for await (const event of await asked) events.push(event);
    return { events };
  }
  const words = { response_format: "verbose_json", timestamp_granularities: ["word"] };
  const options = way === "words" ? words : {};
  return client.audio.transcriptions.create({ file, model, ...options });
}

console.log(JSON.stringify(await hear()));
