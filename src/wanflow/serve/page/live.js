// Keep the page true: events while there is a connection, questions while there is none.

import { api, follow } from "./api.js";
import { wordsOf } from "./parts.js";
import { state, active, drop, take, update } from "./store.js";

const PAGE = 40; // videos asked for at once
const POLL_MS = 2_000;
const HIDDEN_MS = 8_000; // a hidden tab frees its connection: a browser has six a server
const [LOADING_MS, READY_MS] = [2_000, 30_000]; // between two questions whether a job can start
const BACK_OFF_MS = [500, 1_000, 2_000, 4_000];

const pause = (ms, signal) =>
  new Promise((done) => {
    const timer = setTimeout(done, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      done();
    });
  });

/** Ask for the newest videos, and for those at work that are not among them. */
export async function refresh() {
  const known = [...state.jobs.values()];
  const list = await api.list(PAGE);
  const ids = new Set(list.data.map((video) => video.id));
  const last = list.data.at(-1);
  // What should be in this page and is not was deleted.
  const gone = known.filter((job) => !ids.has(job.id) && (!list.has_more || newer(job, last)));
  take(list.data);
  const others = known.filter((job) => active(job) && !ids.has(job.id) && !gone.includes(job));
  await Promise.all([...gone, ...others].map((job) => ask(job.id)));
  if (!state.asked) update({ more: list.has_more, oldest: list.last_id, asked: true });
}

const newer = (job, last) => last && job.created_at > last.created_at;

async function ask(id) {
  try {
    take([await api.get(id)]);
  } catch (error) {
    if (error.status !== 404) throw error;
    drop([id]);
  }
}

/** Ask for videos before those that are shown, until there is one that is not. */
export async function earlier() {
  for (let after = state.oldest, fresh = false; !fresh; ) {
    let list;
    try {
      list = await api.list(PAGE, after);
    } catch (error) {
      if (error.status !== 404 || !after) throw error;
      after = ""; // it was deleted: go through all, from the newest
      continue;
    }
    fresh = !list.has_more || list.data.some((video) => !state.jobs.has(video.id));
    take(list.data, true);
    after = list.last_id || after;
    update({ more: list.has_more, oldest: after });
  }
}

function heard(event) {
  if (event.deleted) drop([event.id]);
  else if (event.image) update({ previews: new Map(state.previews).set(event.id, event.image) });
  else if (event.object === "list") take(event.data);
  else if (event.object === "video") take([event]);
}

/** Ask for the settings; return whether the server lets us in. */
async function enter() {
  try {
    update({ settings: await api.settings() });
    return true;
  } catch (error) {
    if (error.status !== 401) throw error;
    update({ token: sessionStorage.getItem("wanflow.token") ? "wrong" : "needed" });
    return false;
  }
}

/** Watch whether a job can start: a model of many gigabytes loads for minutes. */
async function watch(signal) {
  while (!signal.aborted) {
    const ready = await api.ready();
    if (ready !== state.ready) update({ ready });
    await pause(ready ? READY_MS : LOADING_MS, signal);
  }
}

let running = new AbortController();

/** Begin again: after a token, or when the tab is shown. */
export function restart() {
  running.abort();
  running = new AbortController();
  run(running.signal);
  watch(running.signal);
}

async function run(signal) {
  for (let failures = 0; !signal.aborted; ) {
    try {
      if (!(await enter())) return; // the token's dialog restarts
      await refresh();
      if (document.hidden) {
        update({ link: "resting" });
        await pause(HIDDEN_MS, signal);
        continue;
      }
      let asking;
      await follow("v1/events", signal, () => {
        failures = 0;
        update({ link: "live", token: "" });
        // Between the list and the connection something may have happened.
        asking = refresh().catch(() => {});
      }, heard);
      await asking;
      update({ link: "polling" });
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) {
        update({ token: "needed" });
        return;
      }
      update({ link: error.status === 0 ? "lost" : "polling", why: wordsOf(error) });
    }
    if (signal.aborted) return;
    await wait(BACK_OFF_MS[Math.min(failures++, BACK_OFF_MS.length - 1)], signal);
  }
}

/** Wait for the next try to connect; meanwhile ask. */
async function wait(ms, signal) {
  const until = Date.now() + ms;
  while (!signal.aborted && Date.now() < until) {
    await pause(Math.min(POLL_MS, until - Date.now()), signal);
    try {
      await refresh();
      update({ link: "polling" });
    } catch (error) {
      if (error.status === 401) return;
      update({ link: "lost" });
    }
  }
}

document.addEventListener("visibilitychange", restart);
