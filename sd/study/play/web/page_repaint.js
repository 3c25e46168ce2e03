// Repainting a part of the finished picture with new words.

import {app, byId, finished, last, listen, on, request, say, tell, tried} from "./page_state.js";
import {CELLS, blockMask} from "./page_draw.js";
import {drawBrush, useBrush} from "./page_brush.js";
import {repaint, show} from "./page_run.js";

let mask = Array(CELLS).fill(false), history = [], used = false;  // whether the picture was repainted since

const remember = () => { used = false; history.push(mask.slice()); };
const brush = {
  label: "Mask: paint over what to repaint.",
  size: () => Number(byId("mask-size").value),
  shown: () => mask.map(painted => painted && !used ? "rgb(224 33 138 / .5)" : null),
  edges: () => mask,
  begin: remember,
  paint(cells) { for (const i of cells) mask[i] = true; },
  end() {},
  undo() {
    if (!history.length) { say("There is nothing to undo."); return; }
    mask = history.pop();
    drawBrush();
  },
};
const set = work => () => { remember(); mask = mask.map(work); drawBrush(); };

async function go() {
  if (!finished()) throw new Error("Repainting begins with a finished picture: wait for it, or press Draw.");
  if (!mask.some(Boolean)) throw new Error("Paint over the part to repaint: nothing of the picture is painted yet.");
  const words = byId("words").value, strength = Number(byId("strength").value), {picture} = last();
  const given = {...request({prompt: words, mix: 0}), init: {picture}, mask: blockMask(mask), strength};
  used = true;
  await repaint(given);
}

function refresh() {
  byId("strength-now").textContent = byId("strength").value;
  byId("mask-size-now").textContent = byId("mask-size").value;
}

function attend() {
  if (app.settings.tool !== "repaint") return;
  useBrush(finished() && !app.guess ? brush : null);
  byId("repaint").disabled = app.running;
}

export function setUpRepaint() {
  on("repaint", "click", tried(go));
  on("mask-undo", "click", () => brush.undo());
  on("mask-clear", "click", set(() => false));
  on("mask-invert", "click", set(painted => !painted));
  byId("tool-repaint").addEventListener("input", refresh);
  listen("shown running", attend);
  listen("settings", names => {
    if (!names.includes("tool") || app.settings.tool !== "repaint") return;
    if (!byId("words").value) byId("words").value = app.settings.prompt;
    if (finished()) show(app.states.length - 1); else tell("shown");
  });
  refresh();
}
