/** PNGs: from base64, and with the recipe in each image of the service. */

/**
 * @typedef {object} Recipe all that is needed to make an image again, from the text chunk `parameters`
 * @property {number} seed
 * @property {string} sampler
 * @property {number} num_inference_steps
 * @property {number} eta
 * @property {number|null} [class_label]
 * @property {string} [prompt] of models with text, as `negative_prompt` is
 * @property {string} [negative_prompt]
 * @property {number} guidance_scale
 * @property {string} model
 * @property {string} fingerprint
 */

const MAGIC_ENDS = 8;
const HEADER_ENDS = 33; // bytes of the magic and the chunk IHDR
const WIDTH_BEGINS = 16; // in the header; the height follows
const KEYWORD = "parameters\0";
const XMP_KEYWORD = "XML:com.adobe.xmp\0\0\0\0\0";
const XMP = // as in service/http/marks.py
  '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>' +
  '<x:xmpmeta xmlns:x="adobe:ns:meta/">' +
  '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">' +
  '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" ' +
  'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>' +
  "</rdf:RDF></x:xmpmeta>" +
  '<?xpacket end="r"?>';

/** @param {string} base64 @returns {Uint8Array} */
export const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

/** @param {Uint8Array} bytes @returns {Blob} */
export const blobOf = (bytes) => new Blob([bytes], { type: "image/png" });

/** @param {Uint8Array} bytes */
export const base64Of = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));

/**
 * A PNG with a recipe and the mark of a drawn image, where the service puts them: after the header.
 * @param {Uint8Array} png @param {Recipe} recipe @returns {Uint8Array}
 */
export function withRecipe(png, recipe) {
  const texts = [`tEXt${KEYWORD}${ascii(JSON.stringify(recipe))}`, `iTXt${XMP_KEYWORD}${XMP}`].map(chunk);
  const length = texts.reduce((sum, text) => sum + text.length, 0);
  const whole = new Uint8Array(png.length + length);
  let end = 0;
  for (const part of [png.subarray(0, HEADER_ENDS), ...texts, png.subarray(HEADER_ENDS)]) {
    whole.set(part, end);
    end += part.length;
  }
  return whole;
}

/** A chunk of a PNG from its name and content, with length and checksum. */
function chunk(text) {
  const named = new TextEncoder().encode(text);
  const whole = new Uint8Array(named.length + 8);
  const view = new DataView(whole.buffer);
  view.setUint32(0, named.length - 4);
  whole.set(named, 4);
  view.setUint32(4 + named.length, crc32(named));
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
