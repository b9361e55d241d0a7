// From the form to requests, and from a recipe back to either.

import { ApiError, api, create, random } from "./api.js";
import { gridMark, keep, kept, state, take, update } from "./store.js";
import { say, varied } from "./parts.js";

export const MOST = 16; // videos that one press makes
const EMPTY = {
  prompt: "", negative: "", preset: "", size: "", own: "", length: "", unit: "frames",
  steps: "", seed: "", count: "1", cfg_high: "", cfg_low: "", shift: "", loras: {}, rest: {},
};
// Fields of a request that have no place in the form; taken over from a recipe, they are kept.
const REST = [
  "sample_solver", "boundary", "fps", "exact_size", "cfg_start", "cfg_start_steps", "lora_from",
];

/** Return the form as it was left. What one model takes may mean nothing to another. */
export function formOf(settings) {
  const was = kept("form", {});
  const { prompt = "", negative = "" } = was;
  const known = was.model === settings.model ? was : { prompt, negative };
  return { ...EMPTY, ...known, model: settings.model };
}

export function setForm(changes) {
  const form = { ...state.form, ...changes };
  keep("form", form);
  update({ form });
}

export const clearForm = () => {
  setForm(EMPTY);
  setPictures({});
  update({ refused: null });
};

/** Draw a seed that a person can type. */
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Take the first picture of some files; where there is none, or it is too large, say so. */
export function offer(name, files) {
  const found = [...files].find((one) => one.type.startsWith("image/"));
  const most = state.settings.limits.body_bytes;
  const mb = (bytes) => Math.ceil(bytes / 1e5) / 10;
  const message = !found ? say("not_picture", { name: files[0].name })
    : found.size > most
      ? say("picture_large", { name: found.name, size: mb(found.size), most: mb(most) }) : "";
  if (!message) setPictures({ ...state.pictures, [name]: found });
  update({ refused: message ? { field: name, message } : null });
}

/** Return the number that a person typed: also "3,5", and the wide digits of Chinese input. */
function read(text) {
  const plain = text.normalize("NFKC").trim();
  return Number(plain.replace(/^([+-]?\d*),(\d+)$/, "$1.$2"));
}

function number(text, field, whole = true) {
  const value = read(text);
  if (!Number.isFinite(value) || (whole && !Number.isInteger(value))) {
    const key = whole ? "is_whole" : "is_number";
    throw new ApiError(400, say(key, { field: say(field), value: text }), field);
  }
  return value;
}

/** Return the frames that a length means: of 4n + 1, the nearest. */
export function framesOf(form, settings) {
  const text = form.length || String(settings.defaults.num_frames);
  const value = read(text);
  if (form.unit === "frames" || !form.length) return value;
  return Math.max(0, Math.round((value * settings.fps - 1) / 4)) * 4 + 1;
}

/** Return the body of a request, without what the form leaves to the model. */
export function bodyOf(form, settings) {
  if (!form.prompt.trim()) throw new ApiError(400, say("prompt_missing"), "prompt");
  const { image, last } = state.pictures;
  if (settings.picture_needed && !image && !last) {
    throw new ApiError(400, say("picture_missing"), "image");
  }
  const body = { ...form.rest, prompt: form.prompt };
  if (form.negative) body.negative_prompt = form.negative;
  if (form.preset) body.preset = form.preset;
  const size = form.size === "own" ? form.own.normalize("NFKC").trim() : form.size;
  if (form.size === "own" && !size) {
    throw new ApiError(400, say("size_missing", { size: settings.defaults.size }), "size");
  }
  if (size) body.size = size.replace(/\s*[*×X]\s*/g, "x");
  if (form.length) {
    number(form.length, "length", false);
    body.num_frames = framesOf(form, settings);
  }
  if (form.steps) body.num_inference_steps = number(form.steps, "steps");
  if (form.seed) body.seed = number(form.seed, "seed");
  for (const name of ["cfg_high", "cfg_low"]) {
    if (form[name]) body[name] = number(form[name], name, false);
  }
  if (form.shift) body.flow_shift = number(form.shift, "shift", false);
  // A strength is text here: "0.8", or "high=1,low=0.6" from a recipe.
  const loras = Object.entries(form.loras).filter(([name]) => settings.loras.includes(name));
  if (loras.length) body.lora = loras.map(([name, strength]) => `${name}@${strength || 1}`);
  if (settings.pictures > 0 && image) body.image = image;
  if (settings.pictures > 1 && last) body.last_image = last;
  return body;
}

