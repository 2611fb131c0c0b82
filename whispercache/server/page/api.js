// The server, as the page sees it: relative addresses, the key, and errors in words.

const KEY = "whispercache-key";

/**
 * The server's own words for why it did not do something; or ours, if it did not answer.
 */
export class ApiError extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/**
 * The answer to a request. Raises `ApiError`, or AbortError if it was cancelled.
 */
export async function call(path, options = {}) {
  const auth = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const headers = { ...options.headers, ...auth };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const why = error.name === "TimeoutError" ? "takes too long to answer" : "does not answer";
    throw new ApiError(`The server ${why}.`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/**
 * The same as JSON. An answer that is none means that something else answers.
 */
export async function callJson(path, options = {}) {
  return read(await call(path, options));
}

/**
 * The JSON of an answer.
 */
export function read(response) {
  return unbroken(response.json());
}

async function unbroken(reading) {
  try {
    return await reading;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The answer broke off, or is not whispercache's.");
  }
}

async function refusal(response) {
  const { status, statusText } = response;
  const plain = `The server answered ${status} ${statusText}`.trim();
  try {
    const { error } = await response.json();
    const isOurs = typeof error?.message === "string" && error.message;
    return new ApiError(isOurs ? error.message : plain, status, error?.param);
  } catch {
    return new ApiError(plain, status); // a proxy's page, for example
  }
}

/**
 * The address of a model. A name may hold slashes, which stay, and anything else.
 */
export function modelPath(id, action = "") {
  const safe = id.split("/").map(encodeURIComponent).join("/");
  return `api/models/${safe}${action && `/${action}`}`;
}

/**
 * The objects that a response sends as server-sent events, as they come.
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await unbroken(reader.read());
    if (done) return;
    const parts = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart())
        .join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
