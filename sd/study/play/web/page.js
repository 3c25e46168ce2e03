// The page: loads the engine, fills the controls, and keeps picture, film and settings in step.

import {connect} from "./client.js";
import {DEFAULTS, LIMITS, app, byId, change, fromAddress, later, listen, make, now, on, problem, say, tell, tried, writeAddress} from "./page_state.js";
import {drawPicture} from "./page_draw.js";
import {canGoOn, draw, redrawSoon, resume, show, stop} from "./page_run.js";
import {readWords} from "./page_words.js";
import {useBrush} from "./page_brush.js";
import {explainTerms} from "./page_terms.js";
import {setUpLooking} from "./page_look.js";
import {setUpLatents} from "./page_latents.js";
import {setUpMix} from "./page_mix.js";
import {setUpRepaint} from "./page_repaint.js";
import {setUpMachine} from "./page_machine.js";
import {openTask, setUpTasks} from "./page_tasks.js";
import {save} from "./page_save.js";
import {setUpShelf} from "./page_shelf.js";

const EXAMPLES = {
  "star": "a yellow star on a striped purple background",
  "heart": "a large green heart on a white background",
  "ring above square": "an orange ring above a blue square on a white background",
  "(weights:1.4)": "a (small:1.4) black cross on a dotted orange background",
};
const TEXTS = ["prompt", "negative", "prompt2", "sampler"], NUMBERS = ["seed", "guidance", "steps", "mix"];
const TOOLS = ["inside", "time", "latents", "mix", "repaint"];

// ---------- controls ----------

function fill() {
  for (const name of [...TEXTS, ...NUMBERS]) if (byId(name).value !== String(app.settings[name])) byId(name).value = app.settings[name];
  byId("guidance-now").textContent = app.settings.guidance;
  byId("steps-now").textContent = app.settings.steps;
  for (const tool of TOOLS) {
    const tab = byId("tab-" + tool), chosen = tool === app.settings.tool;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    byId("tool-" + tool).hidden = !chosen;
  }
}

function valid(name, text) {  // a number from a control, or null
  const [low, high] = LIMITS[name], value = Number(text);
  return text.trim() === "" || !Number.isFinite(value) || value < low || value > high || name === "seed" && value % 1 ? null : value;
}

function changed(names) {
  app.fresh = false;
  fill();
  writeSoon();
  const whole = ["seed", "steps", "sampler"].some(name => names.includes(name));
  if (whole && app.held !== null) { app.held = null; tell("running"); }
  const others = names.filter(name => name !== "tool" && (name !== "prompt2" || app.settings.mix > 0));
  if (app.quiet || !byId("live").checked || !others.length || ["time", "repaint"].includes(app.settings.tool)) return;
  redrawSoon();
}
const writeSoon = later(300, writeAddress);

function setUpControls() {
  for (const name of TEXTS) on(name, "input", () => change({[name]: byId(name).value}));
  for (const name of NUMBERS) on(name, "input", () => {
    const value = valid(name, byId(name).value);
    problem(value === null ? "The seed is a whole number from 0 to 9,007,199,254,740,991." : null);
    if (value !== null) change({[name]: value});
  });
  on("prompt", "keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    draw().catch(problem);
  });
  on("dice", "click", () => change({seed: Math.floor(Math.random() * 2 ** 31)}));
  byId("examples").append(...Object.entries(EXAMPLES).map(([label, text]) => {
    const chip = make("button", {type: "button", className: "chip", textContent: label, title: text});
    chip.addEventListener("click", () => change({prompt: text}));
    return chip;
  }));
  for (const id of ["ask", "numbers"]) on(id, "submit", event => event.preventDefault());
  byId("sampler").append(...app.engine.model.samplers.map(({name, label}) => make("option", {value: name, textContent: label})));
  for (const tool of TOOLS) on("tab-" + tool, "click", () => change({tool}));
  on("tabs", "keydown", event => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key], at = TOOLS.indexOf(app.settings.tool);
    const to = way ? (at + way + TOOLS.length) % TOOLS.length : {Home: 0, End: TOOLS.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    change({tool: TOOLS[to]});
    byId("tab-" + TOOLS[to]).focus();
  });
}

// ---------- picture and film ----------

function shown() {
  const state = now();
  if (!state) return;
  drawPicture(byId("picture"), app.guess?.picture ?? state.picture);
  const ready = state.exact && !app.running;
  const label = app.guess?.label ?? (ready ? "finished" : state.done ? "x̂₀ predicted in step " + state.done : "pure noise");
  byId("badge").textContent = label;
  byId("picture").setAttribute("aria-label", "The picture: " + label);
  byId("step").value = app.place;
  const text = (state.done ? "step " + state.done + " of " + state.steps + ", timestep " + Math.round(state.timestep) : "before step 1 of " + state.steps);
  byId("now").textContent = text;
  byId("step").setAttribute("aria-valuetext", text);
  const film = byId("film");
  [...film.children].forEach((frame, i) => frame.toggleAttribute("aria-current", i === app.place));
  const frame = film.children[app.place];
  if (frame) film.scrollLeft = frame.offsetLeft - film.clientWidth / 2 + frame.offsetWidth / 2;
  buttons();
}

