// Small parts that several views use.

import {
  html, useEffect, useLayoutEffect, useReducer, useRef, useState,
} from "./lib/htm-preact.js";

import { address, blob, content, preview, token } from "./api.js";
import { short, state, update } from "./store.js";
import { known, speaker } from "./words.js";

/** Say a key in the language of the page. */
export const say = (key, values) => speaker(state.language)(key, values);

// The fields of the form: what the page calls each, then the names that the API has for it.
const FIELDS = {
  prompt: ["prompt", "prompt"],
  negative: ["negative", "negative_prompt"],
  image: ["picture", "input_reference", "image"],
  last: ["last_picture", "last_image"],
  preset: ["preset", "preset"],
  size: ["size", "size", "width", "height"],
  length: ["length", "num_frames", "seconds", "frame_num", "length"],
  steps: ["steps", "num_inference_steps", "sample_steps", "steps"],
  seed: ["seed", "seed"],
  cfg_high: ["cfg_high", "cfg_high", "guidance_scale"],
  cfg_low: ["cfg_low", "cfg_low", "guidance_scale_2"],
  shift: ["shift", "flow_shift", "sample_shift", "shift"],
  lora: ["lora", "lora"],
};

/** Return the field that an error is about: its parameter, or the first word of its message. */
export function fieldOf(error) {
  const name = (error.field || error.message).split(/[^\w]/)[0];
  return Object.keys(FIELDS).find((one) => FIELDS[one].slice(1).includes(name)) || "";
}

/** Return the word for what a grid varies: a model of one network has one guidance. */
export function varied(vary) {
  return vary === "cfg_high" && state.settings?.experts.length === 1 ? "cfg" : vary;
}

/**
 * Return what went wrong, of an answer or of a job, in the language of the page.
 *
 * The server speaks English. In another language its words, which have the numbers, are a second
 * line.
 */
export function wordsOf(error) {
  if (error.status === 0) return say("no_answer");
  const { code, message } = error;
  if (!code || (state.language === "en" && message && code !== "other")) return message;
  const key = `error_${code}`;
  const words = say(known(key) ? key : "error_other");
  const field = fieldOf(error);
  const label = field && say(varied(FIELDS[field][0]));
  return `${label ? say("of_field", { field: label, words }) : words}\n${message}`;
}

/** Words of the page, and in a line of their own those of the server. */
export function Said({ words }) {
  const [first, ...rest] = words.split("\n");
  return html`<span>${first}
    ${rest.length > 0 && html`<span class="said" lang="en">${rest.join(" ")}</span>`}</span>`;
}

const PATHS = {
  play: "M8 5v14l11-7z",
  pause: "M7 5h3v14H7zM14 5h3v14h-3z",
  dice: "M5 3h14a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2zM8 8h.01M16 8h.01M12 12h.01M8 16h.01M16 16h.01",
  again: "M4 12a8 8 0 0 1 14-5.3L20 9M20 4v5h-5M20 12a8 8 0 0 1-14 5.3L4 15M4 20v-5h5",
  grid: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
  recipe: "M7 3h10a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H7a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2zM9 8h6M9 12h6M9 16h3",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  compare: "M4 5h7v14H4zM13 5h7v14h-7z",
  delete: "M5 7h14M10 4h4M7 7l1 13h8l1-13M10 11v5M14 11v5",
  close: "M6 6l12 12M18 6L6 18",
  theme: "M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z",
  keyboard: "M4 6h16a1 1 0 0 1 1 1v10a1 1 0 0 1-1 1H4a1 1 0 0 1-1-1V7a1 1 0 0 1 1-1zM7 10h.01M11 10h.01M15 10h.01M8 14h8",
};
const FILLED = ["play", "pause"];

/** A picture of 24 x 24 that says nothing to screen readers: its button has words. */
export const Icon = ({ name }) => html`
  <svg class=${FILLED.includes(name) ? "icon filled" : "icon"} viewBox="0 0 24 24"
    aria-hidden="true">
    <path d=${PATHS[name]} />
  </svg>`;

