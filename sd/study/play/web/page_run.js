// Runs: from the start, from a step, or from a picture; their states fill the film.
//
// State k stands after k steps: its latents go into step k + 1, its picture is what step k predicted. State 0 is the noise.

import {app, last, later, now, problem, request, say, tell} from "./page_state.js";

const stateOf = record => ({
  done: record.step + 1, steps: record.steps, timestep: record.timestep, alphaBar: record.alphaBar, sigma: record.sigma, sigmaNext: record.sigmaNext,
  given: record.latents, latents: record.next, eps: record.eps, x0: record.x0, picture: record.preview, attention: record.attention, ms: record.ms,
});
const stateBefore = record => ({done: record.step, steps: record.steps, sigmaNext: record.sigma, latents: record.latents, picture: record.noisy, attention: null});

export function show(place) {
  app.place = Math.min(app.states.length - 1, Math.max(0, place));
  app.guess = null;
  tell("shown");
}

function begin(kept, given, about) {
  const asked = app.engine.start(given, {
    step(record) {
      if (app.run !== asked) return;
      if (!app.states.length || app.states.at(-1).done < record.step) app.states.push(stateBefore(record));
      app.states.push(stateOf(record));
      app.place = app.states.length - 1;
      tell("states");
      tell("shown");
    },
    paused() {
      if (app.run !== asked) return;
      app.running = false;
      app.held = last()?.done ?? 0;
      say("Stopped after step " + app.held + " of " + given.steps + ". Changes go on from here.");
      tell("running");
    },
  });
  app.run = asked;
  app.states = kept;
  app.guess = null;
  app.running = true;
  app.fresh = true;
  app.about = about;
  problem(null);
  say("Drawing…");
  tell("states");
  tell("running");
  return asked;
}

async function end(asked) {
  const result = await asked.finished;
  if (app.run !== asked) return null;
  app.run = null;
  app.running = false;
  if (result.picture) {
    const state = last();
    if (state) Object.assign(state, {picture: result.picture, latents: result.latents, exact: true});
    else app.states.push({done: 0, steps: 1, latents: result.latents, picture: result.picture, attention: null});
    say("The picture is ready: " + result.steps + " steps in " + (result.ms / 1000).toFixed(1) + " seconds.");
  }
  tell("states");
  tell("shown");
  tell("running");
  if (result.picture) tell("finished", result);
  return result;
}

async function whole(kept, given, about) {
  let asked;
  try {
    asked = begin(kept, given, about);
    return await end(asked);
  } catch (error) {
    if (app.run === asked) Object.assign(app, {run: null, running: false, fresh: false});
    tell("running");
    throw error;
  }
}

export function draw(more = {}) {  // from the start
  app.held = null;
  return whole([], request(more), {});
}

export function goOn(done) {  // from the state after so many steps, with the settings as they are now
  const index = app.states.findIndex(state => state.done === done);
  if (index < 0) return draw();
  const kept = app.states.slice(0, index + 1);
  app.held = done;
  app.place = index;
  const from = {step: done, latents: kept[index].latents};
  return whole(kept, {...request({steps: kept[index].steps}), from}, {...app.about, branched: true});
}

export function stop() {  // after the step that is working
  if (app.run && app.running) app.run.pause();
}

export function resume() {  // as if it had never stopped, if nothing was changed
  if (app.run && !app.running && app.fresh && now() === last()) {
    app.running = true;
    problem(null);
    tell("running");
    app.run.resume();
  } else return goOn(now()?.done ?? 0);
}

export const edits = () => ({...app.about, painted: app.about.painted || app.states.some(state => state.painted)});

export function repaint(given) {
  app.held = null;
  return whole([], given, {...edits(), repainted: given.prompt});
}

export const canGoOn = () => Boolean(now() && !app.running && now().done < now().steps);
// A run that was finished before, as it was.
export function restore({states, about}) {
  app.run?.stop();
  Object.assign(app, {run: null, running: false, held: null, fresh: true, states, about});
  tell("states");
  tell("running");
  show(states.length - 1);
}

export const redraw = () => app.held === null ? draw() : goOn(app.held);
export const redrawSoon = later(150, () => redraw().catch(problem));
