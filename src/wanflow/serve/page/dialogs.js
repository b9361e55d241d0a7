// What opens over the page: a recipe, a grid's values, a question, two videos, keys, the token.

import { html, useEffect, useRef, useState } from "./lib/htm-preact.js";

import { api, content, token } from "./api.js";
import { restart } from "./live.js";
import { Dialog, Icon, Said, closeDialog, say, useMedia, varied, wordsOf } from "./parts.js";
import {
  MOST, bySeed, formFrom, picturesFrom, requestOf, send, setForm, setPictures,
} from "./request.js";
import { choose, drop, short, state, update } from "./store.js";

/** Ask the server once for something that a dialog shows; return it, or an error in words. */
function useAsked(question, keys) {
  const [found, set] = useState({});
  useEffect(() => {
    let left = false;
    question().then(
      (value) => left || set({ value }),
      (error) => left || set({ error: wordsOf(error) }),
    );
    return () => {
      left = true;
    };
  }, keys);
  return found;
}

/** Return the values of a recipe by their names, without levels; those of the request are plain. */
function flat(value, name = "", found = {}) {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    for (const [key, one] of Object.entries(value)) {
      flat(one, name ? `${name}.${key}` : key.replace(/^request$/, ""), found);
    }
  } else if (value !== null && String(value) !== "") {
    found[name] = Array.isArray(value) ? value.join(", ") : String(value);
  }
  return found;
}

function Recipe({ job }) {
  // A job without a video has no recipe, but what was asked for.
  const ask = job.status === "completed" ? api.recipe : api.request;
  const { value, error } = useAsked(() => ask(job.id), [job.id]);
  const [copied, setCopied] = useState(false);
  const [wrong, setWrong] = useState("");
  const copy = () => navigator.clipboard.writeText(JSON.stringify(value, null, 2))
    .then(() => setCopied(true), (refused) => setWrong(refused.message));
  const use = async () => {
    try {
      const body = await requestOf(job);
      setForm(formFrom(body, state.settings));
      setPictures(picturesFrom(body));
      closeDialog("prompt");
    } catch (refused) {
      setWrong(wordsOf(refused));
    }
  };
  return html`
    <${Dialog} title=${say("recipe")}>
      ${error && html`<p class="error" role="alert">
        <${Said} words=${say("no_recipe", { message: error })} /></p>`}
      ${value && html`
        <div class="scroll" tabindex="0" role="group" aria-label=${say("recipe")}>
          <dl class="recipe">
            ${Object.entries(flat(value)).map(([name, one]) => html`
              <dt>${name}</dt><dd>${one}</dd>`)}
          </dl>
        </div>
        <div role="alert">${wrong && html`<p class="error"><${Said} words=${wrong} /></p>`}</div>
        <div class="actions">
          <button type="button" class="main" onClick=${use}>${say("use")}</button>
          ${navigator.clipboard && html`<button type="button" class="quiet" onClick=${copy}>
            ${say(copied ? "copied" : "copy")}</button>`}
        </div>`}
    <//>`;
}

function GridDialog({ job }) {
  const two = state.settings.experts.length === 2;
  const ways = two ? ["seed", "cfg_high", "cfg_low"] : ["seed", "cfg_high"];
  const words = (way) => say(varied(way));
  const [vary, setVary] = useState("seed");
  const [count, setCount] = useState("4");
  const [values, setValues] = useState("2, 3, 4, 5");
  const [wrong, setWrong] = useState("");
  const [busy, setBusy] = useState(false);
  const numbers = values.split(/[\s,，、]+/).filter(Boolean).map(Number);
  const many = vary === "seed" ? Number(count) : numbers.length;
  const make = async (event) => {
    event.preventDefault();
    if (busy) return undefined;
    const bad = vary !== "seed" && numbers.some((one) => !Number.isFinite(one));
    if (bad) return setWrong(say("is_number", { field: words(vary), value: values }));
    if (!(many >= 1 && many <= MOST)) return setWrong(say("grid_too_many", { most: MOST }));
    setBusy(true);
    try {
      const body = await requestOf(job);
      const { seed, ...others } = body;
      const bodies = vary === "seed"
        ? bySeed({ ...others, seed: seed ?? job.seed }, many)
        : numbers.map((value) => ({ ...body, seed: seed ?? job.seed, [vary]: value }));
      const { failed } = await send(bodies, vary);
      if (!failed) return closeDialog();
      setWrong(wordsOf(failed));
    } catch (error) {
      setWrong(wordsOf(error));
    }
    return setBusy(false);
  };
  return html`
    <${Dialog} title=${say("grid")}>
      <form novalidate onSubmit=${make}>
        <p class="prompt" dir="auto">${short(job.prompt, 160)}</p>
        <div class="row">
          <div class="field"><label for="grid-vary">${say("grid_what")}</label>
            <select id="grid-vary" value=${vary} onChange=${(event) => setVary(event.target.value)}>
              ${ways.map((way) => html`<option value=${way}>${words(way)}</option>`)}
            </select></div>
          ${vary === "seed"
            ? html`<div class="field"><label for="grid-count">${say("grid_count")}</label>
                <input id="grid-count" type="number" min="2" max=${MOST} value=${count}
                  onInput=${(event) => setCount(event.target.value)} /></div>`
            : html`<div class="field"><label for="grid-values">${say("grid_values")}</label>
                <input id="grid-values" value=${values} autocomplete="off"
                  onInput=${(event) => setValues(event.target.value)} /></div>`}
        </div>
        <div role="alert">${wrong && html`<p class="error"><${Said} words=${wrong} /></p>`}</div>
        <div class="actions">
          <button class="main" aria-disabled=${busy}>
            ${say("grid_make", { count: many || 0 })}</button>
        </div>
      </form>
    <//>`;
}

