// Videos that are done, jobs that failed, and grids of several jobs.

import { html, useRef, useState } from "./lib/htm-preact.js";

import { earlier } from "./live.js";
import {
  Clip, Download, Icon, IconButton, Preview, Said, isPicture, say, useKeptFocus, varied, wordsOf,
} from "./parts.js";
import { Bar, doing } from "./queue.js";
import { drawSeed, labelOf, requestOf, send } from "./request.js";
import { active, gallery, state, update } from "./store.js";
import { duration } from "./words.js";

const open = (name, more) => update({ dialog: { name, ...more } });

/** Make a job again, as it was or with other values. */
async function again(job, changes) {
  try {
    const { failed } = await send([{ ...(await requestOf(job)), ...changes }]);
    if (failed) update({ notice: wordsOf(failed) });
  } catch (error) {
    update({ notice: wordsOf(error) });
  }
}

const comparable = (job) => job.status === "completed" && !isPicture(job);

function toggleChosen({ id }) {
  const others = state.chosen.filter((other) => other !== id);
  const chosen = others.length < state.chosen.length ? others : [...others, id].slice(-2);
  update({ chosen });
}

/** Return what stands below a prompt. */
function Facts({ job }) {
  const facts = [
    `${job.width} × ${job.height}`,
    isPicture(job) ? "" : say("time_s", { n: +Number(job.seconds).toFixed(2) }),
    job.seed == null ? "" : say("seed_is", { seed: job.seed }),
    job.inference_time_s ? say("took", { time: duration(say, job.inference_time_s) }) : "",
  ];
  return html`
    <p class="facts">${facts.filter(Boolean).map((fact) => html`<span>${fact}</span>`)}</p>`;
}

function Tools({ job }) {
  const chosen = state.chosen.includes(job.id);
  return html`
    <div class="tools">
      <button type="button" class="quiet" title=${say("again")} aria-label=${say("again")}
        onClick=${() => again(job, { seed: drawSeed() })}>
        <${Icon} name="dice" />${say("again_short")}</button>
      <button type="button" class="quiet" title=${say("grid")} aria-label=${say("grid")}
        onClick=${() => open("grid", { job })}>
        <${Icon} name="grid" />${say("grid_short")}</button>
      <i class="space"></i>
      <${IconButton} name="recipe" words=${say("recipe")}
        onClick=${() => open("recipe", { job })} />
      ${comparable(job) && html`<${IconButton} name="compare" words=${say("compare")}
        aria-pressed=${chosen ? "true" : "false"} onClick=${() => toggleChosen(job)} />`}
      <${Download} job=${job}><${Icon} name="download" /><//>
      <${IconButton} name="delete" words=${say("delete")}
        onClick=${() => open("delete", { ids: [job.id] })} />
    </div>`;
}

/** A job that failed, with its words. */
function Failed({ job }) {
  const words = job.status === "failed" && job.error ? wordsOf(job.error) : "";
  return html`
    <div class=${`frame ended ${job.status}`}>
      <p><b>${say(job.status)}</b> <${Said} words=${words} /></p></div>`;
}

function FailedTools({ job }) {
  return html`
    <div class="tools">
      <button type="button" class="quiet" onClick=${() => again(job, {})}>
        <${Icon} name="again" />${say("try_again")}</button>
      <i class="space"></i>
      <${IconButton} name="recipe" words=${say("recipe")}
        onClick=${() => open("recipe", { job })} />
      <${IconButton} name="delete" words=${say("delete")}
        onClick=${() => open("delete", { ids: [job.id] })} />
    </div>`;
}

const KEYS = {
  a: (job) => again(job, { seed: drawSeed() }),
  c: (job) => comparable(job) && toggleChosen(job),
  Delete: (job) => open("delete", { ids: [job.id] }),
};

function keyed(event, job) {
  const act = KEYS[event.key];
  if (!act || event.target.closest("input, textarea, select, video, dialog")) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.length === 1 && !state.keys) return;
  event.preventDefault();
  act(job);
}

function Card({ job }) {
  const done = job.status === "completed";
  const ref = useKeptFocus("gallery");
  return html`
    <li ref=${ref} class=${state.chosen.includes(job.id) ? "card chosen" : "card"} data-id=${job.id}
      onKeyDown=${(event) => keyed(event, job)}>
      ${done
        ? html`<${Clip} job=${job} playing=${state.playing === job.id}
            onPlay=${() => update({ playing: job.id })} />`
        : html`<${Failed} job=${job} />`}
      <p class="prompt" dir="auto" title=${job.prompt}>${job.prompt}</p>
      <${Facts} job=${job} />
      ${done ? html`<${Tools} job=${job} />` : html`<${FailedTools} job=${job} />`}
    </li>`;
}

