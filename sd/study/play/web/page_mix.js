// Mixing two prompts: between their vectors, a bit at a time.

import {app, byId, change, listen, make, on, tried} from "./page_state.js";
import {drawPicture} from "./page_draw.js";
import {draw} from "./page_run.js";

const SHARES = [0, .25, .5, .75, 1], SECOND = "a green star on a yellow background";

async function way() {  // five pictures from the first prompt to the second
  const box = byId("way");
  if (!app.settings.prompt2.trim()) throw new Error("The second prompt is empty: write one to mix with the first.");
  box.replaceChildren();
  for (const share of SHARES) {
    app.quiet = true;
    change({mix: share});
    app.quiet = false;
    const result = await draw();
    if (!result?.picture) return;  // something else was asked for
    const button = make("button", {type: "button"}, box), canvas = make("canvas", {}, button);
    drawPicture(canvas, result.picture);
    make("span", {textContent: Math.round(100 * share) + " %"}, button);
    button.setAttribute("aria-label", "Mix " + Math.round(100 * share) + " %");
    button.addEventListener("click", () => change({mix: share}));
  }
}

function show() {
  byId("mix-now").textContent = Math.round(100 * app.settings.mix) + " %";
  for (const button of byId("way").children) button.toggleAttribute("aria-current", button.getAttribute("aria-label") === "Mix " + byId("mix-now").textContent);
}

export function setUpMix() {
  on("mix-way", "click", tried(way));
  listen("settings", names => {
    if (names.includes("tool") && app.settings.tool === "mix" && !app.settings.prompt2) change({prompt2: SECOND});
    if (names.some(name => ["prompt", "prompt2", "seed", "steps", "guidance", "sampler", "negative"].includes(name))) byId("way").replaceChildren();
    show();
  });
  show();
}
