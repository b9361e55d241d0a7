// What the page knows: jobs, the server's settings, what a person chose. Components subscribe.

import { useEffect, useReducer } from "./lib/htm-preact.js";

import { speaker, wanted } from "./words.js";

/** Read what this browser keeps; a damaged or forbidden storage counts as empty. */
export function kept(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`wanflow.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a value; return whether there was room. */
export function keep(name, value) {
  try {
    localStorage.setItem(`wanflow.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const state = {
  jobs: new Map(), // id: video, as the server spoken it last
  settings: null, // of /v1/settings
  link: "starting", // starting, live, resting (a hidden tab), polling, lost
  why: "", // what the server says where it gives no settings
  ready: null, // whether a job can start now
  more: false, // the server has earlier videos
  oldest: "", // id of the last video that a list gave
  previews: new Map(), // id: a picture as an address, as events bring them
  token: "", // needed, wrong, or nothing
  form: null, // what is typed, see request.js
  pictures: {}, // image and last: files
  uploaded: 0, // share of the pictures that are on their way
  refused: null, // {field, message}: why the form was not sent
  stopping: {}, // ids of jobs that were asked to stop
  notice: "", // what went wrong beside the form
  chosen: [], // ids to compare
  playing: "", // id of the video that plays in place
  dialog: null, // {name, ...}
  next: "", // id of the element that has the focus after the dialog
  language: kept("language", wanted()),
  theme: kept("theme", "auto"),
  keys: kept("keys", true), // single-key shortcuts
  asked: false, // the first list is here
  spoken: "", // for screen readers, politely
};

let [count, least] = [0, 0]; // places in time of jobs that were heard of

const listeners = new Set();

/** Change what the page knows. */
export function update(changes) {
  Object.assign(state, changes);
  for (const listener of listeners) listener();
}

/** Draw a component again at each change. */
export function useStore() {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    listeners.add(again);
    return () => listeners.delete(again);
  }, []);
  return state;
}

/** Keep a choice in the browser too. */
export function choose(name, value) {
  keep(name, value);
  update({ [name]: value });
}

export const ACTIVE = ["queued", "in_progress"];
export const active = (job) => ACTIVE.includes(job.status);

/** Return places for unknown jobs that a list, newest first, has after known ones. */
function placesBelow(videos, earlier) {
  const places = new Map();
  let below = earlier;
  for (const { id } of videos) {
    if (state.jobs.has(id)) below = true;
    else if (below) places.set(id, --least);
  }
  return places;
}

/** Take what the server answers of some jobs; `earlier` than all that are known. */
export function take(videos, earlier = false) {
  const jobs = new Map(state.jobs);
  const places = placesBelow(videos, earlier);
  const now = Date.now();
  let spoken = state.spoken;
  for (const video of videos.toReversed()) { // a list has the newest first
    const before = jobs.get(video.id);
    // A list that was asked for before an event came is older than the event.
    if (before && !newer(before, video)) continue;
    spoken = announcement(before, video) || spoken;
    const order = before?.order ?? places.get(video.id) ?? count++;
    jobs.set(video.id, { ...video, grid: gridOf(video), heard: now, order });
  }
  const previews = new Map(state.previews);
  for (const id of previews.keys()) if (!active(jobs.get(id) || {})) previews.delete(id);
  update({ jobs, spoken, previews });
}

function newer(before, video) {
  if (!active(video)) return true;
  if (!active(before)) return false;
  const same = before.status === video.status && before.attempts === video.attempts;
  return !same || (video.progress ?? 0) >= (before.progress ?? 0);
}

/** Return what a screen reader shall say of a change: not each step. */
function announcement(before, video) {
  const say = speaker(state.language);
  const prompt = short(video.prompt);
  if (!before) return state.asked && video.status === "queued" ? say("now_queued", { prompt }) : "";
  if (before.status !== video.status) {
    const key = { in_progress: "started" }[video.status] || video.status;
    return say(`now_${key}`, { prompt });
  }
  if (video.status !== "in_progress") return "";
  if (video.expert && before.expert !== video.expert) {
    return say("now_expert", { prompt, expert: say(`expert_${video.expert}`) });
  }
  const quarter = (job) => Math.floor((job.progress ?? 0) / 25);
  if (quarter(video) === quarter(before)) return "";
  return say("now_percent", { prompt, percent: quarter(video) * 25 });
}

export const short = (text, most = 60) =>
  (text || "").length > most ? `${text.slice(0, most - 1)}…` : text || "";

/** Forget jobs that are no more. */
export function drop(ids) {
  const jobs = new Map(state.jobs);
  for (const id of ids) jobs.delete(id);
  update({ jobs, chosen: state.chosen.filter((id) => !ids.includes(id)) });
}

// Times are whole seconds; within one, the place tells.
const newest = (a, b) => b.created_at - a.created_at || b.order - a.order;

/** Return the jobs at work, then those that wait, in the order in which they will run. */
export function queue() {
  const rank = (job) => (job.status === "in_progress" ? -1 : job.queue_position ?? 0);
  return [...state.jobs.values()].filter(active).sort((a, b) => rank(a) - rank(b) || newest(b, a));
}

/** Return what the gallery shows, newest first: jobs that ended, and grids as one. */
export function gallery() {
  const grids = new Map();
  for (const job of state.jobs.values()) {
    if (job.grid) grids.set(job.grid.id, [...(grids.get(job.grid.id) || []), job]);
  }
  const alone = (job) => !job.grid || grids.get(job.grid.id).length === 1;
  const items = [...state.jobs.values()]
    .filter((job) => !active(job) && alone(job))
    .map((job) => ({ ...job, job }));
  for (const [id, jobs] of grids) {
    if (jobs.length === 1) continue;
    jobs.sort((a, b) => a.grid.place - b.grid.place);
    items.push({ ...jobs[0], id, jobs, job: null });
  }
  return items.sort(newest);
}

// A grid is a mark on its jobs, which the server keeps: every tab and every browser shows it.
const MARK = "wanflow-grid:";

export const gridMark = (grid) => MARK + JSON.stringify(grid);

function gridOf(video) {
  if (typeof video.user !== "string" || !video.user.startsWith(MARK)) return null;
  try {
    const { id, vary, value, place } = JSON.parse(video.user.slice(MARK.length));
    const known = ["seed", "cfg_high", "cfg_low"].includes(vary);
    return known ? { id: String(id), vary, value: Number(value), place: Number(place) } : null;
  } catch {
    return null; // somebody else's mark
  }
}

// Two tabs agree: one hears of the other's choices.
addEventListener("storage", (event) => {
  for (const name of ["language", "theme", "keys"]) {
    if (event.key === `wanflow.${name}`) update({ [name]: kept(name, state[name]) });
  }
});
