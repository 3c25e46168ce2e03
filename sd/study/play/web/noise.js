// The noise of a seed, as PyTorch's generator for the CPU draws it: `torch.randn` of at least 16 numbers.

const N = 624, M = 397;

/** Mersenne Twister: Matsumoto & Nishimura (1998). Returns a function that gives the next 32 bits. */
export function mersenneTwister(seed) {
  const state = new Uint32Array(N);
  state[0] = Number(BigInt.asUintN(32, BigInt(seed))); // PyTorch takes the lower half of a seed
  for (let i = 1; i < N; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let next = N;
  return () => {
    if (next === N) {
      for (let i = 0; i < N; i++) {
        const bits = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
        state[i] = state[(i + M) % N] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** A source of standard normal numbers: (count, at least 16) -> Float32Array. Box & Muller (1958), 16 numbers at a time. */
export function noiseSource(seed) {
  const bits = mersenneTwister(seed);
  const uniform = () => (bits() & 0xffffff) / 2 ** 24;

  function normal16(values, at) {
    for (let i = at; i < at + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - values[i])), angle = 2 * Math.PI * values[i + 8];
      values[i] = radius * Math.cos(angle);
      values[i + 8] = radius * Math.sin(angle);
    }
  }

  return (count) => {
    if (count < 16) throw new Error(`At least 16 numbers are drawn at a time, not ${count}.`);
    const values = Float32Array.from({ length: count }, uniform);
    for (let at = 0; at + 16 <= count; at += 16) normal16(values, at);
    if (count % 16) { // the last 16 numbers are drawn anew
      for (let i = count - 16; i < count; i++) values[i] = uniform();
      normal16(values, count - 16);
    }
    return values;
  };
}
