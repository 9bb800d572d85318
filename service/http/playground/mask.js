/** Masks: which pixels of an image are drawn anew. */

/**
 * @typedef {object} Mask
 * @property {number} width
 * @property {number} height
 * @property {Uint8Array} values one a pixel, line by line; 1 is drawn anew
 */

/** @typedef {{x: number, y: number}} Pixel may be beside the image */

/** @typedef {{left: number, top: number, right: number, bottom: number}} Part of a mask, up to and without `right` and `bottom` */

const WHITE = 255;

/** @param {import("./model.js").Size} size @returns {Mask} */
export const emptyMask = ({ width, height }) => ({ width, height, values: new Uint8Array(width * height) });

/** @param {Mask} mask @returns {Part} */
export const wholeOf = ({ width, height }) => ({ left: 0, top: 0, right: width, bottom: height });

/** @param {Mask} mask */
export const isEmpty = (mask) => !mask.values.includes(1);

/** @param {Mask} mask @returns {Mask} */
export const copyOf = (mask) => ({ ...mask, values: mask.values.slice() });

/** @param {Mask} mask @returns {Mask} */
export const inverted = (mask) => ({ ...mask, values: mask.values.map((value) => 1 - value) });

/**
 * A mask at another size.
 * @param {Mask} mask @param {import("./model.js").Size} size @returns {Mask}
 */
export function resized(mask, { width, height }) {
  const values = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const line = Math.floor(((y + 0.5) * mask.height) / height) * mask.width;
    for (let x = 0; x < width; x++) values[y * width + x] = mask.values[line + Math.floor(((x + 0.5) * mask.width) / width)];
  }
  return { width, height, values };
}

/**
 * Move a round brush from one pixel to another: set all pixels whose distance from the line is at most half of `size`.
 * @param {Mask} mask is changed
 * @param {Pixel} from
 * @param {Pixel} to
 * @param {number} size of the brush, in pixels
 * @param {0|1} value
 * @returns {Part} that may have changed
 */
export function stroke(mask, from, to, size, value) {
  const { width, height, values } = mask;
  const reach = size / 2;
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const square = dx * dx + dy * dy;
  const begin = (a, b) => Math.max(0, Math.ceil(Math.min(a, b) - reach));
  const end = (a, b, length) => Math.min(length, Math.floor(Math.max(a, b) + reach) + 1);
  const [left, top, right, bottom] = [begin(from.x, to.x), begin(from.y, to.y), end(from.x, to.x, width), end(from.y, to.y, height)];
  for (let y = top; y < bottom; y++) {
    for (let x = left; x < right; x++) {
      const along = square && Math.max(0, Math.min(1, ((x - from.x) * dx + (y - from.y) * dy) / square));
      if (Math.hypot(x - from.x - along * dx, y - from.y - along * dy) <= reach) values[y * width + x] = value;
    }
  }
  return { left, top, right, bottom };
}

/** The mask as the API takes it: white is drawn anew. @param {Mask} mask @returns {Promise<Blob>} */
export function pngOf(mask) {
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(mask.width, mask.height);
  mask.values.forEach((value, i) => pixels.data.set([WHITE * value, WHITE * value, WHITE * value, WHITE], 4 * i));
  context.putImageData(pixels, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

/** @param {Blob} png of `pngOf` @returns {Promise<Mask>} */
export async function maskOf(png) {
  const bitmap = await createImageBitmap(png);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  return { width, height, values: Uint8Array.from({ length: width * height }, (_, i) => Number(data[4 * i] === WHITE)) };
}
