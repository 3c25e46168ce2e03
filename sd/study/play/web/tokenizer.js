// CLIP's byte-pair encoding, as in sd/text/tokenizer.py: from a text to token ids.
//
// Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4; merges are
// applied as in Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), section 3.2.

export const START = 49406, END = 49407;
const FIRST_MERGE = 512;
const SPECIAL = new Map([["<|startoftext|>", START], ["<|endoftext|>", END]]);
const WORD = /<\|startoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;

// Bytes that are printable in Latin-1 come first: the original vocabulary is a text file, one character per byte.
const isPrintable = (byte) => (byte >= 0x21 && byte < 0x7f) || (byte >= 0xa1 && byte < 0xad) || byte >= 0xae;
const BYTES = Array.from({ length: 256 }, (_, byte) => byte);
const BYTE_ORDER = [...BYTES.filter(isPrintable), ...BYTES.filter((byte) => !isPrintable(byte))];
const ID_OF_BYTE = new Uint16Array(256);
BYTE_ORDER.forEach((byte, id) => { ID_OF_BYTE[byte] = id; });

// What ftfy does to texts that are not plain ASCII, except for text that was decoded with the wrong character set.
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", hellip: "…", eacute: "é", ndash: "–", mdash: "—" };
const LIGATURES = { "Ĳ": "IJ", "ĳ": "ij", "ŉ": "ʼn", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj",
  "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st" };

function withoutEntities(text) {
  return text.replace(/&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-zA-Z]+));/g, (whole, decimal, hexadecimal, name) => {
    if (name) return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : whole;
    const code = decimal ? parseInt(decimal, 10) : parseInt(hexadecimal, 16);
    return code > 0 && code < 0xd800 || code > 0xdfff && code <= 0x10ffff ? String.fromCodePoint(code) : "\ufffd";
  });
}

function repaired(text) {
  return (text.includes("<") ? text : withoutEntities(text))
    .replace(/\x1b\[((?:\d|;)*)([a-zA-Z])/g, "")
    .replace(/[\u0132\u0133\u0149\u01f1-\u01f3\u01c4-\u01cc\ufb00-\ufb06]/g, (letter) => LIGATURES[letter] ?? letter)
    .replace(/[\uff01-\uff5e\uff61-\uffee\u3000]/g, (wide) => wide.normalize("NFKC"))
    .replace(/[\u02bc\u2018-\u201b]/g, "'").replace(/[\u201c-\u201f]/g, '"')
    .replace(/\r\n|[\r\u2028\u2029\u0085]/g, "\n")
    .replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd")
    .replace(/[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g, "")
    .normalize("NFC");
}

/** Repair the encoding, resolve HTML entities, use single spaces and lower case. */
export function clean(text) {
  if (!/^[\x20-\x7e]*$/.test(text) || text.includes("&")) text = withoutEntities(withoutEntities(repaired(text)));
  return text.split(/[\s\x1c-\x1f\x85]+/).filter(Boolean).join(" ").toLowerCase();
}

export class Tokenizer {
  /** merges: the bytes of clip_merges.bin; pair i holds the two ids that id 512 + i joins, little-endian. */
  constructor(merges, { contextLength = 77, padToken = END } = {}) {
    const view = new DataView(merges), count = START - FIRST_MERGE;
    if (view.byteLength !== 4 * count) throw new Error(`The tokenizer's table has ${view.byteLength} bytes instead of ${4 * count}.`);
    this.contextLength = contextLength;
    this.padToken = padToken;
    this.merges = new Map(); // left * 65536 + right -> joined id
    this.bytes = [...BYTE_ORDER.map((byte) => [byte]), ...BYTE_ORDER.map((byte) => [byte, 32])]; // of each id; a space ends a word
    for (let i = 0; i < count; i++) {
      const left = view.getUint16(4 * i, true), right = view.getUint16(4 * i + 2, true);
      this.merges.set(left * 65536 + right, FIRST_MERGE + i);
      this.bytes.push([...this.bytes[left], ...this.bytes[right]]);
    }
    for (const word of SPECIAL.keys()) this.bytes.push([...new TextEncoder().encode(word)]);
    this.known = new Map();
  }

  /** The ids of a text of any length, without start, end and padding. */
  encode(text) {
    return (clean(text).match(WORD) ?? []).flatMap((word) => this.encodeWord(word));
  }

  encodeWord(word) {
    let ids = this.known.get(word);
    if (!ids) {
      ids = this.merge(word);
      if (word.length <= 64 && this.known.size < 32768) this.known.set(word, ids);
    }
    return ids;
  }

  /** Join the bytes of one word until no two neighbours form a known pair; the pair with the smallest joined id first. */
  merge(word) {
    if (SPECIAL.has(word)) return [SPECIAL.get(word)];
    const ids = Array.from(new TextEncoder().encode(word), (byte) => ID_OF_BYTE[byte]);
    ids[ids.length - 1] += 256;
    for (;;) {
      let best = Infinity;
      for (let i = 0; i + 1 < ids.length; i++) best = Math.min(best, this.merges.get(ids[i] * 65536 + ids[i + 1]) ?? Infinity);
      if (best === Infinity) return ids;
      for (let i = 0; i + 1 < ids.length; i++) {
        if (this.merges.get(ids[i] * 65536 + ids[i + 1]) === best) ids.splice(i, 2, best);
      }
    }
  }

  /** The text of each id; a space marks the end of a word. Of a character spread over several ids, the last has it. */
  texts(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return ids.map((id) => decoder.decode(Uint8Array.from(this.bytes[id]), { stream: true }));
  }
}