/** A button with an icon; its words are read aloud and shown on hover. */
export const IconButton = ({ name, words, ...rest }) => html`
  <button type="button" class="quiet" title=${words} aria-label=${words} ...${rest}>
    <${Icon} name=${name} />
  </button>`;

/** A dialog over the page. Escape closes it, and the focus goes back to where it was. */
export function Dialog({ title, wide, children }) {
  const ref = useRef();
  const mine = useRef(state.dialog);
  const closed = () => state.dialog === mine.current && closeDialog(); // another may be open by now
  useLayoutEffect(() => {
    const opener = document.activeElement;
    ref.current.showModal();
    return () => setTimeout(() => {
      // What opened it may be gone, with its video.
      const next = state.next || (opener?.isConnected ? "" : "gallery");
      state.next = "";
      (next ? document.getElementById(next) : opener)?.focus();
    });
  }, []);
  return html`
    <dialog ref=${ref} class=${wide ? "wide" : ""} aria-labelledby="dialog-title" onClose=${closed}
      onClick=${(event) => event.target === ref.current && ref.current.close()}>
      <div class="inside">
        <header>
          <h2 id="dialog-title">${title}</h2>
          <${IconButton} name="close" words=${say("close")} onClick=${() => ref.current.close()} />
        </header>
        ${children}
      </div>
    </dialog>`;
}

/** Close the dialog; the focus goes to the element of an id, or to where it was. */
export const closeDialog = (next = "") => update({ dialog: null, next });

/** When an element goes that has the focus, the section takes it: a keyboard is never lost. */
export function useKeptFocus(section) {
  const ref = useRef();
  useLayoutEffect(() => {
    const element = ref.current;
    return () => {
      if (!element.contains(document.activeElement)) return;
      setTimeout(() => document.getElementById(section)?.focus());
    };
  }, []);
  return ref;
}

/** Draw a component again each second, while `on`. */
export function useSeconds(on) {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    if (!on) return undefined;
    const timer = setInterval(again, 1000);
    return () => clearInterval(timer);
  }, [on]);
}

/** Return an address for a path: itself, or with a token the bytes, which only a fetch can get. */
export function useMedia(path) {
  const [found, set] = useState("");
  useEffect(() => {
    set("");
    if (!path) return undefined;
    if (!token.get()) {
      set(address(path));
      return undefined;
    }
    let url = "";
    let left = false;
    blob(path).then(
      (made) => {
        url = made;
        if (left) URL.revokeObjectURL(url);
        else set(url);
      },
      () => {},
    );
    return () => {
      left = true;
      if (url) URL.revokeObjectURL(url);
    };
  }, [path]);
  return found;
}

/**
 * Return the newest preview of a job at work.
 *
 * Events bring it. Without events it is asked for at each step; while it loads, the last stays.
 */
function usePreview(job) {
  const [found, set] = useState("");
  const last = useRef({ url: "", busy: false, wanted: "", had: "" });
  const version = `${job.attempts}.${job.step}`;
  useEffect(() => {
    const my = last.current;
    my.wanted = version;
    const load = async () => {
      if (my.busy || my.had === my.wanted || job.status !== "in_progress" || !job.step) return;
      if (state.link === "live") return;
      my.busy = true;
      my.had = my.wanted;
      try {
        const url = await blob(preview(job.id));
        if (my.url) URL.revokeObjectURL(my.url);
        my.url = url;
        set(url);
      } catch {
        // none yet
      }
      my.busy = false;
      load();
    };
    load();
  }, [job.id, version, job.status]);
  useEffect(() => () => URL.revokeObjectURL(last.current.url), []);
  return state.link === "live" ? state.previews.get(job.id) || found : found;
}

const still = matchMedia("(prefers-reduced-motion: reduce)");

