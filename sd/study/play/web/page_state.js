// What the page knows: the settings, the states of the latents, and what is chosen. Views listen for changes.

export const byId = id => document.getElementById(id);
export const make = (name, properties = {}, parent = null, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  parent?.append(element);
  return element;
};
export const on = (id, kind, work) => byId(id).addEventListener(kind, work);
export const number = (value, digits = 3) => value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));

export const DEFAULTS = {prompt: "a red circle on a blue background", negative: "", seed: 1, guidance: null, steps: 10, sampler: "dpmpp_2m", prompt2: "", mix: 0, tool: "inside"};  // guidance: the model's

export const app = {
  engine: null,
  settings: {...DEFAULTS},
  states: [],  // of this run: {done, steps, latents, picture, …}, `done` steps taken; see page_run.js
  place: 0,  // of the state that is shown
  held: null,  // `done` of the state from which changes go on; null: from the start
  run: null,  // the engine's, while one is going or paused
  running: false,
  fresh: false,  // whether the states are of the settings as they are now
  guess: null,  // one prediction that is shown instead of a state: {picture, attention, label}
  about: {},  // what was done to the picture besides drawing it: {branched, painted, repainted}
  task: null,
};

const listeners = {};
export const listen = (kinds, work) => kinds.split(" ").forEach(kind => (listeners[kind] ??= []).push(work));
export const tell = (kind, ...given) => (listeners[kind] ?? []).forEach(work => work(...given));

export const now = () => app.states[app.place] ?? null;
export const last = () => app.states.at(-1) ?? null;
export const finished = () => Boolean(last() && last().done === last().steps && !app.running);

export function change(given) {  // settings, from a control or an address
  const before = {...app.settings};
  Object.assign(app.settings, given);
  const names = Object.keys(given).filter(name => app.settings[name] !== before[name]);
  if (names.length) tell("settings", names);
}

export function request(more = {}) {
  const {prompt, negative, seed, guidance, steps, sampler, prompt2, mix} = {...app.settings, ...more};
  const mixed = mix > 0 && prompt2.trim() ? {mix: {prompt: prompt2, share: mix}} : {};
  return {prompt, negative, seed, guidance, steps, sampler, ...mixed};
}

export const problem = error => { byId("problem").textContent = error ? error.message ?? String(error) : ""; };
export const tried = work => async (...given) => {
  try { return await work(...given); } catch (error) { problem(error); }
};
export const say = text => { byId("said").textContent = text; };

export const later = (wait, work) => {  // once it has been quiet for so many milliseconds
  let timer;
  return (...given) => { clearTimeout(timer); timer = setTimeout(work, wait, ...given); };
};

// Only the newest call counts: while one is working, others wait, and all but the last of them are dropped.
export function newest(work) {
  let busy = false, next = null;
  return async function ask(...given) {
    next = given;
    if (busy) return;
    busy = true;
    try {
      while (next) { const these = next; next = null; await work(...these); }
    } catch (error) { problem(error); } finally { busy = false; }
  };
}

// ---------- the address ----------

const NUMBERS = ["seed", "guidance", "steps", "mix"];
export const LIMITS = {seed: [0, 2 ** 53 - 1], guidance: [0, 40], steps: [1, 40], mix: [0, 1]};

export function address() {  // what differs from the defaults; the prompt and the seed always
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(app.settings)) {
    if (value !== DEFAULTS[name] || name === "prompt" || name === "seed") given.set(name, value);
  }
  if (app.task) given.set("task", app.task);
  return "#" + given.toString().replaceAll("+", "%20");
}

export function fromAddress(hash) {  // settings with valid values; others are left out
  const given = new URLSearchParams(hash.replace(/^#/, "")), found = {};
  for (const name of Object.keys(DEFAULTS)) {
    if (!given.has(name)) continue;
    const text = given.get(name);
    if (!NUMBERS.includes(name)) { found[name] = text.slice(0, 2000); continue; }
    const [low, high] = LIMITS[name], value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value)) continue;
    found[name] = Math.min(high, Math.max(low, name === "seed" || name === "steps" ? Math.round(value) : value));
  }
  return {found, task: given.get("task")};
}

export function writeAddress() {
  const hash = address();
  if (hash !== location.hash) history.replaceState(null, "", hash);
}
