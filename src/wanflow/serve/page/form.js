// The form: what to make, and what the server says of it.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./lib/htm-preact.js";

import { IconButton, Said, fieldOf, say, wordsOf } from "./parts.js";
import {
  MOST, bodyOf, bySeed, clearForm, drawSeed, framesOf, offer, send, setForm, setPictures,
} from "./request.js";
import { state, update } from "./store.js";

const IN_MORE = ["cfg_high", "cfg_low", "shift", "negative"];

/** Return the field of this form that an error is about. */
function shownField(error) {
  const field = fieldOf(error);
  return document.getElementById(field) ? field : "";
}

/** A labelled field with its hint and its error. `children` draws the control from its props. */
function Field({ name, label, hint, error, children }) {
  const ids = [hint && `${name}-hint`, error && `${name}-error`].filter(Boolean).join(" ");
  const props = {
    id: name, name, "aria-describedby": ids || undefined,
    "aria-invalid": error ? "true" : undefined,
  };
  return html`
    <div class="field">
      <label for=${name}>${label}</label>
      ${children(props)}
      ${hint && html`<p class="hint" id=${`${name}-hint`}>${hint}</p>`}
      ${error && html`<p class="error" id=${`${name}-error`}><${Said} words=${error} /></p>`}
    </div>`;
}

/** Keep what is typed, and take back what was said of that field. */
const typed = (name, field = name) => (event) => {
  setForm({ [name]: event.currentTarget.value });
  if (state.refused?.field === field) update({ refused: null });
};

/** A line for text or a number. Numbers are text here: a half-typed one must survive. */
const Line = ({ form, name, label, hint, error, ...rest }) => html`
  <${Field} name=${name} label=${label} hint=${hint} error=${error(name)}>
    ${(props) => html`<input ...${props} ...${rest} autocomplete="off" value=${form[name]}
      onInput=${typed(name)} />`}
  <//>`;

/** Choose, drop or paste a picture. */
function PictureField({ name, label, error }) {
  const file = state.pictures[name];
  const [url, setUrl] = useState("");
  const [over, setOver] = useState(false);
  useEffect(() => {
    const made = file instanceof Blob ? URL.createObjectURL(file) : "";
    setUrl(made);
    return () => made && URL.revokeObjectURL(made);
  }, [file]);
  const remove = () => {
    setPictures({ ...state.pictures, [name]: null });
    update({ refused: null });
  };
  const take = (event, files) => {
    setOver(false);
    if (!files.length) return;
    event.preventDefault();
    offer(name, files);
  };
  return html`
    <${Field} name=${name} label=${label} error=${error}>
      ${(props) => html`
        <div class=${over ? "drop over" : "drop"}
          onDragOver=${(event) => { event.preventDefault(); setOver(true); }}
          onDragLeave=${() => setOver(false)}
          onDrop=${(event) => { event.preventDefault(); take(event, event.dataTransfer.files); }}
          onPaste=${(event) => take(event, event.clipboardData.files)}>
          ${url && html`<img src=${url} alt=${label} />`}
          <input type="file" accept="image/*" ...${props} aria-label=${`${label}: ${say("drop")}`}
            onChange=${(event) => {
              take(event, event.currentTarget.files);
              event.currentTarget.value = "";
            }} />
          ${!url && html`<span aria-hidden="true">${say(file ? "on_server" : "drop")}</span>`}
          ${file && html`<${IconButton} name="close" words=${say("remove_picture")}
            onClick=${remove} />`}
        </div>`}
    <//>`;
}

function SizeField({ form, settings, error }) {
  const usual = settings.defaults.size;
  const hint = Object.values(state.pictures).some(Boolean) ? say("size_picture") : "";
  return html`
    <${Field} name="size" label=${say("size")} hint=${hint} error=${error("size")}>
      ${(props) => html`
        <select ...${props} value=${form.size} onChange=${typed("size")}>
          <option value="">${usual.replace("x", " × ")}</option>
          ${settings.sizes.filter((size) => size !== usual).map((size) => html`
            <option value=${size}>${size.replace("x", " × ")}</option>`)}
          <option value="own">${say("size_other")}</option>
        </select>
        ${form.size === "own" && html`<input id="own" aria-label=${say("size_own")}
          aria-describedby=${props["aria-describedby"]} aria-invalid=${props["aria-invalid"]}
          placeholder=${usual} autocomplete="off" value=${form.own}
          onInput=${typed("own", "size")} />`}`}
    <//>`;
}