/** A preview, which moves; where no motion is wanted, its first frame. */
function Moving({ url, alt }) {
  const canvas = useRef();
  const [frozen, setFrozen] = useState(still.matches);
  useEffect(() => {
    const changed = () => setFrozen(still.matches);
    still.addEventListener("change", changed);
    return () => still.removeEventListener("change", changed);
  }, []);
  useEffect(() => {
    if (!frozen) return;
    const image = new Image();
    image.onload = () => {
      if (!canvas.current) return;
      canvas.current.width = image.naturalWidth;
      canvas.current.height = image.naturalHeight;
      canvas.current.getContext("2d").drawImage(image, 0, 0);
    };
    image.src = url;
  }, [url, frozen]);
  return frozen
    ? html`<canvas ref=${canvas} role="img" aria-label=${alt}></canvas>`
    : html`<img src=${url} alt=${alt} />`;
}

export const isPicture = (job) => job.num_frames === 1;
const shape = (job) => (job.width && job.height ? `--shape: ${job.width} / ${job.height}` : "");

/** The preview of a job at work. */
export function Preview({ job }) {
  const url = usePreview(job);
  return html`
    <div class="frame" style=${shape(job)}>
      ${url
        ? html`<${Moving} url=${url} alt=${say("preview_of", { prompt: short(job.prompt) })} />`
        : html`<div class=${job.status === "queued" ? "blank" : "blank busy"}></div>`}
    </div>`;
}

/** The thumbnail of a video; a press plays it in place. */
export function Clip({ job, playing, onPlay, videoRef }) {
  const thumbnail = useMedia(isPicture(job) ? content(job.id) : content(job.id, "thumbnail"));
  const source = useMedia(playing && !isPicture(job) ? content(job.id) : "");
  const video = useRef();
  useEffect(() => {
    if (!source) return undefined;
    if (onPlay) video.current?.focus();
    videoRef?.(video.current);
    return () => videoRef?.(null);
  }, [source]);
  const words = say("video_of", { prompt: short(job.prompt) });
  const image = thumbnail
    ? html`<img src=${thumbnail} alt=${words} loading="lazy" />`
    : html`<div class="blank"></div>`;
  if (isPicture(job)) return html`<div class="frame" style=${shape(job)}>${image}</div>`;
  if (playing && source) {
    return html`
      <div class="frame" style=${shape(job)}>
        <video ref=${video} src=${source} poster=${thumbnail} aria-label=${words}
          controls=${!!onPlay} autoplay=${!!onPlay} loop muted playsinline></video>
      </div>`;
  }
  if (!onPlay) return html`<div class="frame" style=${shape(job)}>${image}</div>`;
  return html`
    <button type="button" class="frame" style=${shape(job)} onClick=${onPlay}
      aria-label=${say("play", { prompt: short(job.prompt) })}>
      ${image}<span class="over"><${Icon} name="play" /></span>
    </button>`;
}

/** Return a name that a person finds again: the first words of the prompt, and the seed. */
export function fileName(job) {
  const words = job.prompt.match(/[\p{L}\p{M}\p{N}]+/gu) || ["wanflow"];
  const name = Array.from(words.join("-")).slice(0, 40).join("");
  return `${name}-${job.seed ?? job.id}.${isPicture(job) ? "png" : "mp4"}`;
}

/** A link that saves the video. The bytes are fetched: with the token, and under our name. */
export function Download({ job, children }) {
  const [busy, setBusy] = useState(false);
  const save = async (event) => {
    event.preventDefault();
    if (busy) return;
    setBusy(true);
    const link = document.createElement("a");
    try {
      link.href = await blob(content(job.id));
      link.download = fileName(job);
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    } catch (error) {
      update({ notice: wordsOf(error) });
    }
    setBusy(false);
  };
  return html`
    <a class="button quiet" href=${address(content(job.id))} download=${fileName(job)}
      title=${say("download")} aria-label=${say("download")} aria-disabled=${busy} onClick=${save}>${children}</a>`;
}
