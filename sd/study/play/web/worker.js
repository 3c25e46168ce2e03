// The worker: loads the networks, and answers client.js.
//
// Messages: {id, call, args} is answered by {id, value} or {id, error}. A run has the number of its `start`: the worker sends
// {id, event: "step" | "paused", value} for it, and takes {id, call: "pause" | "resume" | "stop"}.

import { Engine } from "./engine.js";
import { Networks } from "./networks.js";
import { SAMPLERS } from "./samplers.js";
import { Tokenizer } from "./tokenizer.js";

const PARTS = { text_encoder: "text encoder", unet: "unet", vae_encoder: "vae", vae_decoder: "vae", tiny_vae_decoder: "vae" };
const MOST_THREADS = 4; // more do not make networks of this size faster
const RUNTIMES = { // backend -> what computes: the one for GPUs is only in folders that were made with --webgpu
  webgpu: { script: "ort.jspi.bundle.min.mjs", binary: "ort-wasm-simd-threaded.jspi.wasm" },
  wasm: { script: "ort.wasm.bundle.min.mjs", binary: "ort-wasm-simd-threaded.wasm" },
};
let engine = null;
const runs = new Map(); // number -> what it waits for

async function load(id, wanted) {
  const config = await (await found("./model.json")).json();
  const backend = wanted ?? (config.files[RUNTIMES.webgpu.binary] && (await hasGPU()) ? "webgpu" : "wasm");
  const { script, binary } = RUNTIMES[backend], names = Object.keys(PARTS);
  const total = [binary, "clip_merges.bin", ...names.map((name) => `${name}.onnx`)].reduce((sum, name) => sum + config.files[name], 0);
  let loaded = 0, told = 0;
  async function file(name, part) {
    const chunks = [], reader = (await found(`./${name}`)).body.getReader();
    let bytes = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      bytes += value.length;
      loaded += value.length;
      if (loaded - told >= total / 200) postMessage({ id, event: "progress", value: { part, loaded: (told = loaded), total } });
    }
    const whole = new Uint8Array(bytes);
    chunks.reduce((at, chunk) => { whole.set(chunk, at); return at + chunk.length; }, 0);
    return whole;
  }
  const [ort, wasm, merges, ...networks] = await Promise.all([
    import(`./${script}`),
    file(binary, "runtime"),
    file("clip_merges.bin", "text encoder"),
    ...names.map((name) => file(`${name}.onnx`, PARTS[name])),
  ]);
  const threads = self.crossOriginIsolated && backend === "wasm" ? Math.min(navigator.hardwareConcurrency || 1, MOST_THREADS) : 1;
  Object.assign(ort.env.wasm, { numThreads: threads, wasmBinary: wasm.buffer, proxy: false });
  ort.env.logLevel = "error";
  const sessions = {};
  for (const [i, name] of names.entries()) {
    const options = { executionProviders: [backend], graphOptimizationLevel: "all", logSeverityLevel: 3 };
    sessions[name] = await ort.InferenceSession.create(networks[i], options);
    networks[i] = null;
  }
  engine = new Engine({ networks: new Networks(ort, sessions, config), tokenizer: new Tokenizer(merges.buffer), config });
  postMessage({ id, event: "progress", value: { part: "ready", loaded: total, total } });
  return {
    name: config.name, size: config.size, latentSide: engine.side, channels: config.channels, timesteps: engine.table.length,
    prediction: config.prediction, alphaBars: engine.table, threads, backend,
    samplers: Object.entries(SAMPLERS).map(([name, { label, schedule }]) => ({ name, label, schedule })),
    defaults: { guidance: config.guidance, steps: 30, sampler: "dpmpp_2m" },
  };
}

/** Whether there is a real GPU that pages may use, and the way in which the runtime waits for it. */
async function hasGPU() {
  if (!navigator.gpu || !WebAssembly.Suspending) return false;
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter;
}

async function found(name) {
  const url = new URL(name, import.meta.url), response = await fetch(url);
  if (!response.ok) throw new Error(`${url.pathname} cannot be loaded (${response.status} ${response.statusText}).`);
  return response;
}

/** Let messages in that came while a network ran. A timer would wait for 4 milliseconds. */
const pass = () => new Promise((resolve) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); resolve(); };
  port2.postMessage(0);
});
const STOPPED = new Error("stopped");

async function start(id, { pauseAt = -1, ...request }) {
  const run = { pauseAt, pausing: false, stopped: false, wake: null, painted: undefined };
  runs.set(id, run);
  let latents = null, steps = 0;
  const began = performance.now();
  const before = async (coming) => {
    await pass();
    latents = coming.latents;
    if (!run.stopped && (run.pausing || coming.step === run.pauseAt)) {
      Object.assign(run, { pausing: false, pauseAt: -1 });
      const woken = new Promise((resolve) => { run.wake = resolve; });
      postMessage({ id, event: "paused", value: coming });
      await woken;
    }
    if (run.stopped) throw STOPPED;
    const { painted } = run;
    run.painted = undefined;
    return painted;
  };
  try {
    const generator = engine.run(request, before);
    for (;;) {
      const { done, value } = await generator.next();
      if (done) return { ...value, stopped: false };
      latents = value.next;
      steps += 1;
      postMessage({ id, event: "step", value });
    }
  } catch (error) {
    if (error === STOPPED) return { picture: null, latents, stopped: true, steps, ms: performance.now() - began };
    throw error;
  } finally {
    runs.delete(id);
  }
}

const STEER = {
  pause(run) { run.pausing = true; },
  resume(run, { latents, pauseAt } = {}) {
    if (latents) run.painted = latents;
    if (pauseAt !== undefined) run.pauseAt = pauseAt;
    run.wake?.();
    run.wake = null;
  },
  stop(run) {
    run.stopped = true;
    run.wake?.();
    run.wake = null;
  },
};
const CALLS = ["tokens", "schedule", "noise", "encode", "decode", "noisy", "predict", "at"];

onmessage = async ({ data: { id, call, args = [] } }) => {
  if (Object.hasOwn(STEER, call)) {
    const run = runs.get(id);
    if (run) STEER[call](run, ...args);
    return;
  }
  try {
    let value;
    if (call === "load") value = await load(id, ...args);
    else if (call === "start") value = await start(id, ...args);
    else if (CALLS.includes(call)) value = await engine[call](...args);
    else throw new Error(`There is no call “${call}”.`);
    postMessage({ id, value });
  } catch (error) {
    postMessage({ id, error: error?.message ?? String(error) });
  }
};
