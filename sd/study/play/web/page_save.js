// The picture as a PNG that carries its settings, in the form that other tools read and `sd show` understands.

import {app, last} from "./page_state.js";
import {edits} from "./page_run.js";

const TABLE = Uint32Array.from({length: 256}, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});
const crc = bytes => ~bytes.reduce((sum, byte) => TABLE[(sum ^ byte) & 255] ^ (sum >>> 8), -1) >>> 0;

// PNG (third edition), 11.3.3.4: keyword, no compression, no language, the text in UTF-8.
function textChunk(keyword, text) {
  const encode = value => new TextEncoder().encode(value);
  const body = new Uint8Array([...encode("iTXt" + keyword), 0, 0, 0, 0, 0, ...encode(text)]), chunk = new Uint8Array(body.length + 8), view = new DataView(chunk.buffer);
  view.setUint32(0, body.length - 4);
  chunk.set(body, 4);
  view.setUint32(4 + body.length, crc(body));
  return chunk;
}

const quoted = text => /[,:\n"]/.test(text) ? JSON.stringify(text) : text;

export function parameters(settings = app.settings, about = edits()) {
  const {name, samplers, size} = app.engine.model, sampler = samplers.find(one => one.name === settings.sampler);
  const schedule = sampler.schedule[0].toUpperCase() + sampler.schedule.slice(1);
  const facts = {Steps: settings.steps, Sampler: sampler.label, "Schedule type": {leading: "DDIM", linspace: "Uniform"}[sampler.schedule] ?? schedule, "CFG scale": settings.guidance, Seed: settings.seed, Size: size + "x" + size, Model: name};
  const done = [settings.mix > 0 && settings.prompt2.trim() && `mixed with ${settings.prompt2} (${settings.mix})`, about.branched && "drawn on from a step", about.painted && "painted latents", about.repainted && "repainted: " + about.repainted].filter(Boolean);
  if (done.length) facts["Edited in sd play"] = done.join("; ");
  facts.Version = document.querySelector("meta[name=generator]").content;
  return [settings.prompt, settings.negative.trim() && "Negative prompt: " + settings.negative, Object.entries(facts).map(([key, value]) => key + ": " + quoted(String(value))).join(", ")].filter(Boolean).join("\n");
}

export async function png(picture = last().picture) {
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  canvas.getContext("2d").putImageData(new ImageData(picture.data, picture.width, picture.height), 0, 0);
  const bytes = new Uint8Array(await (await canvas.convertToBlob({type: "image/png"})).arrayBuffer()), header = 8 + 25;  // the signature and IHDR
  return new Blob([bytes.slice(0, header), textChunk("parameters", parameters()), bytes.slice(header)], {type: "image/png"});
}

export async function save() {
  const url = URL.createObjectURL(await png()), link = document.createElement("a");
  link.href = url;
  link.download = "sd-play-" + app.settings.seed + ".png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
