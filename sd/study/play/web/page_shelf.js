// The last finished pictures, to compare: each comes back with its settings and all its steps.

import {app, byId, change, last, listen, make, say} from "./page_state.js";
import {drawPicture} from "./page_draw.js";
import {edits, restore} from "./page_run.js";

const MOST = 10;
const NAMES = {
  prompt: () => "other words",
  negative: () => "negative",
  seed: value => "seed " + value,
  guidance: value => "guidance " + value,
  steps: value => value + (value === 1 ? " step" : " steps"),
  sampler: value => app.engine.model.samplers.find(({name}) => name === value).label,
  prompt2: () => "second prompt",
  mix: value => "mix " + Math.round(100 * value) + " %",
};
let before = null;  // the settings of the picture before

function label(settings, about) {  // what was changed since
  const changed = Object.keys(NAMES).filter(name => !before || settings[name] !== before[name]);
  const done = about.repainted ? "repainted" : about.painted ? "painted" : about.branched ? "from a step" : "";
  if (!before || changed.includes("prompt") && settings.prompt !== before.prompt && !done) return "“" + (settings.prompt.length > 24 ? settings.prompt.slice(0, 22) + "…" : settings.prompt) + "”";
  return done || changed.map(name => NAMES[name](settings[name])).slice(0, 2).join(", ") || "again";
}

function keep() {
  const {tool, ...settings} = app.settings, entry = {settings, states: [...app.states], about: edits()}, shelf = byId("shelf");
  const text = label(settings, entry.about), button = make("button", {type: "button", title: settings.prompt});
  before = settings;
  drawPicture(make("canvas", {}, button), last().picture);
  make("span", {textContent: text}, button);
  button.setAttribute("aria-label", "Bring back: " + text);
  button.addEventListener("click", () => {
    app.quiet = true;
    change(entry.settings);
    app.quiet = false;
    restore({...entry, states: [...entry.states]});
    before = entry.settings;
    say("Brought back: " + text + ".");
  });
  shelf.prepend(button);
  while (shelf.children.length > MOST) shelf.lastElementChild.remove();
  byId("before").hidden = shelf.children.length < 2;
}

export const setUpShelf = () => listen("finished", keep);
