/** PNGs: from base64, and with the recipe in each image of the service. */

/**
 * @typedef {object} Recipe all that is needed to make an image again, from the text chunk `parameters`
 * @property {number} seed
 * @property {string} sampler
 * @property {number} num_inference_steps
 * @property {number} eta
 * @property {number|null} class_label
 * @property {number} guidance_scale
 * @property {string} model
 * @property {string} fingerprint
 */

const MAGIC_ENDS = 8;
const HEADER_ENDS = 33; // bytes of the magic and the chunk IHDR
const WIDTH_BEGINS = 16; // in the header; the height follows
const KEYWORD = "parameters\0";

/** @param {string} base64 @returns {Uint8Array} */
export const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

/** @param {Uint8Array} bytes @returns {Blob} */
export const blobOf = (bytes) => new Blob([bytes], { type: "image/png" });

/** @param {Uint8Array} bytes */
export const base64Of = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));

/**
 * A PNG with a recipe, where the service puts it: after the header.
 * @param {Uint8Array} png @param {Recipe} recipe @returns {Uint8Array}
 */
export function withRecipe(png, recipe) {
  const text = new TextEncoder().encode(`tEXt${KEYWORD}${ascii(JSON.stringify(recipe))}`);
  const chunk = new Uint8Array(text.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, text.length - 4);
  chunk.set(text, 4);
  view.setUint32(4 + text.length, crc32(text));
  const whole = new Uint8Array(png.length + chunk.length);
  whole.set(png.subarray(0, HEADER_ENDS));
  whole.set(chunk, HEADER_ENDS);
  whole.set(png.subarray(HEADER_ENDS), HEADER_ENDS + chunk.length);
  return whole;
}

/** JSON without letters beyond ASCII. */
const ascii = (json) => json.replace(/[\u0080-\uffff]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** The checksum of a PNG's chunk. */
function crc32(bytes) {
  let sum = ~0;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return ~sum >>> 0;
}

/** @param {Uint8Array} bytes of a PNG @returns {import("./model.js").Size} */
export function sizeOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return { width: view.getUint32(WIDTH_BEGINS), height: view.getUint32(WIDTH_BEGINS + 4) };
}

/**
 * The recipe in a PNG of the service.
 * @param {Uint8Array} bytes
 * @returns {Recipe|null}
 */
export function recipeOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = new TextDecoder("latin1");
  for (let begin = MAGIC_ENDS; begin + 12 <= bytes.length; ) {
    const body = bytes.subarray(begin + 8, begin + 8 + view.getUint32(begin));
    const name = text.decode(bytes.subarray(begin + 4, begin + 8));
    if (name === "tEXt" && text.decode(body.subarray(0, KEYWORD.length)) === KEYWORD) {
      return JSON.parse(text.decode(body.subarray(KEYWORD.length)));
    }
    begin += 12 + body.length;
  }
  return null;
}
