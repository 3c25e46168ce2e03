// The whole machine as a row of parts, with this run's own pictures in it; each part unfolds.

import {app, byId, last, listen, now} from "./page_state.js";
import {drawLatents, drawPicture} from "./page_draw.js";

function draw() {
  const state = now(), end = last(), first = app.states[0];
  byId("thumb-prompt").textContent = "“" + app.settings.prompt + "”";
  byId("thumb-seed").textContent = "from seed " + app.settings.seed;
  if (!state) return;
  drawLatents(byId("thumb-noise"), first.latents);
  drawPicture(byId("thumb-x0"), state.picture);
  drawLatents(byId("thumb-latents"), end.latents);
  drawPicture(byId("thumb-picture"), end.picture);
  byId("turn").textContent = state.done ? "step " + state.done + " of " + state.steps : "before step 1";
}

export function setUpMachine() {
  const parts = [...byId("machine").querySelectorAll("button")];
  const unfold = chosen => parts.forEach(button => {
    const open = button === chosen && button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    byId(button.getAttribute("aria-controls")).hidden = !open;
  });
  parts.forEach(button => button.addEventListener("click", () => unfold(button)));
  unfold(null);
  for (const place of document.querySelectorAll("[data-chapter]")) {
    const found = byId("chapter-" + place.dataset.chapter);
    if (found) place.append(...[...found.childNodes].map(node => node.cloneNode(true)));
  }
  const {threads, backend} = app.engine.model;
  byId("equal").textContent = "The networks run here with " + {wasm: "WebAssembly", webgpu: "WebGPU"}[backend] + (threads > 1 ? " in " + threads + " threads." : " in one thread.");
  listen("shown settings", draw);
}