/** One job of a grid, in whatever state it is. */
function Cell({ job, playing, videoRef }) {
  const [tools, setTools] = useState(false);
  const label = labelOf(job.grid);
  const done = job.status === "completed";
  return html`
    <li class=${state.chosen.includes(job.id) ? "cell chosen" : "cell"} data-id=${job.id}
      onKeyDown=${(event) => keyed(event, job)}>
      ${done
        ? html`<${Clip} job=${job} playing=${playing} videoRef=${videoRef} />`
        : active(job) ? html`<${Preview} job=${job} />` : html`<${Failed} job=${job} />`}
      ${active(job) && html`<${Bar} job=${job} />`}
      <p class=${active(job) ? "facts" : "facts one-line"}>
        <span class="label">${label}</span>
        ${active(job) && html`<span>${doing(job)}</span>`}
        ${!active(job) && html`<button type="button" class="quiet small" aria-expanded=${tools}
          aria-label=${say("tools_of", { label })} onClick=${() => setTools(!tools)}>⋯</button>`}
      </p>
      ${tools && (done ? html`<${Tools} job=${job} />` : html`<${FailedTools} job=${job} />`)}
    </li>`;
}

/** Several jobs side by side, which play together. */
function Grid({ id, jobs }) {
  const [playing, setPlaying] = useState(false);
  const videos = useRef(new Map());
  const ready = jobs.filter(comparable);
  const began = (job) => (element) => {
    if (!element) {
      videos.current.delete(job.id);
      return;
    }
    videos.current.set(job.id, element);
    if (videos.current.size < ready.length) return;
    for (const video of videos.current.values()) { // all together, once the last is there
      video.currentTime = 0;
      video.play().catch(() => {});
    }
  };
  const vary = say(varied(jobs[0].grid.vary));
  return html`
    <li class="card grid" data-grid=${id}>
      <p class="prompt" dir="auto" title=${jobs[0].prompt}>${jobs[0].prompt}</p>
      <ol class="cells">
        ${jobs.map((job) => html`<${Cell} key=${job.id} job=${job} playing=${playing}
          videoRef=${began(job)} />`)}
      </ol>
      <div class="tools">
        <span class="facts">${say("grid_of", { count: jobs.length, vary })}</span>
        <i class="space"></i>
        ${ready.length > 0 && html`<button type="button" class="quiet"
          onClick=${() => setPlaying(!playing)}>
          <${Icon} name=${playing ? "pause" : "play"} />${say(playing ? "pause_all" : "play_all")}
        </button>`}
        ${!jobs.some(active) && html`<${IconButton} name="delete" words=${say("delete")}
          onClick=${() => open("delete", { ids: jobs.map((job) => job.id) })} />`}
      </div>
    </li>`;
}

/** What is chosen to be compared, at the foot of the window. */
function Chosen() {
  const { chosen } = state;
  if (!chosen.length) return null;
  return html`
    <div class="chosen-bar" role="status">
      <span>${say(chosen.length === 1 ? "compare_one" : "compare_two")}</span>
      ${chosen.length === 2 && html`<button type="button" class="main"
        onClick=${() => open("compare", { ids: chosen })}>${say("compare_open")}</button>`}
      <button type="button" class="quiet" onClick=${() => update({ chosen: [] })}>
        ${say("compare_none")}</button>
    </div>`;
}

export function Gallery() {
  const items = gallery();
  const older = async () => {
    try {
      await earlier();
      if (state.more) return; // else the button goes, and the first of the new has the focus
      setTimeout(() => document.querySelectorAll(".cards > li")[items.length]
        ?.querySelector("button, a")?.focus());
    } catch (error) {
      update({ notice: wordsOf(error) });
    }
  };
  return html`
    <section id="gallery" tabindex="-1" aria-labelledby="gallery-title">
      <h2 id="gallery-title">${say("gallery")}</h2>
      ${items.length === 0 && html`<p class="empty">${say("gallery_empty")}</p>`}
      <ul class="cards">
        ${items.map(({ id, job, jobs }) => jobs
          ? html`<${Grid} key=${id} id=${id} jobs=${jobs} />`
          : html`<${Card} key=${id} job=${job} />`)}
      </ul>
      ${state.more && html`<button type="button" class="quiet more"
        onClick=${older}>${say("load_more")}</button>`}
      <${Chosen} />
    </section>`;
}
