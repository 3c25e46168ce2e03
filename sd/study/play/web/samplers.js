// Samplers: from noise to clean latents, as in sd/sampling/samplers/.
//
// Each is an async generator that yields the latents after every step. `predictEps(x, alphaBar)` resolves to the noise in x. What
// is sent back into the generator replaces the latents: next(painted).

import { sigmaOf, x0FromEps } from "./schedule.js";

/** Which samplers there are, with the schedules of `sd txt2img`; `finalAlpha` says where the last step ends. */
export const SAMPLERS = {
  dpmpp_2m: { label: "DPM++ 2M", schedule: "karras", finalAlpha: "one", run: dpmpp2m },
  euler: { label: "Euler", schedule: "linspace", finalAlpha: "one", run: euler },
  ddim: { label: "DDIM", schedule: "leading", finalAlpha: "first", run: ddim },
};

/** DDIM: Song et al., "Denoising Diffusion Implicit Models" (2021), eq. 12 without fresh noise. */
export async function* ddim(predictEps, x, steps) {
  for (const { alphaBar, alphaBarNext } of steps) {
    const eps = await predictEps(x, alphaBar), x0 = x0FromEps(x, eps, alphaBar);
    const [signal, spread] = [Math.sqrt(alphaBarNext), Math.sqrt(1 - alphaBarNext)];
    const after = x0.map((value, i) => signal * value + spread * eps[i]);
    x = (yield after) ?? after;
  }
}

/** Euler: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), eq. 1 and 3 with
 * sigma(t) = t: dx/dsigma = eps, for a signal that is not scaled down. It equals DDIM's step. */
export async function* euler(predictEps, x, steps) {
  for (const { alphaBar, alphaBarNext } of steps) {
    const eps = await predictEps(x, alphaBar), scale = Math.sqrt(alphaBar), length = sigmaOf(alphaBarNext) - sigmaOf(alphaBar);
    const after = x.map((value, i) => Math.sqrt(alphaBarNext) * (value / scale + length * eps[i]));
    x = (yield after) ?? after;
  }
}

/** DPM-Solver++(2M): Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (2022),
 * algorithm 2. x_0 is extrapolated, linearly in lambda = -log(sigma), to the middle of the step; the first step, one that ends
 * without noise, and one whose latents were replaced take it as constant. */
export async function* dpmpp2m(predictEps, x, steps) {
  let before = null; // the last step's {x0, h}
  for (const { alphaBar, alphaBarNext } of steps) {
    const x0 = x0FromEps(x, await predictEps(x, alphaBar), alphaBar);
    const decay = sigmaOf(alphaBarNext) / sigmaOf(alphaBar), h = -Math.log(decay); // exp(-h) is the ratio of the sigmas
    let middle = x0;
    if (before && alphaBarNext < 1) {
      const { x0: last, h: hLast } = before, share = h / (2 * hLast);
      middle = x0.map((value, i) => value + (value - last[i]) * share);
    }
    const kept = Math.sqrt((1 - alphaBarNext) / (1 - alphaBar)), gain = Math.sqrt(alphaBarNext) * (1 - decay);
    const after = x.map((value, i) => kept * value + gain * middle[i]);
    const painted = yield after;
    before = painted ? null : { x0, h };
    x = painted ?? after;
  }
}
