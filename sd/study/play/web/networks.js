// Runs the networks by onnxruntime-web. All values are Float32Array.

/** One session. Calls of all of them wait for each other: the runtime computes one at a time. */
class Network {
  static last = Promise.resolve();

  constructor(ort, session) {
    Object.assign(this, { ort, session });
  }

  run(inputs) {
    const tensors = Object.entries(inputs).map(([name, [type, data, shape]]) => [name, new this.ort.Tensor(type, data, shape)]);
    const done = Network.last.then(() => this.session.run(Object.fromEntries(tensors)));
    Network.last = done.catch(() => {});
    return done;
  }
}

export class Networks {
  /** sessions: {text_encoder, unet, vae_encoder, vae_decoder, tiny_vae_decoder} */
  constructor(ort, sessions, { channels }) {
    this.channels = channels;
    for (const [name, session] of Object.entries(sessions)) this[name] = new Network(ort, session);
  }

  /** ids of a row -> its vectors (tokens, width) */
  async encodeText(ids) {
    const { context } = await this.text_encoder.run({ tokens: ["int64", BigInt64Array.from(ids, BigInt), [1, ids.length]] });
    return context.data;
  }

  /** x (batch, channels, side, side), context (batch, tokens, width) -> prediction as x, maps (tokens, side, side) of the last row */
  async predict({ x, batch, side, timestep, context, tokens }) {
    const { prediction, maps } = await this.unet.run({
      x_t: ["float32", x, [batch, this.channels, side, side]],
      timestep: ["float32", new Float32Array(batch).fill(timestep), [batch]],
      context: ["float32", context, [batch, tokens, context.length / batch / tokens]],
    });
    return { prediction: prediction.data, maps: maps.data };
  }

  /** Unscaled latents (channels, side, side) -> image (3, 8 side, 8 side) in about [-1, 1] */
  async decode(latents, side) {
    return (await this.vae_decoder.run({ latents: ["float32", latents, [1, this.channels, side, side]] })).image.data;
  }

  /** The same for scaled latents, by the tiny VAE. */
  async decodeQuick(latents, side) {
    return (await this.tiny_vae_decoder.run({ latents: ["float32", latents, [1, this.channels, side, side]] })).image.data;
  }

  /** image (3, size, size) in [-1, 1] -> the mean of the unscaled latents */
  async encodeImage(image, size) {
    return (await this.vae_encoder.run({ image: ["float32", image, [1, 3, size, size]] })).mean.data;
  }
}
