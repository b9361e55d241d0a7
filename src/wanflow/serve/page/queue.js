// Jobs at work and jobs that wait.

import { html } from "./lib/htm-preact.js";

import { api } from "./api.js";
import { Icon, Preview, say, useKeptFocus, useSeconds, wordsOf } from "./parts.js";
import { labelOf } from "./request.js";
import { queue, short, state, take, update } from "./store.js";
import { duration } from "./words.js";

/** Return what a job does now, in words. */
export function doing(job) {
  if (job.status === "queued") {
    const position = job.queue_position ?? 1;
    return position <= 1 ? say("position_next") : say("position", { position });
  }
  if (job.stage === "denoising" && job.expert) return say(`expert_${job.expert}`);
  const key = `stage_${job.stage}`;
  const known = ["loading", "prompt", "picture", "denoising", "decoding", "saving"];
  return known.includes(job.stage) ? say(key) : say("starting");
}

/** Return the seconds that are left, counted down from when the server gave them. */
const left = (job) => job.eta_seconds - (Date.now() - job.heard) / 1000;

export function Bar({ job }) {
  return html`
    <div class=${`bar ${job.expert || ""}`} role="progressbar" aria-valuemin="0" aria-valuemax="100"
      aria-valuenow=${job.progress || 0} aria-label=${short(job.prompt)}>
      <i style=${`width: ${job.progress || 0}%`}></i>
    </div>`;
}

async function cancel(job) {
  update({ stopping: { ...state.stopping, [job.id]: true } });
  try {
    take([await api.cancel(job.id)]);
  } catch (error) {
    update({ stopping: { ...state.stopping, [job.id]: false }, notice: wordsOf(error) });
  }
}

function Entry({ job }) {
  const works = job.status === "in_progress";
  const ref = useKeptFocus("queue");
  const stopping = job.cancelling || state.stopping[job.id];
  const facts = [
    works && job.steps ? say("step", { step: job.step || 0, steps: job.steps }) : "",
    works && job.eta_seconds != null && left(job) >= 1 && !stopping
      ? say("left", { time: duration(say, left(job)) }) : "",
    job.attempts > 1 ? say("attempt", { count: job.attempts }) : "",
    `${job.width} × ${job.height}`,
    job.grid ? labelOf(job.grid) : "",
  ].filter(Boolean);
  return html`
    <li ref=${ref} class=${works ? "entry works" : "entry"} data-id=${job.id}>
      ${works && html`<${Preview} job=${job} />`}
      <div class="what">
        <p class="prompt" dir="auto" title=${job.prompt}>${job.prompt}</p>
        <p class="doing">
          ${works && html`<b class=${`dot ${job.expert || ""}`}></b>`}
          ${stopping ? say("cancelling") : doing(job)}
        </p>
        ${works && html`<${Bar} job=${job} />`}
        <p class="facts">${facts.map((fact) => html`<span>${fact}</span>`)}</p>
      </div>
      <button type="button" class="quiet" aria-disabled=${!!stopping}
        onClick=${() => stopping || cancel(job)}
        aria-label=${`${say("cancel")}: ${short(job.prompt)}`}>
        <${Icon} name="close" />${say("cancel")}
      </button>
    </li>`;
}

export function Queue() {
  const jobs = queue();
  useSeconds(jobs.some((job) => job.status === "in_progress"));
  return html`
    <section id="queue" tabindex="-1" aria-labelledby="queue-title">
      <h2 id="queue-title">${say("queue")}
        ${jobs.length > 0 && html` <small>${jobs.length}</small>`}</h2>
      ${jobs.length === 0
        ? html`<p class="empty">${say("queue_empty")}</p>`
        : html`<ol class="entries">
            ${jobs.map((job) => html`<${Entry} key=${job.id} job=${job} />`)}
          </ol>`}
    </section>`;
}
