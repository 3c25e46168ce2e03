// Numbers as pixels: pictures, latents in grey, heat maps.

export const SIDE = 16, CELLS = SIDE * SIDE;

export function drawPicture(canvas, picture) {
  if (canvas.width !== picture.width || canvas.height !== picture.height) Object.assign(canvas, {width: picture.width, height: picture.height});
  canvas.getContext("2d").putImageData(new ImageData(picture.data, picture.width, picture.height), 0, 0);
}

export function clear(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

// The four channels, two beside two, in grey: -reach is black, reach is white.
export function drawLatents(canvas, latents, reach = 2.5) {
  const gap = 2, side = 2 * SIDE + gap, image = new ImageData(side, side);
  for (let channel = 0; channel < 4; channel++) {
    const left = (channel % 2) * (SIDE + gap), top = Math.floor(channel / 2) * (SIDE + gap);
    for (let i = 0; i < CELLS; i++) {
      const grey = 127.5 * (1 + latents[channel * CELLS + i] / reach);
      image.data.set([grey, grey, grey, 255], 4 * ((top + Math.floor(i / SIDE)) * side + left + i % SIDE));
    }
  }
  Object.assign(canvas, {width: side, height: side});
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export function drawChannel(canvas, latents, channel, reach = 2.5) {
  const image = new ImageData(SIDE, SIDE);
  for (let i = 0; i < CELLS; i++) {
    const grey = 127.5 * (1 + latents[channel * CELLS + i] / reach);
    image.data.set([grey, grey, grey, 255], 4 * i);
  }
  Object.assign(canvas, {width: SIDE, height: SIDE});
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const STOPS = [[13, 8, 60, .7], [200, 60, 90, .6], [255, 220, 80, .6]];
const colour = value => {
  const place = Math.min(1.9999, 2 * value), low = Math.floor(place), part = place - low;
  return STOPS[low].map((from, i) => from + part * (STOPS[low + 1][i] - from));
};

// A map from its least to its most, over whatever lies under the canvas.
export function drawHeat(canvas, map) {
  const side = Math.round(Math.sqrt(map.length)), least = Math.min(...map), most = Math.max(...map), image = new ImageData(side, side);
  map.forEach((value, i) => {
    const [red, green, blue, alpha] = colour(most > least ? (value - least) / (most - least) : 0);
    image.data.set([red, green, blue, 255 * alpha], 4 * i);
  });
  Object.assign(canvas, {width: side, height: side});
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The sum of the maps of some tokens; `tokens` null stands for all else: start, end and padding.
export function mapOf(attention, tokens) {
  const size = attention.side ** 2, sum = new Float32Array(size);
  for (const token of tokens ?? [attention.count]) {
    for (let i = 0; i < size; i++) sum[i] += attention.maps[token * size + i];
  }
  return sum;
}

export const share = map => map.reduce((a, b) => a + b, 0) / map.length;

export function blockMask(cells, size = 128) {  // 16 × 16 true or false -> size × size bytes
  const mask = new Uint8Array(size * size), factor = size / SIDE;
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) mask[y * size + x] = cells[Math.floor(y / factor) * SIDE + Math.floor(x / factor)] ? 255 : 0;
  }
  return mask;
}
