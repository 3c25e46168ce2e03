// Runs the modules of `sd play` outside of a browser: JSON on standard input -> JSON on standard output.
import { readFileSync } from "node:fs";
import { argv } from "node:process";

const [folder, merges] = argv.slice(2);
const load = (name) => import(`${folder}/${name}.js`);
const given = JSON.parse(readFileSync(0, "utf8"));

const ROOMS = {
  async tokens({ texts }) {
    const { Tokenizer } = await load("tokenizer");
    const table = readFileSync(merges), tokenizer = new Tokenizer(table.buffer.slice(table.byteOffset, table.byteOffset + table.length));
    return texts.map((text) => { const ids = tokenizer.encode(text); return { ids, texts: tokenizer.texts(ids) }; });
  },
  async rows({ texts }) {
    const { Tokenizer } = await load("tokenizer"), { rowsOf, stripOf } = await load("prompt");
    const table = readFileSync(merges), tokenizer = new Tokenizer(table.buffer.slice(table.byteOffset, table.byteOffset + table.length));
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
};

process.stdout.write(JSON.stringify(await ROOMS[given.room](given)));
