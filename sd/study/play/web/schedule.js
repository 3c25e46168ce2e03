// The noise schedule, as in sd/sampling/schedule.py and sd/sampling/spacing.py, in double precision.
//
// alpha_bar is the share of the signal's power in x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al., 2020, eq. 4);
// sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise's standard deviation if the signal is not scaled down.

export const sigmaOf = (alphaBar) => Math.sqrt((1 - alphaBar) / alphaBar);
export const alphaBarOf = (sigma) => 1 / (1 + sigma ** 2);

/** `count` even numbers from first to last; computed from both ends, as PyTorch does. */
export function linspace(first, last, count) {
  const step = (last - first) / (count - 1);
  return Array.from({ length: count }, (_, i) => (count === 1 ? first : i < count / 2 ? first + step * i : last - step * (count - 1 - i)));
}

/** The table of alpha_bar for each timestep, rounded to single precision as in the original. */
export function alphasCumprod({ timesteps, beta_start: betaStart, beta_end: betaEnd }) {
  let product = 1;
  return Float64Array.from(linspace(betaStart ** 0.5, betaEnd ** 0.5, timesteps), (root) => Math.fround((product *= 1 - root ** 2)));
}

/** The timestep of a noise level: linear in log(sigma) between entries of the table, clamped to its ends. */
export function timestepAt(table, alphaBar) {
  const logSigma = Math.log(sigmaOf(alphaBar));
  const logAt = (timestep) => Math.log(sigmaOf(table[timestep]));
  let low = 0, high = table.length; // the first entry that is not below
  while (low < high) {
    const middle = (low + high) >> 1;
    if (logAt(middle) < logSigma) low = middle + 1;
    else high = middle;
  }
  high = Math.min(Math.max(low, 1), table.length - 1);
  const weight = (logSigma - logAt(high - 1)) / (logAt(high) - logAt(high - 1));
  return Math.fround(high - 1 + Math.min(Math.max(weight, 0), 1));
}

/** The inverse of `timestepAt`. */
export function alphaBarAt(table, timestep) {
  const low = Math.floor(timestep), weight = timestep - low;
  if (weight === 0) return table[low];
  const [first, second] = [low, low + 1].map((t) => Math.log(sigmaOf(table[Math.min(t, table.length - 1)])));
  return alphaBarOf(Math.exp(first + weight * (second - first)));
}

const roundHalfToEven = (value) => (Math.abs(value % 1) === 0.5 ? 2 * Math.round(value / 2) : Math.round(value));

const TIMESTEPS = {
  /** The original's DDIM spacing: 1, 1 + c, 1 + 2c, … with c = total // steps. */
  leading(total, steps) {
    const stride = Math.floor(total / steps), offset = Math.min(1, total - 1 - stride * (steps - 1));
    return Array.from({ length: steps }, (_, i) => (steps - 1 - i) * stride + offset);
  },
  /** Even steps that include both ends: Lin et al. (2023), table 2. */
  linspace: (total, steps) => linspace(total - 1, 0, steps).map(roundHalfToEven),
};

/** Even in sigma ** (1 / 7): Karras et al. (2022), eq. 5. */
function karras(lowest, highest, steps, rho = 7) {
  const [first, last] = [highest ** (1 / rho), lowest ** (1 / rho)];
  return linspace(0, 1, steps).map((share) => (share < 0.5 ? first + share * (last - first) : last - (last - first) * (1 - share)) ** rho);
}

/** The steps from noise to picture: [{timestep, alphaBar, sigma, alphaBarNext, sigmaNext}]. */
export function samplingSteps(table, count, { schedule, finalAlpha }) {
  if (!(Number.isInteger(count) && count >= 1 && count <= table.length)) throw new Error(`Steps are 1 to ${table.length}, not ${count}.`);
  let levels;
  if (schedule === "karras") levels = karras(sigmaOf(table[0]), sigmaOf(table.at(-1)), count).map(alphaBarOf);
  else levels = TIMESTEPS[schedule](table.length, count).map((timestep) => alphaBarAt(table, timestep));
  const ends = [...levels.slice(1), finalAlpha === "first" ? table[0] : 1];
  return levels.map((alphaBar, i) => ({
    timestep: timestepAt(table, alphaBar), alphaBar, sigma: sigmaOf(alphaBar), alphaBarNext: ends[i], sigmaNext: sigmaOf(ends[i]),
  }));
}

/** x_t from x_0. Ho et al. (2020), eq. 4. */
export function addNoise(x0, noise, alphaBar) {
  const [signal, spread] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
  return x0.map((value, i) => signal * value + spread * noise[i]);
}

/** The clean latents x_0 if eps is the noise in x_t: Ho et al. (2020), eq. 4 solved for x_0. */
export function x0FromEps(xT, eps, alphaBar) {
  const [signal, spread] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
  return xT.map((value, i) => (value - spread * eps[i]) / signal);
}

/** The noise, given the velocity v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0: Salimans & Ho (2022), appendix D. */
export function epsFromV(v, xT, alphaBar) {
  const [signal, spread] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
  return v.map((value, i) => signal * value + spread * xT[i]);
}