function LengthField({ form, settings, error }) {
  const frames = framesOf(form, settings);
  const values = { frames, fps: settings.fps, seconds: +(frames / settings.fps).toFixed(2) };
  const key = frames === 1 ? "length_one" : "length_is";
  const hint = Number.isFinite(frames) && say(key, values);
  const usual = settings.defaults.num_frames;
  return html`
    <${Field} name="length" label=${say("length")} hint=${hint} error=${error("length")}>
      ${(props) => html`
        <div class="pair">
          <input ...${props} inputmode="decimal" autocomplete="off" value=${form.length}
            placeholder=${form.unit === "frames" ? usual : +(usual / settings.fps).toFixed(2)}
            onInput=${typed("length")} />
          <select aria-label=${`${say("frames")} / ${say("seconds")}`} value=${form.unit}
            onChange=${typed("unit", "length")}>
            <option value="frames">${say("frames")}</option>
            <option value="seconds">${say("seconds")}</option>
          </select>
        </div>`}
    <//>`;
}

const SeedField = ({ form, error }) => html`
  <${Field} name="seed" label=${say("seed")} error=${error("seed")}>
    ${(props) => html`
      <div class="pair">
        <input ...${props} inputmode="numeric" autocomplete="off" placeholder=${say("seed_any")}
          value=${form.seed} onInput=${typed("seed")} />
        <${IconButton} name="dice" words=${say("dice")}
          onClick=${() => setForm({ seed: String(drawSeed()) })} />
      </div>`}
  <//>`;

function LoraFields({ form, settings, error }) {
  if (!settings.loras.length) return null;
  const set = (name, value) => {
    const { [name]: _, ...others } = form.loras;
    setForm({ loras: value === null ? others : { ...others, [name]: value } });
  };
  return html`
    <fieldset id="lora" tabindex="-1" aria-describedby=${error ? "lora-error" : undefined}>
      <legend>${say("lora")}</legend>
      ${settings.loras.map((name) => html`
        <div class="lora" key=${name}>
          <label><input type="checkbox" checked=${name in form.loras}
            onChange=${(event) => set(name, event.currentTarget.checked ? "1" : null)} />
            <span>${name}</span></label>
          ${name in form.loras && html`<input inputmode="decimal" value=${form.loras[name]}
            aria-label=${say("strength", { name })}
            onInput=${(event) => set(name, event.currentTarget.value)} />`}
        </div>`)}
      ${error && html`<p class="error" id="lora-error"><${Said} words=${error} /></p>`}
    </fieldset>`;
}

/** What changes the result in a way that most people leave to the model. */
function More({ form, settings, error, open }) {
  const two = settings.experts.length === 2;
  const usual = settings.defaults;
  const element = useRef();
  useLayoutEffect(() => {
    if (open) element.current.open = true; // it is the person's to close
  }, [open]);
  return html`
    <details ref=${element}>
      <summary>${say("more")}</summary>
      <${Field} name="negative" label=${say("negative")} error=${error("negative")}>
        ${(props) => html`<textarea ...${props} rows="2" dir="auto" value=${form.negative}
          placeholder=${say("negative_hint")} onInput=${typed("negative")}></textarea>`}
      <//>
      <div class="row">
        <${Line} form=${form} error=${error} name="cfg_high" label=${say(two ? "cfg_high" : "cfg")}
          inputmode="decimal" placeholder=${usual.cfg_high} />
        ${two && html`<${Line} form=${form} error=${error} name="cfg_low" label=${say("cfg_low")}
          inputmode="decimal" placeholder=${usual.cfg_low} />`}
        <${Line} form=${form} error=${error} name="shift" label=${say("shift")}
          inputmode="decimal" placeholder=${usual.flow_shift} />
      </div>
    </details>`;
}

/** What a recipe brought that the form has no field for. */
function Rest({ form }) {
  const rest = Object.entries(form.rest);
  if (!rest.length) return null;
  return html`
    <p class="hint rest">${rest.map(([name, value]) => `${name} ${value}`).join(", ")}
      <${IconButton} name="close" words=${say("remove_rest")}
        onClick=${() => setForm({ rest: {} })} />
    </p>`;
}

