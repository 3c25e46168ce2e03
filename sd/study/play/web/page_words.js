// The words of the prompt: each with its tokens, and the heat map of where in the picture it is read.

import {app, byId, later, listen, make, now, number, problem} from "./page_state.js";
import {clear, drawHeat, drawPicture, mapOf, share} from "./page_draw.js";

const strip = byId("strip");
let read = {tokens: [], words: []}, chosen = null, pointed = null;  // indices of words; words.length stands for the rest

const attention = () => (app.guess ?? now())?.attention ?? null;
const tokensOf = index => index < read.words.length ? read.words[index].tokens : null;
const textOf = index => index < read.words.length ? read.words[index].text.trim() : "all other tokens";

function button(index, label) {
  const element = make("button", {type: "button", className: "word"}, strip);
  element.setAttribute("aria-pressed", String(index === chosen));
  const over = make("span", {className: "over"}, element);
  make("canvas", {width: 128, height: 128, className: "under"}, over);
  make("canvas", {width: 16, height: 16}, over);
  make("b", {textContent: label}, element);
  const tokens = tokensOf(index);
  const ids = tokens ? tokens.map(token => read.tokens[token].id).join(" ") : "start, end, padding";
  const weight = tokens && read.words[index].weight !== 1 ? " ×" + number(read.words[index].weight) : "";
  make("small", {textContent: ids + weight}, element);
  const point = value => { pointed = value; showHeat(); };
  element.addEventListener("pointerenter", event => { if (event.pointerType === "mouse") point(index); });
  element.addEventListener("pointerleave", () => point(null));
  element.addEventListener("focus", () => { if (element.matches(":focus-visible")) point(index); });
  element.addEventListener("blur", () => point(null));
  element.addEventListener("click", () => { chosen = chosen === index ? null : index; pointed = null; showAll(); });
}

// A slip of the keyboard while typing may leave a bracket open: the strip stays as it was, and the sentence says why.
export async function readWords() {
  const text = app.settings.prompt;
  const found = await app.engine.tokens(text);
  if (text !== app.settings.prompt) return;
  read = found;
  if (chosen !== null && chosen > read.words.length) chosen = null;
  strip.replaceChildren();
  read.words.forEach((word, index) => button(index, word.text.trim() || "…"));
  button(read.words.length, "the rest");
  byId("token-count").textContent = read.tokens.length + (read.tokens.length === 1 ? " token" : " tokens") + " in " + 77 * read.chunks + " places";
  byId("thumb-tokens").replaceChildren(...read.tokens.slice(0, 12).map(token => make("i", {textContent: token.text.trim() || "…"})));
  byId("all-tokens").textContent = read.tokens.map(token => token.text.trim() + " " + token.id).join(" · ");
  showAll();
}

export function choose(text) {  // for tasks
  const index = read.words.findIndex(word => word.text.trim() === text);
  chosen = index < 0 ? null : index;
  showAll();
}

function showHeat() {
  const index = pointed ?? chosen, maps = attention();
  const shows = index !== null && maps !== null && (tokensOf(index) ?? []).every(token => token < maps.count) && app.settings.tool !== "repaint" && app.settings.tool !== "latents";
  byId("frame").classList.toggle("read", shows);
  byId("heat").hidden = !shows;
  const note = byId("heat-note");
  if (!shows) {
    note.textContent = index !== null && maps === null && !app.guess ? "The heat map needs a step: this is pure noise." : "";
    return;
  }
  const map = mapOf(maps, tokensOf(index));
  drawHeat(byId("heat"), map);
  note.textContent = "“" + textOf(index) + "” gets " + number(100 * share(map), 2) + " % of the attention at this step.";
}

export function showAll() {
  const maps = attention(), picture = (app.guess ?? now())?.picture;
  [...strip.children].forEach((element, index) => {
    element.setAttribute("aria-pressed", String(index === chosen));
    const [under, over] = element.querySelectorAll("canvas"), tokens = tokensOf(index);
    if (maps === null || !picture || (tokens ?? []).some(token => token >= maps.count)) { clear(under); clear(over); return; }
    drawPicture(under, picture);
    drawHeat(over, mapOf(maps, tokens));
  });
  showHeat();
}

const soon = later(0, () => readWords().catch(problem));
listen("settings", names => { if (names.includes("prompt")) soon(); if (names.includes("tool")) showHeat(); });
listen("shown", showAll);
