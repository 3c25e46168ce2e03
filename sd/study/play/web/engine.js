// The pipeline, as in sd/pipeline/latent_diffusion.py: from a prompt to latents and pictures. It knows neither the browser nor how
// the networks are run; `networks` has the calls that networks.js describes.

import { emptyRow, rowsOf, stripOf } from "./prompt.js";
import { noiseSource } from "./noise.js";
import { SAMPLERS } from "./samplers.js";
import { addNoise, alphaBarAt, alphasCumprod, epsFromV, samplingSteps, sigmaOf, timestepAt, x0FromEps } from "./schedule.js";

const KEPT = 64; // encoded rows of tokens

/** How many of the steps run at this strength, the last ones. */
export const stepsRun = (steps, strength) => Math.floor(steps * strength + 1e-9);

/** The mask of the latents: each is repainted as much as the most repainted of its pixels. Uint8Array -> Float32Array in [0, 1]. */
export function latentMask(mask, size, factor) {
  const side = size / factor, cells = new Float32Array(side * side);
  mask.forEach((level, i) => {
    const cell = Math.floor(Math.floor(i / size) / factor) * side + Math.floor((i % size) / factor);
    cells[cell] = Math.max(cells[cell], Math.fround(level / 255));
  });
  return cells;
}

/** The new picture where the mask is 255, the old one, exactly, where it is 0. */
export function composite(picture, made, mask) {
  const data = new Uint8ClampedArray(picture.data);
  mask.forEach((level, i) => {
    for (let c = 4 * i; c < 4 * i + 3; c++) data[c] = Math.round((level * made.data[c] + (255 - level) * picture.data[c]) / 255);
  });
  return { ...picture, data };
}

/** Multiply each token's vector by its weight, then rescale all of them to the mean they had before. */
function weighted(vectors, weights) {
  const width = vectors.length / weights.length, scaled = vectors.map((value, i) => value * weights[Math.floor(i / width)]);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const back = mean(vectors) / mean(scaled);
  return scaled.map((value) => value * back);
}

/** Between two contexts: along a straight line, or each token's vector along an arc. */
function mixed(first, second, share, how, width) {
  if (how !== "slerp") return first.map((value, i) => (1 - share) * value + share * second[i]);
  const result = new Float32Array(first.length);
  for (let at = 0; at < first.length; at += width) {
    let [dot, p, q] = [0, 0, 0];
    for (let i = at; i < at + width; i++) [dot, p, q] = [dot + first[i] * second[i], p + first[i] ** 2, q + second[i] ** 2];
    const angle = Math.acos(Math.min(1, Math.max(-1, dot / Math.sqrt(p * q)))), sine = Math.sin(angle);
    const [a, b] = sine < 1e-6 ? [1 - share, share] : [Math.sin((1 - share) * angle) / sine, Math.sin(share * angle) / sine];
    for (let i = at; i < at + width; i++) result[i] = a * first[i] + b * second[i];
  }
  return result;
}

export class Engine {
  constructor({ networks, tokenizer, config }) {
    Object.assign(this, { networks, tokenizer, config });
    this.table = alphasCumprod(config.schedule);
    this.side = config.size / config.factor;
    this.count = config.channels * this.side ** 2;
    this.encoded = new Map(); // ids of a row -> its vectors
  }

  tokens(prompt) { return stripOf(prompt, this.tokenizer); }

  schedule({ sampler, steps }) {
    const plan = samplingSteps(this.table, steps, this.samplerOf(sampler)), [{ timestep }] = plan;
    if (steps <= 10 || timestep >= 0.9 * this.table.length) return plan;
    throw new Error(`${steps} steps of ${sampler} would begin at timestep ${timestep}, too far from pure noise. Take a number that divides 1000.`);
  }

  noise(seed) { return noiseSource(seed)(this.count); }

  samplerOf(name) {
    if (Object.hasOwn(SAMPLERS, name)) return SAMPLERS[name];
    throw new Error(`There is no sampler “${name}” here; there are ${Object.keys(SAMPLERS).join(", ")}.`);
  }

  // Pictures and latents

  /** Picture -> scaled latents: the mean of the VAE's posterior. */
  async encode(picture) {
    const { size, latentScale } = this.config;
    if (picture.width !== size || picture.height !== size) throw new Error(`A picture here is ${size} by ${size} pixels.`);
    const image = new Float32Array(3 * size * size);
    for (let i = 0; i < size * size; i++) {
      for (let c = 0; c < 3; c++) image[c * size * size + i] = picture.data[4 * i + c] / 127.5 - 1;
    }
    return (await this.networks.encodeImage(image, size)).map((value) => value * latentScale);
  }