function Actions({ count, busy, refused }) {
  const key = busy ? "submitting" : count > 1 ? "submit_many" : "submit";
  const share = state.uploaded ? `${Math.floor(100 * state.uploaded)} %` : "";
  return html`
    <div role="alert">
      ${refused && !refused.field && html`<p class="error boxed">
        <${Said} words=${refused.message} /></p>`}
    </div>
    <div class="actions">
      <button class="main" aria-disabled=${busy}>${say(key, { count, share })}</button>
      <button type="button" class="quiet" onClick=${clearForm}>${say("reset")}</button>
    </div>`;
}

const countOf = (form) => Math.min(MOST, Math.max(1, Math.floor(form.count) || 1));

/** Put the focus into a field that was refused, once it is drawn. */
const point = (field) => setTimeout(() => {
  const own = field === "size" && document.getElementById("own");
  (own || document.getElementById(field))?.focus();
});

/** Submit the form; return what the server refused. */
async function submit(form, settings) {
  const count = countOf(form);
  try {
    const body = bodyOf(form, settings);
    const bodies = count > 1 ? bySeed(body, count) : [body];
    const { sent, failed } = await send(bodies);
    if (!failed) return null;
    const field = shownField(failed);
    const values = { done: sent, count, message: wordsOf(failed) };
    if (field && !sent) return { field, message: values.message };
    return { field: "", message: say(sent ? "some_sent" : "not_sent", values) };
  } catch (error) {
    return { field: shownField(error), message: wordsOf(error) };
  }
}

export function Form() {
  const { form, settings, refused } = state;
  const [busy, setBusy] = useState(false);
  const element = useRef();
  const error = (name) => (refused?.field === name ? refused.message : "");
  const count = countOf(form);
  const send = async (event) => {
    event.preventDefault();
    if (busy) return;
    setBusy(true);
    update({ refused: null });
    const found = await submit(form, settings);
    update({ refused: found });
    setBusy(false);
    if (found?.field) point(found.field);
  };
  const quick = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element.current.requestSubmit();
  };
  return html`
    <form ref=${element} novalidate onSubmit=${send} onKeyDown=${quick}>
      <h2>${say("make")}</h2>
      <${Field} name="prompt" label=${say("prompt")} error=${error("prompt")}>
        ${(props) => html`<textarea ...${props} rows="4" dir="auto" value=${form.prompt}
          placeholder=${say("prompt_hint")} onInput=${typed("prompt")}></textarea>`}
      <//>
      ${settings.pictures > 0 && html`
        <div class="row">
          <${PictureField} name="image" label=${say("picture")} error=${error("image")} />
          ${settings.pictures > 1 && html`<${PictureField} name="last"
            label=${say("last_picture")} error=${error("last")} />`}
        </div>`}
      <div class="row">
        <${SizeField} form=${form} settings=${settings} error=${error} />
        <${LengthField} form=${form} settings=${settings} error=${error} />
      </div>
      <div class="row">
        ${settings.presets.length > 0 && html`
          <${Field} name="preset" label=${say("preset")} error=${error("preset")}>
            ${(props) => html`
              <select ...${props} value=${form.preset} onChange=${typed("preset")}>
                <option value="">${say("preset_none")}</option>
                ${settings.presets.map((name) => html`<option value=${name}>${name}</option>`)}
              </select>`}
          <//>`}
        <${Line} form=${form} error=${error} name="steps" label=${say("steps")} inputmode="numeric"
          placeholder=${settings.defaults.num_inference_steps} />
      </div>
      <div class="row">
        <${SeedField} form=${form} error=${error} />
        <${Field} name="count" label=${say("count")}
          hint=${count > 1 && say("count_hint", { count })}>
          ${(props) => html`<input type="number" min="1" max=${MOST} ...${props} value=${form.count}
            onInput=${typed("count")} />`}
        <//>
      </div>
      <${LoraFields} form=${form} settings=${settings} error=${error("lora")} />
      <${More} form=${form} settings=${settings} error=${error}
        open=${IN_MORE.includes(refused?.field)} />
      <${Rest} form=${form} />
      <${Actions} count=${count} busy=${busy} refused=${refused} />
    </form>`;
}
