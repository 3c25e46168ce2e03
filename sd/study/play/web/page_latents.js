// Painting into the latents: a colour, or one channel; then the run goes on with what was painted.

import {app, byId, listen, make, newest, now, on, problem, say, tell} from "./page_state.js";
import {CELLS, SIDE, drawChannel} from "./page_draw.js";
import {drawBrush, useBrush} from "./page_brush.js";
import {goOn} from "./page_run.js";

const COLOURS = {  // as in the training pictures
  red: [219, 36, 41], orange: [247, 133, 20], yellow: [250, 219, 46], green: [41, 158, 69], blue: [36, 92, 217], purple: [133, 51, 168], white: [242, 242, 242], black: [23, 23, 26],
};
const coded = new Map();  // latents of a plain picture of a colour: four numbers
let state = null, latents = null, clean = null, history = [], marks = Array(CELLS).fill(null);

const mode = () => document.querySelector("[name=brush]:checked").value;
const colour = () => document.querySelector("[name=colour]:checked").value;
const channel = () => Number(document.querySelector("[name=channel]:checked").value);

async function encode(name) {
  const data = new Uint8ClampedArray(128 * 128 * 4);
  for (let i = 0; i < data.length; i += 4) data.set([...COLOURS[name], 255], i);
  const whole = await app.engine.encode({width: 128, height: 128, data}), middle = SIDE / 2 * SIDE + SIDE / 2;
  coded.set(name, [0, 1, 2, 3].map(c => whole[c * CELLS + middle]));  // away from the edges
}

const preview = newest(async () => {  // what the picture would be, if the network agreed with the brush
  const shown = state, given = clean, painted = latents;
  if (!given) return;
  const ended = shown.done === shown.steps, picture = await app.engine.decode(ended ? painted : given, {quick: !ended});
  if (shown !== state || painted !== latents) return;
  if (ended) state.picture = picture;
  app.guess = {picture, attention: null, label: ended ? "painted latents, decoded" : "painted; go on to see what becomes of it"};
  marks = Array(CELLS).fill(null);
  tell("states");
  tell("shown");
  drawBrush();
});

function keep() {  // what was painted, so that every way to go on begins with it
  const painted = {...state, latents, painted: history.length > 0};
  app.states[app.states.indexOf(state)] = painted;
  state = painted;
  app.fresh = false;
  channels();
  preview();
  refresh();
}

const brush = {
  label: "Paint into the latents.",
  size: () => Number(byId("size").value),
  shown: () => marks,
  begin() { if (!state) take(); history.push({latents: latents.slice(), clean: clean?.slice() ?? null}); latents = latents.slice(); clean = clean?.slice() ?? null; },
  paint(cells) {
    const alphaBar = 1 / (1 + state.sigmaNext ** 2), root = state.done === state.steps ? 1 : Math.sqrt(alphaBar);
    const goal = mode() === "colour" ? coded.get(colour()) : null, amount = Number(byId("amount").value);
    for (const i of cells) {
      for (let c = 0; c < 4; c++) {
        const at = c * CELLS + i;
        if (goal) {
          latents[at] += root * (goal[c] - (clean ? clean[at] : 0));  // another clean picture under the same noise
          if (clean) clean[at] = goal[c];
        } else if (c === channel()) {
          latents[at] += amount;
          if (clean) clean[at] += amount;
        }
      }
      marks[i] = goal ? "rgb(" + COLOURS[colour()].join(" ") + " / .8)" : amount < 0 ? "#000a" : "#fffa";
    }
  },
  end: keep,
  undo() {
    const before = history.pop();
    if (!before) { say("There is nothing to undo."); return; }
    ({latents, clean} = before);
    marks = Array(CELLS).fill(null);
    keep();
    drawBrush();
  },
};

function take() {  // the latents of the state that is shown
  state = now();
  if (!state) return;
  latents = state.latents.slice();
  clean = state.done === state.steps ? latents.slice() : state.x0?.slice() ?? null;
  history = [];
  marks = Array(CELLS).fill(null);
}

function channels() {
  for (const canvas of byId("channels").querySelectorAll("canvas")) drawChannel(canvas, latents, Number(canvas.dataset.channel));
}

function refresh() {
  if (!state) return;
  const left = state.steps - state.done;
  byId("latents-where").textContent = app.running ? "The brush waits until the run ends or is stopped."
    : !left ? "The picture is finished. No network follows: the decoder alone turns what you paint into pixels. For more, choose an earlier step."
    : state.done ? "You are after step " + state.done + " of " + state.steps + ": the network has " + left + (left === 1 ? " step" : " steps") + " left to make something of what you paint."
    : "This is the noise before step 1. The network has all " + left + " steps left; what you paint is hardly louder than the noise.";
  byId("latents-go").disabled = !left || app.running;
  byId("latents-undo").disabled = !history.length;
  byId("colours").hidden = mode() !== "colour";
  byId("channel-choice").hidden = mode() !== "channel";
  byId("amount-now").textContent = byId("amount").value;
  byId("size-now").textContent = byId("size").value;
}

function attend() {  // to the state that is shown now, if the tool is open
  if (app.settings.tool !== "latents") return;
  useBrush(app.running || !now() || coded.size < Object.keys(COLOURS).length ? null : brush);
  if (!app.running && now() && now() !== state) { take(); channels(); }
  refresh();
}

export function setUpLatents() {
  Object.keys(COLOURS).forEach((name, i) => {
    const label = make("label", {className: "swatch", title: name}, byId("colours"));
    make("input", {type: "radio", name: "colour", value: name, checked: !i}, label).setAttribute("aria-label", name);
    make("span", {}, label).style.background = "rgb(" + COLOURS[name].join(" ") + ")";
  });
  for (let c = 0; c < 4; c++) {
    const label = make("label", {}, byId("channels"));
    make("input", {type: "radio", name: "channel", value: c, checked: !c}, label).setAttribute("aria-label", "Channel " + (c + 1));
    make("canvas", {width: SIDE, height: SIDE, className: "raw"}, label).dataset.channel = c;
    make("span", {textContent: c + 1}, label);
  }
  byId("tool-latents").addEventListener("input", refresh);
  on("latents-undo", "click", () => brush.undo());
  on("latents-go", "click", () => {
    if (state) goOn(state.done).catch(problem);
  });
  listen("shown running", attend);
  listen("settings", names => { if (names.includes("tool")) { state = null; prepare(); attend(); } });
}

async function prepare() {  // the colours' latents, so that the brush need not wait
  if (app.settings.tool !== "latents") return;
  try {
    for (const name of Object.keys(COLOURS)) if (!coded.has(name)) await encode(name);
    attend();
  } catch (error) { problem(error); }
}
