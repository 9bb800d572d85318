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
const WIDTH_BEGINS = 16; // in the header; the height follows
const KEYWORD = "parameters\0";

/** @param {string} base64 @returns {Uint8Array} */
export const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

/** @param {Uint8Array} bytes @returns {Blob} */
export const blobOf = (bytes) => new Blob([bytes], { type: "image/png" });

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
