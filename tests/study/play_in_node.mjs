// Runs the modules of `sd play` outside of a browser: JSON on standard input -> JSON on standard output.
import { readFileSync } from "node:fs";
import { argv } from "node:process";

const [folder, merges] = argv.slice(2);
const load = (name) => import(`${folder}/${name}.js`);
async function makeTokenizer() {
  const { Tokenizer } = await load("tokenizer");
  return new Tokenizer(Uint8Array.from(readFileSync(merges)).buffer);
}
const given = JSON.parse(readFileSync(0, "utf8"));

const ROOMS = {
  async tokens({ texts }) {
    const tokenizer = await makeTokenizer();
    return texts.map((text) => { const ids = tokenizer.encode(text); return { ids, texts: tokenizer.texts(ids) }; });
  },
  async rows({ texts }) {
    const tokenizer = await makeTokenizer(), { rowsOf, stripOf } = await load("prompt");
    return texts.map((text) => {
      try {
        return { rows: rowsOf(text, tokenizer), strip: stripOf(text, tokenizer) };
      } catch (error) {
        return { error: error.message };
      }
    });
  },
  async noise({ seeds, counts }) {
    const { noiseSource } = await load("noise");
    return seeds.map((seed) => { const draw = noiseSource(seed); return counts.map((count) => [...draw(count)]); });
  },
  async steps({ schedule, cases }) {
    const { alphasCumprod, alphaBarAt, samplingSteps } = await load("schedule"), { SAMPLERS } = await load("samplers");
    const table = alphasCumprod(schedule);
    return {
      table: [...table],
      between: [0, 0.25, 499.5, 998.75, 999].map((timestep) => alphaBarAt(table, timestep)),
      steps: cases.map(([sampler, count]) => samplingSteps(table, count, SAMPLERS[sampler])),
    };
  },
  async samples({ schedule, cases, x, target }) {
    const { alphasCumprod, samplingSteps } = await load("schedule"), { SAMPLERS } = await load("samplers");
    const table = alphasCumprod(schedule);
    // as `made_up_denoiser` in the test
    const predictEps = (x, alphaBar) => x.map((value, i) => Math.sin(value) * Math.sqrt(1 - alphaBar) + 0.3 * target[i] * Math.sqrt(alphaBar));
    const all = [];
    for (const [name, count] of cases) {
      const found = [];
      const steps = samplingSteps(table, count, SAMPLERS[name]);
      for await (const latents of SAMPLERS[name].run(predictEps, Float32Array.from(x), steps)) found.push([...latents]);
      all.push(found);
    }
    return all;
  },
  async engine({ schedule }) {
    const { Engine } = await load("engine"), tokenizer = await makeTokenizer();
    const batches = [];
    const networks = { // made up: each vector is made of its token, and the prediction depends on the whole context
      encodeText: async (ids) => Float32Array.from({ length: ids.length * 2 }, (_, i) => Math.sin(ids[i >> 1] * (1 + (i & 1)))),
      async predict({ x, batch, context, tokens }) {
        batches.push(batch);
        const each = context.length / batch, area = 256;
        const means = Array.from({ length: batch }, (_, b) => context.subarray(b * each, (b + 1) * each).reduce((sum, v, i) => sum + v * Math.cos(i), 0));
        const prediction = x.map((value, i) => Math.tanh(value + means[Math.floor((i * batch) / x.length)]));
        return { prediction, maps: new Float32Array(tokens * area).fill(1 / tokens) };
      },
      decode: async (latents) => new Float32Array(3 * 128 * 128).fill(latents[0]),
      decodeQuick: async (latents) => new Float32Array(3 * 128 * 128).fill(latents[0]),
      encodeImage: async (image) => image.slice(0, 1024),
    };
    const config = { size: 128, factor: 8, channels: 4, latentScale: 0.18215, prediction: "v", guidance: 7.5, schedule };
    const engine = new Engine({ networks, tokenizer, config });
    async function run(request, before) {
      const records = [], generator = engine.run({ prompt: "a red circle", seed: 1, steps: 6, ...request }, before);
      for (;;) {
        const { done, value } = await generator.next();
        if (done) return { ...value, records };
        records.push(value);
      }
    }
    const numbers = ({ latents }) => [...latents];
    const plain = await run({}), other = { prompt: "a blue (star:1.3)" };
    const { attention } = plain.records[0], latents = engine.noise(9);
    const found = {
      plain: numbers(plain),
      other: numbers(await run(other)),
      first: numbers(await run({ mix: { ...other, share: 0 } })),
      second: numbers(await run({ mix: { ...other, share: 1 } })),
      arc: numbers(await run({ mix: { ...other, share: 1, how: "slerp" } })),
      branch: numbers(await run({ sampler: "euler", from: { step: 4, latents: (await run({ sampler: "euler" })).records[3].next } })),
      whole: numbers(await run({ sampler: "euler" })),
      painted: numbers(await run({}, ({ step, latents: now }) => (step === 2 ? now.map((value) => value + 1) : undefined))),
      unchanged: numbers(await run({ init: { latents }, strength: 0 })),
      latents: [...latents],
      batches: [Math.max(...batches)],
      sums: Array.from({ length: 256 }, (_, i) => { let sum = 0; for (let k = 0; k <= attention.count; k++) sum += attention.maps[k * 256 + i]; return sum; }),
    };
    batches.length = 0;
    const mask = new Uint8Array(128 * 128);
    mask.fill(255, 0, 128 * 64); // the upper half
    const kept = await run({ guidance: 1, init: { latents }, strength: 0.5, mask });
    Object.assign(found, { kept: numbers(kept), single: [Math.max(...batches), kept.steps, kept.records[0].step] });
    found.problems = [];
    for (const wrong of [{ mask }, { from: { step: 3 } }, { sampler: "heun" }, { steps: 0 }, { sampler: "ddim", steps: 600 }, { prompt: "(a:11)" }, { from: { step: 0, latents: new Float32Array(3) } }]) {
      found.problems.push(await run(wrong).then(() => "none", (error) => error.message));
    }
    return found;
  },
};

process.stdout.write(JSON.stringify(await ROOMS[given.room](given)));
