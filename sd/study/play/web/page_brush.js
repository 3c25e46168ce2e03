// A brush on the picture, by mouse, finger or keys. It works on the 16 × 16 places of the latents.

import {byId} from "./page_state.js";
import {SIDE} from "./page_draw.js";

const canvas = byId("paint");
let tool = null, cell = {x: 8, y: 8}, keyed = false, painting = false, stroke = new Set();

// tool: {label, size(), colour(), shown() -> 256 colours or null, edges?() -> 256 truths, begin(), paint(cells), end(), undo()}
export function useBrush(given) {
  tool = given;
  canvas.hidden = !given;
  if (given) canvas.setAttribute("aria-label", given.label + " Arrow keys move the brush, Space paints, U undoes.");
  drawBrush();
}

function under({x, y}) {  // the places under a round brush
  const size = tool.size(), reach = size / 2, found = [];
  for (let i = 0; i < SIDE * SIDE; i++) {
    const across = i % SIDE - x, down = Math.floor(i / SIDE) - y;
    if (size === 1 ? !across && !down : across ** 2 + down ** 2 <= reach ** 2) found.push(i);
  }
  return found;
}

export function drawBrush() {
  const scale = 8, context = canvas.getContext("2d");
  Object.assign(canvas, {width: SIDE * scale, height: SIDE * scale});
  if (!tool) return;
  const square = i => [i % SIDE * scale, Math.floor(i / SIDE) * scale, scale, scale];
  tool.shown().forEach((colour, i) => {
    if (!colour) return;
    context.fillStyle = colour;
    context.fillRect(...square(i));
  });
  outline(context, tool.edges?.() ?? [], scale);
  if (!keyed && !painting) return;
  context.strokeStyle = "#fff";
  context.shadowColor = "#000";
  context.shadowBlur = 3;
  const size = tool.size(), radius = Math.max(1, size) * scale / 2;
  context.beginPath();
  context.arc((cell.x + .5) * scale, (cell.y + .5) * scale, radius, 0, 7);
  context.stroke();
}

function outline(context, inside, scale) {
  context.fillStyle = "#e0218a";
  for (const [i, within] of inside.entries()) {
    const x = i % SIDE, y = Math.floor(i / SIDE);
    if (!within) continue;
    if (x === 0 || !inside[i - 1]) context.fillRect(x * scale, y * scale, 1, scale);
    if (x === SIDE - 1 || !inside[i + 1]) context.fillRect((x + 1) * scale - 1, y * scale, 1, scale);
    if (y === 0 || !inside[i - SIDE]) context.fillRect(x * scale, y * scale, scale, 1);
    if (y === SIDE - 1 || !inside[i + SIDE]) context.fillRect(x * scale, (y + 1) * scale - 1, scale, 1);
  }
}

function dab() {
  const cells = under(cell).filter(i => !stroke.has(i));
  cells.forEach(i => stroke.add(i));
  if (cells.length) tool.paint(cells);
  drawBrush();
}

function reach(event) {
  const box = canvas.getBoundingClientRect();
  const place = (value, from, length) => Math.min(SIDE - 1, Math.max(0, Math.floor((value - from) / length * SIDE)));
  return {x: place(event.clientX, box.left, box.width), y: place(event.clientY, box.top, box.height)};
}

function start() { painting = true; stroke = new Set(); tool.begin(); dab(); }
function finish() { if (!painting) return; painting = false; tool.end(); drawBrush(); }

canvas.addEventListener("pointerdown", event => {
  if (!tool || event.button) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  keyed = false;
  cell = reach(event);
  start();
});
canvas.addEventListener("pointermove", event => {
  if (!painting) return;
  const target = reach(event), from = cell, length = Math.max(Math.abs(target.x - from.x), Math.abs(target.y - from.y));
  for (let i = 1; i <= length; i++) {  // no gaps in a quick stroke
    cell = {x: Math.round(from.x + (target.x - from.x) * i / length), y: Math.round(from.y + (target.y - from.y) * i / length)};
    dab();
  }
});
for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, finish);
canvas.addEventListener("keydown", event => {
  if (!tool || event.ctrlKey || event.altKey || event.metaKey) return;
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (way) cell = {x: Math.min(SIDE - 1, Math.max(0, cell.x + way[0])), y: Math.min(SIDE - 1, Math.max(0, cell.y + way[1]))};
  else if (event.key === " ") { start(); finish(); }
  else if (event.key.toLowerCase() === "u") tool.undo();
  else return;
  event.preventDefault();
  keyed = true;
  drawBrush();
});
canvas.addEventListener("focus", () => { keyed = canvas.matches(":focus-visible"); if (tool) drawBrush(); });
canvas.addEventListener("blur", () => { keyed = false; if (tool) drawBrush(); });