  /** Scaled latents -> picture. quick: by the tiny VAE, nearly the same in a small part of the time. */
  async decode(latents, { quick = false } = {}) {
    const { size, latentScale } = this.config;
    const image = await (quick ? this.networks.decodeQuick(latents, this.side)
      : this.networks.decode(latents.map((value) => value / latentScale), this.side));
    const data = new Uint8ClampedArray(4 * size * size).fill(255);
    for (let i = 0; i < size * size; i++) { // the array rounds and clamps
      for (let c = 0; c < 3; c++) data[4 * i + c] = (image[c * size * size + i] + 1) * 127.5;
    }
    return { width: size, height: size, data };
  }

  // Text

  async encodeRow(row) {
    const key = row.ids.join();
    let vectors = this.encoded.get(key);
    if (!vectors) {
      if (this.encoded.size >= KEPT) this.encoded.delete(this.encoded.keys().next().value);
      this.encoded.set(key, vectors = await this.networks.encodeText(row.ids));
    }
    return row.weights.every((weight) => weight === 1) ? vectors : weighted(vectors, row.weights);
  }

  /** What the UNet attends to: {contexts: [negative, positive] or [positive], tokens, columns}. */
  async contexts({ prompt, negative = "", mix, guidance }) {
    const texts = [prompt, ...(mix ? [mix.prompt] : []), ...(guidance === 1 ? [] : [negative])];
    const rows = texts.map((text) => rowsOf(text, this.tokenizer)), most = Math.max(...rows.map((each) => each.length));
    const contexts = [];
    for (const each of rows) {
      while (each.length < most) each.push(emptyRow(this.tokenizer));
      const parts = [];
      for (const row of each) parts.push(await this.encodeRow(row));
      const context = new Float32Array(most * parts[0].length);
      parts.forEach((part, i) => context.set(part, i * part.length));
      contexts.push(context);
    }
    let positive = contexts.shift();
    const tokens = most * this.tokenizer.contextLength;
    if (mix) positive = mixed(positive, contexts.shift(), mix.share, mix.how, positive.length / tokens);
    const { contextLength } = this.tokenizer;
    const columns = rows[0].flatMap((row, r) => Array.from({ length: row.length }, (_, i) => r * contextLength + 1 + i));
    return { contexts: [...contexts, positive], tokens, columns };
  }

  // Predictions

  /** The noise in x, guided, and the attention maps: Ho & Salimans (2022), eq. 6 with guidance = 1 + w. */
  async eps(text, guidance, x, alphaBar) {
    const { contexts, tokens, columns } = text, batch = contexts.length;
    const given = new Float32Array(batch * this.count), context = new Float32Array(batch * contexts[0].length);
    contexts.forEach((each, i) => { given.set(x, i * this.count); context.set(each, i * each.length); });
    const timestep = timestepAt(this.table, alphaBar);
    const { prediction, maps } = await this.networks.predict({ x: given, batch, side: this.side, timestep, context, tokens });
    let output = prediction;
    if (batch > 1) {
      const [without, withPrompt] = [prediction.subarray(0, this.count), prediction.subarray(this.count)];
      output = without.map((value, i) => value + guidance * (withPrompt[i] - value));
    }
    const eps = this.config.prediction === "v" ? epsFromV(output, x, alphaBar) : output;
    return { eps, attention: this.attentionOf(maps, columns) };
  }

  /** Maps of all tokens -> one for each token of the prompt, and one for all else. */
  attentionOf(maps, columns) {
    const area = this.side ** 2, found = new Float32Array((columns.length + 1) * area);
    const rest = found.subarray(columns.length * area).fill(1);
    columns.forEach((column, k) => {
      const map = maps.subarray(column * area, (column + 1) * area);
      found.set(map, k * area);
      for (let i = 0; i < area; i++) rest[i] -= map[i];
    });
    return { side: this.side, count: columns.length, maps: found };
  }

  /** x_t of a picture or clean latents, with the noise of a seed. */
  async noisy({ latents, picture, seed, timestep }) {
    const alphaBar = alphaBarAt(this.table, Math.min(Math.max(timestep, 0), this.table.length - 1));
    const x0 = latents ?? (await this.encode(picture));
    return { latents: addNoise(x0, this.noise(seed), alphaBar), alphaBar, sigma: sigmaOf(alphaBar) };
  }