function Delete({ ids }) {
  const [wrong, setWrong] = useState("");
  const remove = async () => {
    try {
      for (const id of ids) {
        await api.delete(id).catch((error) => {
          if (error.status !== 404) throw error; // another tab was first
        });
        drop([id]);
      }
      closeDialog();
    } catch (error) {
      setWrong(wordsOf(error));
    }
  };
  const title = ids.length > 1 ? say("delete_grid_ask", { count: ids.length }) : say("delete_ask");
  return html`
    <${Dialog} title=${title}>
      <p class="prompt" dir="auto">${short(state.jobs.get(ids[0])?.prompt, 160)}</p>
      <p>${say("delete_final")}</p>
      <div role="alert">${wrong && html`<p class="error"><${Said} words=${wrong} /></p>`}</div>
      <div class="actions">
        <button type="button" autofocus onClick=${() => closeDialog()}>${say("keep")}</button>
        <button type="button" class="danger" onClick=${remove}>${say("delete")}</button>
      </div>
    <//>`;
}

const APART_S = 0.06; // of two videos that play together, before one is set to the other

/** Play two videos as one: the first leads, the second follows. */
function usePair(left, right, speed) {
  const [playing, setPlaying] = useState(false);
  const [time, setTime] = useState(0);
  const [length, setLength] = useState(0);
  const both = () => [left.current, right.current].filter(Boolean);
  useEffect(() => {
    for (const video of both()) video.playbackRate = speed;
  }, [speed]);
  useEffect(() => {
    if (!playing) return undefined;
    let frame = 0;
    const tick = () => {
      const [first, second] = both();
      if (first && second) {
        if (first.ended && second.ended) {
          for (const video of both()) {
            video.currentTime = 0;
            video.play().catch(() => {});
          }
        } else if (!first.ended && !second.ended) {
          const apart = second.currentTime - first.currentTime;
          if (Math.abs(apart) > APART_S) second.currentTime = first.currentTime;
        }
        setTime(Math.max(first.currentTime, second.currentTime));
      }
      frame = requestAnimationFrame(tick);
    };
    for (const video of both()) video.play().catch(() => {});
    frame = requestAnimationFrame(tick);
    return () => {
      cancelAnimationFrame(frame);
      for (const video of both()) video.pause();
    };
  }, [playing]);
  const seek = (to) => {
    setTime(to);
    for (const video of both()) video.currentTime = Math.min(to, video.duration || to);
  };
  const measured = () => setLength(Math.max(...both().map((video) => video.duration || 0)));
  return { playing, setPlaying, time, length, seek, measured };
}

function Side({ job, name, videoRef, onMeasured }) {
  const source = useMedia(content(job.id));
  return html`
    <figure>
      <div class="frame" style=${`--shape: ${job.width} / ${job.height}`}>
        ${source && html`<video ref=${videoRef} src=${source} muted playsinline preload="auto"
          aria-label=${say("video_of", { prompt: short(job.prompt) })}
          onLoadedMetadata=${onMeasured}></video>`}
      </div>
      <figcaption><b>${name}</b> ${short(job.prompt, 100)}</figcaption>
    </figure>`;
}

