// Vercel's AI SDK: prints what it hears in CLIP at URL.
import { readFile } from "node:fs/promises";
import { createOpenAI } from "@ai-sdk/openai";
import { transcribe } from "ai";

const [url, clip, model, options] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "any" });
const { text, segments, words, language, durationInSeconds, warnings } =
  await transcribe({
    model: openai.transcription(model),
    audio: await readFile(clip),
    maxRetries: 0,
    ...JSON.parse(options ?? "{}"),
  });
const heard = { text, segments, words, language, durationInSeconds, warnings };
console.log(JSON.stringify(heard));
