// Looking on: what the UNet works on at a step, and one guess at any timestep.

import {app, byId, finished, last, listen, make, newest, now, number, on, request, tell} from "./page_state.js";
import {clear, drawLatents, drawPicture} from "./page_draw.js";
import {term} from "./page_terms.js";

// ---------- look inside ----------

const arrow = (from, to) => number(from) + " → " + number(to);

function inside() {
  const state = now();
  if (!state || app.settings.tool !== "inside") return;
  drawLatents(byId("see-latents"), state.given ?? state.latents);
  for (const name of ["eps", "x0"]) if (state[name]) drawLatents(byId("see-" + name), state[name]); else clear(byId("see-" + name));
  const list = byId("figures"), row = (sign, name, after, value) => {
    const box = make("div", {}, list), dt = make("dt", {}, box);
    term(name, sign, dt);
    dt.append(after);
    make("dd", {textContent: value}, box);
  };
  list.replaceChildren();
  if (!state.eps) return;
  const bar = sigma => 1 / (1 + sigma ** 2);
  row("timestep", "timestep", "", number(state.timestep, 4));
  row("σ", "sigma", ", before → after", arrow(state.sigma, state.sigmaNext));
  row("ᾱ", "alpha_bar", ", before → after", arrow(state.alphaBar, bar(state.sigmaNext)));
  make("div", {}, list, make("dt", {textContent: "time of the step"}), make("dd", {textContent: Math.round(state.ms) + " ms"}));
}

// ---------- the timestep ----------

let guessed = 0;

const guess = newest(async () => {
  const note = byId("time-note"), clean = last()?.latents;
  if (app.settings.tool !== "time") return;
  if (!finished()) { note.textContent = "This begins once a picture is finished."; return; }
  const timestep = Number(byId("time").value), turn = ++guessed;
  const found = await app.engine.at({...request({guidance: 1}), latents: clean, timestep});
  const eps = await app.engine.decode(found.eps, {quick: true});
  if (app.settings.tool !== "time" || !finished() || last().latents !== clean) return;
  drawPicture(byId("time-noisy"), found.noisy);
  drawPicture(byId("time-eps"), eps);
  drawPicture(byId("time-x0"), found.preview);
  note.textContent = "ᾱ is " + number(found.alphaBar) + ": so much of the power of x_t is picture, the rest is noise. One prediction took " + Math.round(found.ms) + " ms.";
  app.guess = {picture: found.preview, attention: found.attention, label: "one guess at t = " + timestep};
  if (turn === guessed) tell("shown");
});

export function setUpLooking() {
  const show = () => { byId("time-now").textContent = byId("time").value; };
  on("time", "input", () => { show(); guess(); });
  show();
  listen("shown", inside);
  listen("finished", guess);
  listen("settings", names => {
    if (app.settings.tool === "time") guess();
    else if (names.includes("tool") && app.guess) { app.guess = null; tell("shown"); }
    inside();
  });
}
