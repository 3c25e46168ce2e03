// Tasks to try: each sets the controls, says what to do and what to look for, and names its chapter of the course.

import {DEFAULTS, app, byId, change, make, on, problem, tell, writeAddress} from "./page_state.js";
import {draw, show} from "./page_run.js";
import {choose} from "./page_words.js";

const CIRCLE = "a red circle on a blue background";
const PAIR = "a red circle to the left of a green square on a white background";

// `at`: the step that is held once the picture is finished; `word`: the one whose heat map is shown; `words`: to repaint with
export const TASKS = [
  {
    id: "seed", title: "Same words, other noise", chapter: 1, settings: {prompt: "a yellow star on a purple background", seed: 1},
    steps: ["Press the die beside the seed, five times.", "Then write the first seed again: 1."],
    look: "What changes is what the words leave open: place, size, tilt. The same seed brings the same picture back, to the last bit.",
  },
  {
    id: "channels", title: "What the four channels hold", chapter: 2, settings: {prompt: CIRCLE, seed: 1, tool: "latents"}, brush: "channel",
    steps: ["Paint a stroke on the finished picture with channel 1.", "Undo, choose another channel, paint again. Try the slider’s negative side, too."],
    look: "Each channel shifts colour and light in its own way, and none is simply red or bright: the VAE found its own code. One place of the latents colours about 8 × 8 pixels, and all others a little.",
  },
  {
    id: "order", title: "The same words in another order", chapter: 3, settings: {prompt: CIRCLE, seed: 1},
    steps: ["Swap “red” and “blue” in the prompt.", "Then leave out “on a blue background”."],
    look: "The same tokens in another order give other vectors, so the colours change places. What you do not say, the noise decides.",
  },
  {
    id: "mix", title: "Half-way between two prompts", chapter: 3, settings: {prompt: CIRCLE, prompt2: "a green star on a yellow background", seed: 1, tool: "mix"},
    steps: ["Press “Draw the whole way”.", "Move the slider slowly between the two pictures where most changes."],
    look: "It is no cross-fade: every picture on the way is whole. Shape and colours flip, but not all at the same point, so there may be a red star on the way.",
  },
  {
    id: "words", title: "Where each word is read", chapter: 4, settings: {prompt: PAIR, seed: 1}, word: "circle",
    steps: ["Point at “circle” and “square”, then at “red” and the other words.", "Step back to step 2, and point again."],
    look: "A noun lights up where its thing is, even at step 2, and the word after it may do so, too: the vector of a token also holds the words before it. So the colour can be read from the noun, and “red” itself need not be.",
  },
  {
    id: "stop", title: "Change the word half-way", chapter: 5, settings: {prompt: CIRCLE, seed: 1}, at: 3,
    steps: ["The run is held at step 3. Change “circle” to “star”: it goes on from there.", "Write “circle” again and press Draw. Choose step 8 in the film, press Hold, and change the word there. Then try step 6."],
    look: "Early steps decide on place and shape, late ones only on details: the later the change, the less of a star.",
  },
  {
    id: "few", title: "How few steps are enough?", chapter: 5, settings: {prompt: PAIR, seed: 1, sampler: "ddim", steps: 20},
    steps: ["Take 10 steps, then 5, 3 and 2.", "Do the same with DPM++ 2M."],
    look: "Ten steps look much like twenty. Below five, shapes and colours fall apart. DPM++ 2M extrapolates from the previous prediction, which pays with small steps and goes wrong with huge ones.",
  },
  {
    id: "colours", title: "Find the guidance where colours break", chapter: 6, settings: {prompt: CIRCLE, seed: 1},
    steps: ["Move the guidance scale from 3 to 1, and to 0.", "Then to 7.5, 15, 25 and 40."],
    look: "At 0 the prompt has no effect, at 1 it is only a hint. Far beyond 3, colours overshoot, the background gets spots, and halos appear around the edges.",
  },
  {
    id: "timestep", title: "How much noise hides a picture?", chapter: 7, settings: {prompt: CIRCLE, seed: 1, tool: "time"},
    steps: ["Drag the timestep from 999 down to 0.", "At 700, change “circle” to “star” in the prompt. Then try 950, 300 and 100."],
    look: "Training asks exactly this, at random timesteps. Under much noise, the shape comes from the words; under little noise, from the picture.",
  },
  {
    id: "noise", title: "Paint into the noise", chapter: 8, settings: {prompt: CIRCLE, seed: 1, tool: "latents"}, at: 8, colour: "yellow",
    steps: ["The run is held at step 8. Paint a yellow spot beside the circle, and press “Go on from here”.", "Do the same at step 6, and at step 3."],
    look: "Late, the spot stays as you painted it: the steps that are left hardly change anything. Early, the network takes it for noise, and the words win. Image to image chooses its start in the same way.",
  },
  {
    id: "repaint", title: "Repaint a part", chapter: 8, settings: {prompt: CIRCLE, seed: 1, tool: "repaint"}, words: "a yellow star on a blue background",
    steps: ["Paint over the circle, a little beyond its edge, and press Repaint.", "Press Draw, and repaint with strength 1. Then Draw again, and strength 0.4."],
    look: "Outside the mask, nothing changes by one bit. At strength 1, the part begins as pure noise, and the new thing may lie anywhere, even be cut off; with less, it grows out of what was there.",
  },
];

let holding = null;

export async function openTask(id) {
  const task = TASKS.find(one => one.id === id);
  if (!task) return;
  app.task = id;
  byId("task-title").textContent = task.title;
  byId("task-steps").replaceChildren(...task.steps.map(text => make("li", {textContent: text})));
  const chapter = byId("chapter-" + task.chapter);
  byId("task-look").replaceChildren(make("b", {textContent: "Look for: "}), task.look + " ", ...(chapter ? [...chapter.childNodes].map(node => node.cloneNode(true)) : []));
  byId("task").hidden = false;
  app.quiet = true;
  change({...DEFAULTS, ...task.settings});
  app.quiet = false;
  if (task.words) byId("words").value = task.words;
  for (const [name, value] of [["brush", task.brush ?? "colour"], ["colour", task.colour ?? "red"]]) {
    const choice = document.querySelector(`[name=${name}][value=${value}]`);
    choice.checked = true;
    choice.dispatchEvent(new Event("input", {bubbles: true}));
  }
  writeAddress();
  const turn = holding = {}, result = await draw();
  if (turn !== holding || !result?.picture) return;
  choose(task.word ?? "");
  if (task.at) {
    show(app.states.findIndex(state => state.done === task.at));
    app.held = task.at;
    tell("running");
  }
}

export function setUpTasks() {
  TASKS.forEach((task, i) => {
    const card = make("button", {type: "button", className: "card"}, make("li", {}, byId("tasks")));
    make("b", {textContent: i + 1 + ". " + task.title}, card);
    make("span", {textContent: task.steps[0]}, card);
    make("small", {textContent: "Chapter " + task.chapter + " of the course"}, card);
    card.addEventListener("click", () => {
      byId("task").hidden = false;
      openTask(task.id).catch(problem);
      byId("task").scrollIntoView({block: "start"});
      byId("task").focus({preventScroll: true});
    });
  });
  on("task-close", "click", () => {
    byId("task").hidden = true;
    app.task = null;
    writeAddress();
    byId("prompt").focus({preventScroll: true});
  });
}
