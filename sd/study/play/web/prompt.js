// How a prompt is read, as in sd/text/prompt_syntax.py and sd/text/chunks.py: weights, BREAK, and rows of 77 tokens.
//
//   (a) (a:1.3) [a]    weight a by 1.1, by 1.3, by 1/1.1; brackets nest
//   BREAK              the rest begins a new row
//   \( \) \[ \]        the character itself
//
// Words that change from step to step, [a:b:0.5], are not read here: the brackets weaken what is in them.

import { END, START } from "./tokenizer.js";

const STRONGER = 1.1, WEAKER = 1 / 1.1, LARGEST_WEIGHT = 10;
const COMMA = 267; // the token of "," as a word of its own
const LOOK_BACK = 20; // tokens: a full row may end this much early to end after a comma
const OPENING = { ")": "(", "]": "[" };
const MARK = /\\(?<escaped>[()[\]:|\\])|:\s*(?<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+|nan|inf))\s*\)|(?<bracket>[()[\]])|[^\\()[\]:]+|[\\:]/gu;

/** Split a text at every BREAK into sections, and each section into pieces {text, weight}. Throws for a weight out of range. */
export function readWeights(text) {
  const marks = [...text.matchAll(MARK)], brackets = findBrackets(marks);
  const products = { "(": [1], "[": [1] }; // for each kind of bracket: the product of the factors of those open
  const sections = [[]];
  marks.forEach((mark, i) => {
    const bracket = brackets.get(i);
    if (bracket) {
      const of = products[bracket.kind];
      if (bracket.factor === null) of.pop();
      else of.push(of.at(-1) * bracket.factor);
      return;
    }
    const weight = products["("].at(-1) * products["["].at(-1);
    const [first, ...others] = mark.groups.escaped ? [mark.groups.escaped] : mark[0].split(/(?<![\p{L}\p{N}_])BREAK(?![\p{L}\p{N}_])/u);
    addPiece(sections.at(-1), first, weight);
    for (const part of others) {
      sections.push([]);
      addPiece(sections.at(-1), part, weight);
    }
  });
  return sections;
}

/** Which brackets change weights: index of the mark -> {kind, factor}; factor null for a closing one. */
function findBrackets(marks) {
  const found = new Map(), opened = { "(": [], "[": [] };
  marks.forEach(({ groups: { weight, bracket } }, i) => {
    const kind = weight !== undefined ? "(" : OPENING[bracket];
    if (bracket === "(" || bracket === "[") {
      opened[bracket].push(i);
      found.set(i, { kind: bracket, factor: bracket === "(" ? STRONGER : WEAKER });
    } else if (kind && opened[kind].length) {
      const opening = opened[kind].pop();
      if (weight !== undefined) found.set(opening, { kind, factor: Number(weight.replace("inf", "Infinity")) });
      found.set(i, { kind, factor: null });
    }
  });
  return found;
}

function addPiece(section, text, weight) {
  if (!text) return;
  if (!(Math.abs(weight) <= LARGEST_WEIGHT)) {
    throw new Error(`“${text.trim().slice(0, 40)}” has the weight ${weight}; weights are −${LARGEST_WEIGHT} to ${LARGEST_WEIGHT}. `
      + "Write \\( and \\) for brackets in the text itself.");
  }
  const last = section.at(-1);
  if (last?.weight === weight) last.text += text;
  else section.push({ text, weight });
}

/** The rows that the text encoder reads, at least one: {ids (77), weights (77), length}. */
export function rowsOf(text, tokenizer) {
  const room = tokenizer.contextLength - 2, rows = [];
  for (const section of readWeights(text)) {
    const tokens = section.flatMap(({ text: part, weight }) => tokenizer.encode(part).map((id) => ({ id, weight })));
    rows.push(...split(tokens, room));
  }
  if (rows.length > 1 && !rows.at(-1).length) rows.pop(); // the text ends in BREAK
  return rows.map((row) => rowOf(row, tokenizer));
}

export const emptyRow = (tokenizer) => rowOf([], tokenizer);

/** Rows of at most `room` tokens. A full row ends after the last comma among its last 20 tokens, if there is one. */
function* split(tokens, room) {
  let start = 0;
  while (tokens.length - start > room) {
    let end = start + room;
    if (tokens[end].id !== COMMA) {
      for (let after = end; after > Math.max(end - LOOK_BACK, start); after--) {
        if (tokens[after - 1].id === COMMA) { end = after; break; }
      }
    }
    yield tokens.slice(start, end);
    start = end;
  }
  yield tokens.slice(start);
}

function rowOf(tokens, { contextLength, padToken }) {
  const padding = contextLength - 2 - tokens.length;
  return {
    ids: [START, ...tokens.map(({ id }) => id), END, ...Array(padding).fill(padToken)],
    weights: [1, ...tokens.map(({ weight }) => weight), 1, ...Array(padding).fill(1)],
    length: tokens.length,
  };
}

/** The prompt as a strip: {tokens: [{id, text, weight, word}], words: [{text, tokens, weight}], chunks, room}. */
export function stripOf(text, tokenizer) {
  const rows = rowsOf(text, tokenizer), tokens = [], words = [];
  for (const row of rows) {
    const ids = row.ids.slice(1, row.length + 1), texts = tokenizer.texts(ids);
    let inside = false; // a word whose last token has not come yet
    ids.forEach((id, i) => {
      if (!inside) words.push({ text: "", tokens: [], weight: row.weights[i + 1] });
      const word = words.at(-1);
      word.text += texts[i].trimEnd();
      word.tokens.push(tokens.length);
      tokens.push({ id, text: texts[i], weight: row.weights[i + 1], word: words.length - 1 });
      inside = !texts[i].endsWith(" ");
    });
  }
  return { tokens, words, chunks: rows.length, room: tokenizer.contextLength - 2 - rows.at(-1).length };
}