function states() {
  const film = byId("film");
  byId("step").max = Math.max(1, app.states.length - 1);
  while (film.children.length > app.states.length) film.lastElementChild.remove();
  app.states.forEach((state, i) => {
    let frame = film.children[i];
    if (!frame) {
      frame = make("button", {type: "button"}, film);
      make("canvas", {width: 128, height: 128}, frame);
      make("span", {}, frame);
      frame.addEventListener("click", () => show(i));
    }
    if (frame.state === state && frame.picture === state.picture) return;
    Object.assign(frame, {state, picture: state.picture});
    drawPicture(frame.firstElementChild, state.picture);
    frame.lastElementChild.textContent = state.done || "noise";
    frame.setAttribute("aria-label", state.done ? "step " + state.done : "noise, before step 1");
  });
  [...film.children].forEach((frame, i) => frame.classList.toggle("held", app.states[i].done === app.held));
}

function buttons() {
  const state = now(), more = canGoOn();
  byId("draw").textContent = app.running ? "Stop" : "Draw";
  byId("draw").classList.toggle("primary", app.running || !more);
  byId("go").hidden = !more;
  byId("go").textContent = "Go on from " + (state?.done ? "step " + state.done : "the noise");
  const held = app.held !== null;
  byId("hold").setAttribute("aria-pressed", String(held));
  byId("hold").textContent = held ? "Held at " + (app.held || "noise") : "Hold";
  byId("hold").hidden = !held && !more;
}

function setUpPlayer() {
  on("draw", "click", () => app.running ? stop() : draw().catch(problem));
  on("go", "click", tried(resume));
  on("hold", "click", () => {
    app.held = app.held === null ? now().done : null;
    say(app.held === null ? "Changes draw the whole picture again." : "Changes go on from " + (app.held ? "step " + app.held : "the noise") + ".");
    tell("running");
  });
  on("step", "input", () => show(Number(byId("step").value)));
  on("back", "click", () => show(app.place - 1));
  on("on", "click", () => show(app.place + 1));
  document.addEventListener("keydown", event => { if (event.key === "Escape") stop(); });
  on("save", "click", tried(save));
  on("link", "click", tried(async () => {
    writeAddress();
    try { await navigator.clipboard.writeText(location.href); } catch { throw new Error("The browser does not let a page copy here. The address bar holds the link."); }
    say("The link is copied.");
  }));
}

// ---------- loading ----------

const megabytes = bytes => (bytes / 1e6).toFixed(0);

async function main() {
  explainTerms();
  app.engine = await connect({progress({part, loaded, total}) {
    byId("loaded").value = total ? loaded / total : 0;
    byId("loading-text").textContent = part === "ready" ? "Ready." : "Loading the " + part + ": " + megabytes(loaded) + " of " + megabytes(total) + " MB";
  }});
  app.settings.guidance = DEFAULTS.guidance = app.engine.model.defaults.guidance;
  listen("settings", names => { if (names.includes("tool")) useBrush(null); });  // first: the next tool may take the brush
  setUpControls();
  setUpPlayer();
  setUpLooking();
  setUpLatents();
  setUpMix();
  setUpRepaint();
  setUpMachine();
  setUpTasks();
  setUpShelf();
  listen("states", states);
  listen("shown", shown);
  listen("running", () => { states(); buttons(); byId("frame").setAttribute("aria-busy", String(app.running)); });
  listen("settings", changed);
  byId("loading").hidden = true;
  document.querySelector("main").removeAttribute("aria-busy");
  const given = fromAddress(location.hash);
  app.quiet = true;
  change({...given.found, sampler: app.engine.model.samplers.some(({name}) => name === given.found.sampler) ? given.found.sampler : DEFAULTS.sampler, tool: TOOLS.includes(given.found.tool) ? given.found.tool : DEFAULTS.tool});
  app.quiet = false;
  fill();
  await readWords();
  addEventListener("hashchange", arrive);
  if (given.task) await openTask(given.task); else await draw();
}

const arrive = tried(async () => {  // another address was written, or a link to this page followed
  const {found, task} = fromAddress(location.hash);
  if (task && task !== app.task) await openTask(task); else change({...DEFAULTS, ...found});
});

main().catch(error => {
  byId("loading").hidden = true;
  document.querySelector("main").removeAttribute("aria-busy");
  problem(error);
});