  /** One prediction at any noise level. */
  async predict({ latents, timestep, guidance = this.config.guidance, ...request }) {
    const began = performance.now();
    const alphaBar = alphaBarAt(this.table, Math.min(Math.max(timestep, 0), this.table.length - 1));
    const text = await this.contexts({ ...request, guidance }), { eps, attention } = await this.eps(text, guidance, latents, alphaBar);
    const x0 = x0FromEps(latents, eps, alphaBar);
    const [preview, noisy] = [await this.decode(x0, { quick: true }), await this.decode(latents, { quick: true })];
    return { timestep, alphaBar, sigma: sigmaOf(alphaBar), eps, x0, preview, noisy, attention, ms: performance.now() - began };
  }

  /** `noisy`, then `predict`. */
  async at({ latents, picture, seed, timestep, ...request }) {
    const { latents: xT } = await this.noisy({ latents, picture, seed, timestep });
    return { latents: xT, ...(await this.predict({ ...request, latents: xT, timestep })) };
  }

  /** A run, as a generator: yields a record after every step, and returns {picture, latents, steps, ms}.
   *
   * settings  prompt, negative, mix, seed, guidance, steps, sampler; from {step, latents}; init {picture} or {latents}, strength, mask
   * before    called with {step, steps, timestep, sigma, latents} before each step, and awaited; it may return other latents
   */
  async *run(settings, before = () => {}) {
    const { guidance = this.config.guidance, steps: count = 30, sampler = "dpmpp_2m", strength = 0.75, seed, from, init, mask, ...request } = settings;
    const began = performance.now(), plan = this.schedule({ sampler, steps: count });
    let first = from?.step ?? (init ? plan.length - stepsRun(plan.length, strength) : 0);
    if (!(first >= 0 && first <= plan.length)) throw new Error(`Step ${first} is not one of the ${plan.length} steps.`);
    if (mask && !init) throw new Error("A mask needs a picture: give it as init.");
    if (first && !init && !from?.latents) throw new Error(`A run that begins before step ${first} needs latents.`);
    const clean = init && (init.latents ?? (await this.encode(init.picture)));
    const kept = mask && latentMask(mask, this.config.size, this.config.factor);
    let x = from?.latents;
    if (!x && first === plan.length) x = clean; // at strength 0
    if (!x) x = first ? addNoise(clean, this.noise(seed), plan[first].alphaBar) : this.noise(seed);
    if (x.length !== this.count) throw new Error(`Latents here are ${this.count} numbers, not ${x.length}.`);
    const text = await this.contexts({ ...request, guidance });
    let last;
    const predictEps = async (xT, alphaBar) => {
      let { eps, attention } = await this.eps(text, guidance, xT, alphaBar);
      if (mask) { // the kept part is led back to the init latents, see `keep_unmasked` in sd/sampling/init_image.py
        const signal = Math.sqrt(alphaBar), spread = Math.sqrt(1 - alphaBar), area = this.side ** 2;
        eps = eps.map((value, i) => kept[i % area] * value + (1 - kept[i % area]) * (xT[i] - signal * clean[i]) / spread);
      }
      last = { xT, eps, attention, x0: x0FromEps(xT, eps, alphaBar) };
      return eps;
    };
    let generator = null;
    for (let step = first; step < plan.length; step++) {
      const { timestep, alphaBar, sigma, sigmaNext } = plan[step];
      let painted = await before({ step, steps: plan.length, timestep, sigma, latents: x });
      const start = performance.now();
      if (!generator) {
        generator = SAMPLERS[sampler].run(predictEps, painted ?? x, plan.slice(first));
        painted = undefined;
      }
      ({ value: x } = await generator.next(painted));
      if (!x.every(Number.isFinite)) throw new Error("The UNet gave NaN or infinite values, from which no picture can be made.");
      const { xT, eps, x0, attention } = last;
      const preview = await this.decode(x0, { quick: true });
      const noisy = step === first ? await this.decode(xT, { quick: true }) : null; // the later ones are left to whoever shows them
      const levels = { step, steps: plan.length, timestep, alphaBar, sigma, sigmaNext }, ms = performance.now() - start;
      yield { ...levels, latents: xT, next: x, eps, x0, preview, noisy, attention, ms };
    }
    let picture = await this.decode(x);
    if (mask && init.picture) picture = composite(init.picture, picture, mask);
    return { picture, latents: x, steps: plan.length - first, ms: performance.now() - began };
  }
}
