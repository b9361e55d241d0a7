// Talk to the server: one place for the token, for errors in words, and for the stream of events.

const KEY = "wanflow.token";
// The page may stand behind a proxy under a path of its own.
const BASE = new URL(".", document.baseURI);

export const token = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/**
 * An answer that is not 2xx. status is 0 where there was none; field names what it is about.
 *
 * code is the server's; without one the message is the page's own.
 */
export class ApiError extends Error {
  constructor(status, message, field = "", code = "") {
    super(message);
    Object.assign(this, { status, field, code });
  }
}

export const address = (path) => new URL(path, BASE).href;

/** Post a form with files. A fetch would not tell how much of it is sent. */
const upload = (url, { headers, body, sent }) => new Promise((done, fail) => {
  const request = new XMLHttpRequest();
  request.open("POST", url);
  for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
  request.upload.onprogress = ({ loaded, total }) => sent(loaded / total);
  request.onload = () => done(new Response(request.responseText, { status: request.status }));
  request.onerror = () => fail(new TypeError("the connection broke"));
  request.send(body);
});

/** Send a request; return the answer if it is 2xx. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  let answer;
  try {
    answer = options.sent
      ? await upload(address(path), { ...options, headers })
      : await fetch(address(path), { cache: "no-cache", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, error.message);
  }
  if (answer.ok) return answer;
  let problem = {};
  try {
    problem = (await answer.json()).error || {};
  } catch {
    // a proxy between us and the server answers in HTML
  }
  const { message = `HTTP ${answer.status}`, param, code } = problem;
  throw new ApiError(answer.status, message, param || "", code || "other");
}

const json = async (path, options) => (await ask(path, options)).json();
const one = (id) => `v1/videos/${encodeURIComponent(id)}`;

export const api = {
  ready: () => ask("readyz").then(() => true, (error) => (error.status === 503 ? false : null)),
  settings: () => json("v1/settings"),
  get: (id) => json(one(id)),
  list: (limit, after) => {
    const query = new URLSearchParams({ limit, order: "desc", ...(after && { after }) });
    return json(`v1/videos?${query}`);
  },
  request: (id) => json(`${one(id)}/request`),
  recipe: (id) => json(`${one(id)}/recipe`),
  cancel: (id) => json(`${one(id)}/cancel`, { method: "POST" }),
  delete: (id) => json(one(id), { method: "DELETE" }),
};

/** Return a random key, also where the page has no secure context. */
export function random() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Submit a job. Files in the body make it a form, else it is JSON.
 *
 * `sent` hears which share of a form is sent. The key makes a second try harmless: the server
 * returns the job that the first one made.
 */
export async function create(body, key, sent) {
  const headers = { "Idempotency-Key": key };
  if (!Object.values(body).some((value) => value instanceof Blob)) {
    headers["Content-Type"] = "application/json";
    return json("v1/videos", { method: "POST", headers, body: JSON.stringify(body) });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) {
    if (value instanceof Blob) form.append(name, value, value.name || "picture");
    else form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return json("v1/videos", { headers, body: form, sent });
}

export const content = (id, variant = "video") => `${one(id)}/content?variant=${variant}`;
export const preview = (id) => `${one(id)}/preview`;

/** Return the bytes at a path, as an address that an image or a video can show. */
export async function blob(path) {
  return URL.createObjectURL(await (await ask(path)).blob());
}

const SILENCE_MS = 45_000; // the server sends a comment more often than that

/**
 * Follow server-sent events until the connection ends.
 *
 * EventSource cannot send a token, so the stream is read here.
 */
export async function follow(path, signal, opened, heard) {
  const watch = new AbortController();
  const stop = () => watch.abort();
  signal.addEventListener("abort", stop);
  let timer = setTimeout(stop, SILENCE_MS);
  try {
    const answer = await ask(path, {
      signal: watch.signal, headers: { Accept: "text/event-stream" },
    });
    opened();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(stop, SILENCE_MS);
      const parts = (rest + value).replace(/\r\n?/g, "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) heard(JSON.parse(lines.map((line) => line.slice(5)).join("\n")));
      }
    }
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
  }
}