/** Return one body for each seed, from a first one on. */
export function bySeed(body, count) {
  const first = body.seed ?? drawSeed();
  return Array.from({ length: count }, (_, i) => ({ ...body, seed: first + i }));
}

/**
 * Submit jobs; several become a grid, which varies one value.
 *
 * Returns:
 *   how many the server took, and the error that ended it, if any.
 */
export async function send(bodies, vary = "seed") {
  const id = random();
  let [sent, pictures] = [0, {}];
  for (const [place, body] of bodies.entries()) {
    if (body.seed != null && !Number.isSafeInteger(body.seed)) { // JSON here would round it
      return { sent, failed: new ApiError(400, say("seed_large"), "seed") };
    }
    const user = bodies.length > 1 && gridMark({ id, vary, value: body[vary], place });
    try {
      const job = await persist({ ...body, ...pictures, ...(user && { user }) });
      take([job]);
      sent += 1;
      if (sent === 1 && bodies.length > 1) pictures = await picturesOf(job, body);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      return { sent, failed: error };
    }
  }
  return { sent, failed: null };
}

/** Return the files of a body by the names under which the server has them: sent once is enough. */
async function picturesOf(job, body) {
  const names = ["image", "last_image"].filter((name) => body[name] instanceof Blob);
  if (!names.length) return {};
  const request = await requestOf(job);
  return Object.fromEntries(names.map((name) => [name, request[name]]));
}

/** Submit one job; where no answer came, ask again under the same key. */
async function persist(body) {
  const key = random();
  const sent = (uploaded) => update({ uploaded });
  try {
    return await create(body, key, sent);
  } catch (error) {
    if (error.status !== 0) throw error;
    await new Promise((done) => setTimeout(done, 1000));
    return await create(body, key, sent);
  } finally {
    sent(0);
  }
}

/** Return what tells a job of a grid from the others. */
export const labelOf = ({ vary, value }) =>
  vary === "seed" ? say("seed_is", { seed: value }) : `${say(varied(vary))} ${value}`;

/** Return the body that makes a job again; its pictures are in it, by name. */
export const requestOf = (job) => api.request(job.id);

/** Return the form that a body comes from. */
export function formFrom(body, settings) {
  const text = (value) => (value == null ? "" : String(value));
  const size = text(body.size);
  const usual = size === settings.defaults.size || size === "";
  const own = !usual && !settings.sizes.includes(size);
  const loras = (body.lora || []).map((one) => {
    const at = one.lastIndexOf("@");
    return [one.slice(0, at), one.slice(at + 1)];
  });
  return {
    ...EMPTY,
    prompt: text(body.prompt),
    negative: text(body.negative_prompt),
    size: usual ? "" : own ? "own" : size,
    own: own ? size : "",
    length: text(body.frame_num),
    steps: text(body.sample_steps),
    seed: text(body.seed),
    cfg_high: text(body.cfg_high),
    cfg_low: text(body.cfg_low),
    shift: text(body.sample_shift),
    loras: Object.fromEntries(loras),
    rest: restOf(body),
  };
}

function restOf(body) {
  const names = REST.filter((name) => body[name] != null);
  if (body.negative_prompt === "") names.push("negative_prompt"); // none, not the model's own
  return Object.fromEntries(names.map((name) => [name, body[name]]));
}

/** Return the pictures that a body names: the server has them. */
export const picturesFrom = (body) => ({ image: body.image, last: body.last_image });

// Pictures outlive a reload too; localStorage is too small for them.

function database(work) {
  return new Promise((done, fail) => {
    const open = indexedDB.open("wanflow", 1);
    open.onupgradeneeded = () => open.result.createObjectStore("pictures");
    open.onerror = () => fail(open.error);
    open.onsuccess = () => {
      const asked = work(open.result.transaction("pictures", "readwrite").objectStore("pictures"));
      asked.onsuccess = () => done(asked.result);
      asked.onerror = () => fail(asked.error);
    };
  });
}

export const keptPictures = () =>
  database((store) => store.get("form")).then((found) => found || {}, () => ({}));

export function setPictures(pictures) {
  update({ pictures });
  database((store) => store.put(pictures, "form")).catch(() => {}); // a private window has none
}