function Differences({ jobs }) {
  const { value, error } = useAsked(
    () => Promise.all(jobs.map((job) => api.recipe(job.id))), [jobs[0].id, jobs[1].id],
  );
  if (error) {
    return html`<p class="error"><${Said} words=${say("no_recipe", { message: error })} /></p>`;
  }
  if (!value) return null;
  const [a, b] = value.map((one) => flat(one));
  const names = [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((x) => a[x] !== b[x]);
  if (!names.length) return html`<p>${say("same")}</p>`;
  return html`
    <table>
      <caption>${say("differs")}</caption>
      <thead><tr><td></td><th scope="col">${say("left_side")}</th>
        <th scope="col">${say("right_side")}</th></tr></thead>
      <tbody>${names.map((name) => html`<tr><th scope="row">${name}</th>
        <td>${a[name] ?? "–"}</td><td>${b[name] ?? "–"}</td></tr>`)}</tbody>
    </table>`;
}

function Compare({ ids }) {
  const jobs = ids.map((id) => state.jobs.get(id));
  const [left, right] = [useRef(), useRef()];
  const [speed, setSpeed] = useState(1);
  const pair = usePair(left, right, speed);
  if (jobs.some((job) => !job)) return null;
  return html`
    <${Dialog} title=${say("compare_open")} wide>
      <div class="sides">
        <${Side} job=${jobs[0]} name=${say("left_side")} videoRef=${left}
          onMeasured=${pair.measured} />
        <${Side} job=${jobs[1]} name=${say("right_side")} videoRef=${right}
          onMeasured=${pair.measured} />
      </div>
      <div class="player">
        <button type="button" class="main" autofocus
          onClick=${() => pair.setPlaying(!pair.playing)}>
          <${Icon} name=${pair.playing ? "pause" : "play"} />
          ${say(pair.playing ? "pause" : "play_both")}</button>
        <input type="range" min="0" max=${pair.length || 1} step="0.01" value=${pair.time}
          aria-label=${say("position_in")}
          aria-valuetext=${say("time_s", { n: pair.time.toFixed(1) })}
          onInput=${(event) => pair.seek(+event.target.value)} />
        <label class="inline">${say("speed")}
          <select value=${String(speed)} onChange=${(event) => setSpeed(+event.target.value)}>
            ${[0.25, 0.5, 1, 2].map((one) => html`<option value=${String(one)}>${one} ×</option>`)}
          </select></label>
      </div>
      <${Differences} jobs=${jobs} />
    <//>`;
}

function Shortcuts() {
  const rows = [
    ["N", "key_prompt"], ["Ctrl + Enter", "key_submit"], ["Q", "key_queue"], ["G", "key_gallery"],
    ["T", "key_theme"], ["?", "key_help"], ["Esc", "key_escape"],
    ["Enter  A  C  Del", "key_on_card"],
  ];
  return html`
    <${Dialog} title=${say("shortcuts")}>
      <dl class="keys">
        ${rows.map(([keys, words]) => html`
          <dt>${keys.split("  ").map((key) => html`<kbd>${key}</kbd> `)}</dt>
          <dd>${say(words)}</dd>`)}
      </dl>
      <label class="inline"><input type="checkbox" checked=${state.keys}
        onChange=${(event) => choose("keys", event.currentTarget.checked)} />
        ${say("keys_on")}</label>
    <//>`;
}

/** Ask for the token. Without one there is nothing to see, so it cannot be closed. */
function Token() {
  const ref = useRef();
  const [value, setValue] = useState("");
  useEffect(() => ref.current.showModal(), []);
  const use = (event) => {
    event.preventDefault();
    // Another sign cannot stand in a header: no server has it in its token.
    if (!/^[!-~]+$/.test(value.trim())) return update({ token: "wrong" });
    token.set(value.trim());
    update({ token: "" });
    return restart();
  };
  return html`
    <dialog ref=${ref} aria-labelledby="token-title"
      onCancel=${(event) => event.preventDefault()}
      onClose=${() => ref.current?.showModal()}>
      <form class="inside" onSubmit=${use}>
        <h2 id="token-title">${say("token_title")}</h2>
        <div class="field"><label for="token">${say("token")}</label>
          <input id="token" type="password" autocomplete="off" required value=${value}
            aria-describedby="token-text" onInput=${(event) => setValue(event.target.value)} />
          <p class="hint" id="token-text">${say("token_text")}</p></div>
        <div role="alert">${state.token === "wrong"
          && html`<p class="error">${say("token_wrong")}</p>`}</div>
        <div class="actions"><button class="main">${say("token_use")}</button></div>
      </form>
    </dialog>`;
}

const DIALOGS = {
  recipe: Recipe, grid: GridDialog, delete: Delete, compare: Compare, shortcuts: Shortcuts,
};

export function Dialogs() {
  if (state.token) return html`<${Token} />`;
  if (!state.dialog) return null;
  const { name, ...rest } = state.dialog;
  return html`<${DIALOGS[name]} key=${name} ...${rest} />`;
}
