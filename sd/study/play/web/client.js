// What the page uses: the engine in its worker, behind promises.
//
//   const engine = await connect({ progress({ part, loaded, total }) {} });
//   const run = engine.start({ prompt, seed, guidance, steps, sampler }, { step(record) {}, paused(coming) {} });
//   const { picture } = await run.finished;

const CALLS = ["tokens", "schedule", "noise", "encode", "decode", "noisy", "predict", "at"];

/** Load the model. Resolves to the engine; rejects with a sentence that says what is missing.
 *
 * progress  called with what is being loaded, and the bytes so far and in all
 * backend   "wasm" or "webgpu"; without it, the GPU where the folder has the runtime for it and the browser has one
 */
export async function connect({ progress = () => {}, backend } = {}) {
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  const waiting = new Map(); // number of a call -> {resolve, reject, events}
  let number = 0, current = null;

  function call(name, args = [], events = {}) {
    const id = ++number;
    const promise = new Promise((resolve, reject) => waiting.set(id, { resolve, reject, events }));
    worker.postMessage({ id, call: name, args });
    return { id, promise };
  }

  worker.onmessage = ({ data: { id, event, value, error } }) => {
    const { resolve, reject, events } = waiting.get(id) ?? {};
    if (!resolve) return;
    if (event) return events[event]?.(value);
    waiting.delete(id);
    if (error === undefined) resolve(value);
    else reject(new Error(error));
  };
  worker.onerror = (event) => {
    const error = new Error(`The engine has stopped: ${event.message || "its worker cannot be loaded"}.`);
    for (const { reject } of waiting.values()) reject(error);
    waiting.clear();
  };

  const model = await call("load", backend ? [backend] : [], { progress }).promise;
  const engine = {
    model,
    /** Begin a run; one that is still going is stopped first. */
    start(request, events = {}) {
      current?.stop();
      const { id, promise } = call("start", [request], events), send = (name, ...args) => worker.postMessage({ id, call: name, args });
      const run = { pause: () => send("pause"), resume: (given) => send("resume", given), stop: () => send("stop"), finished: promise };
      promise.catch(() => {}).then(() => { if (current === run) current = null; });
      return (current = run);
    },
    close() {
      worker.terminate();
      for (const { reject } of waiting.values()) reject(new Error("The engine is closed."));
      waiting.clear();
    },
  };
  for (const name of CALLS) engine[name] = (...args) => call(name, args).promise;
  return engine;
}
