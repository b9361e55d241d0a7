// The page: header, form, queue, gallery; keys; words for screen readers.

import { html, render, useEffect, useErrorBoundary } from "./lib/htm-preact.js";

import { Dialogs } from "./dialogs.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { restart } from "./live.js";
import { IconButton, Said, say } from "./parts.js";
import { Queue } from "./queue.js";
import { formOf, keptPictures, offer } from "./request.js";
import { choose, queue, state, update, useStore } from "./store.js";
import { LANGUAGES } from "./words.js";

const THEMES = ["auto", "light", "dark"];
const nextTheme = () => choose("theme", THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length]);
const go = (id) => {
  const element = document.getElementById(id);
  element?.focus();
  element?.scrollIntoView({ block: "start" });
};

const KEYS = {
  n: () => go("prompt"),
  q: () => go("queue"),
  g: () => go("gallery"),
  t: nextTheme,
  "?": () => update({ dialog: { name: "shortcuts" } }),
};

function pressed(event) {
  const typing = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && typing && !document.querySelector("dialog")) typing.blur();
  if (typing || !state.keys || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.defaultPrevented || document.querySelector("dialog")) return;
  const act = KEYS[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault(); // else the letter lands in the field
  act();
}

/** A picture that is pasted or dropped anywhere goes to the first free place. */
function given(event, data) {
  const places = ["image", "last"].slice(0, state.settings?.pictures || 0);
  const free = places.find((name) => !state.pictures[name]) || places[0];
  if (!data?.files.length || event.defaultPrevented) return;
  event.preventDefault(); // else a dropped file replaces the page
  if (free && !document.querySelector("dialog")) offer(free, data.files);
}

function pasted(event) {
  const typing = event.target.closest?.("input, textarea");
  // A text editor copies its text as a picture too.
  if (typing && event.clipboardData?.types.includes("text/plain")) return;
  given(event, event.clipboardData);
}

function skip(event) {
  event.preventDefault();
  go("gallery");
}

function Header() {
  const { language, settings, theme } = state;
  return html`
    <header class="top">
      <a class="skip" href="#gallery" onClick=${skip}>${say("skip")}</a>
      <h1><img src="page/icon.svg" alt="" width="28" height="28" />wanflow</h1>
      ${settings && html`<span class="model">${settings.model}</span>`}
      <i class="space"></i>
      <select class="quiet" aria-label=${say("language")} value=${language}
        onChange=${(event) => choose("language", event.currentTarget.value)}>
        ${Object.entries(LANGUAGES).map(([code, name]) => html`
          <option value=${code} lang=${code}>${name}</option>`)}
      </select>
      <${IconButton} name="theme" onClick=${nextTheme}
        words=${`${say("theme")}: ${say(`theme_${theme}`)}`} />
      <${IconButton} name="keyboard" class="quiet for-keys" words=${say("shortcuts")}
        onClick=${KEYS["?"]} />
    </header>`;
}

function closeNotice() {
  document.getElementById("gallery")?.focus({ preventScroll: true }); // the button goes
  update({ notice: "" });
}

/** What is wrong with the server, or with what was asked of it. */
function Notices() {
  const { link, notice, ready, settings, why } = state;
  const words = link === "lost" ? say("unreachable")
    : link === "polling" ? (!settings && why) || say("polling")
      : ready === false ? say("not_ready") : "";
  return html`
    <div class="notices">
      <div role="status">${words && html`<p class="notice"><${Said} words=${words} /></p>`}</div>
      <div role="alert">${notice && html`<p class="notice wrong"><${Said} words=${notice} />
        <${IconButton} name="close" words=${say("close")} onClick=${closeNotice} />
      </p>`}</div>
    </div>`;
}

function App() {
  const { form, language, settings, theme } = useStore();
  const [broken] = useErrorBoundary();
  const works = queue().find((job) => job.status === "in_progress");
  useEffect(() => {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    document.documentElement.dataset.theme = theme;
  }, [language, theme]);
  useEffect(() => {
    document.title = works ? `${works.progress} % · wanflow` : "wanflow";
  }, [works?.progress]);
  useEffect(() => {
    if (settings && form?.model !== settings.model) update({ form: formOf(settings) });
  }, [settings]);
  if (broken) return html`<main><p class="notice wrong">${broken.message}</p></main>`;
  return html`
    <${Header} />
    <main>
      ${settings && form && html`<${Form} />`}
      ${state.asked && html`<div class="made"><${Queue} /><${Gallery} /></div>`}
    </main>
    <${Notices} />
    <div class="unseen" aria-live="polite">${state.spoken}</div>
    <${Dialogs} />`;
}

addEventListener("keydown", pressed);
addEventListener("paste", pasted);
addEventListener("dragover", (event) => {
  if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
});
addEventListener("drop", (event) => given(event, event.dataTransfer));
keptPictures().then((pictures) => update({ pictures }));
const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
restart();
