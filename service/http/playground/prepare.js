/** Fits images of any size to a served size, in a canvas. */

import { isArrays, pictureOf } from "./arrays.js";
import { nearestSize, sizeName } from "./model.js";

/** @typedef {"stretch"|"crop"} Fit of the API's field `fit` */

/**
 * For a model that reads .npy alone, check that the file is one. For others:
 * Crop and scale an image to the served size of the nearest ratio. For grey models, turn it grey.
 * @param {File|Blob} file
 * @param {string} name
 * @param {import("./model.js").Info} info
 * @returns {Promise<{blob: Blob, size: import("./model.js").Size, said: string}>} the PNG, and the changes in words
 * @throws {Error} a sentence
 */
export async function prepared(file, name, info) {
  if (isArrays(info)) {
    const { size } = await pictureOf(file); // fails for another kind of file
    return { blob: file, size, said: `${name}, as it is` };
  }
  const bitmap = await bitmapOf(file, name);
  const size = nearestSize(info, bitmap);
  const canvas = new OffscreenCanvas(size.width, size.height);
  const said = fitInto(canvas, bitmap, name, "crop", info);
  bitmap.close();
  return { blob: await canvas.convertToBlob({ type: "image/png" }), size, said };
}

/**
 * The pixels of a file, upright.
 * @param {Blob} file
 * @param {string} name
 * @returns {Promise<ImageBitmap>}
 * @throws {Error} a sentence
 */
export async function bitmapOf(file, name) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new Error(`${name} is not an image that this browser can read.`);
  }
}

/**
 * Draw an image into the whole of a canvas, as the server fits images. For grey models, turn it grey.
 * @param {HTMLCanvasElement|OffscreenCanvas} canvas
 * @param {ImageBitmap} bitmap
 * @param {string} name
 * @param {Fit} fit
 * @param {import("./model.js").Info} info
 * @returns {string} the changes in words
 */
export function fitInto(canvas, bitmap, name, fit, info) {
  const { width, height } = canvas;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const scaled = fit === "crop" ? covering(bitmap, canvas) : { width, height };
  const left = Math.floor(width / 2) - Math.floor(scaled.width / 2);
  const top = Math.floor(height / 2) - Math.floor(scaled.height / 2);
  context.drawImage(bitmap, left, top, scaled.width, scaled.height);

  const did = [];
  if (sizeName(scaled) !== sizeName(canvas)) did.push("cropped");
  if (sizeName(scaled) !== sizeName(bitmap)) did.push(`${isStretched(bitmap, scaled) ? "stretched" : "scaled"} from ${sizeName(bitmap)} to ${sizeName(canvas)}`);
  if (info.image_shape[0] === 1 && makeGrey(context, width, height)) did.push("made grey");
  return did.length ? `${name}, ${listed(did)}` : `${name}, as it is`;
}

/** The size at which an image just covers another. @returns {import("./model.js").Size} */
function covering(image, { width, height }) {
  const isNarrow = width * image.height > image.width * height;
  return {
    width: isNarrow ? width : Math.floor((image.width * height) / image.height),
    height: isNarrow ? Math.floor((image.height * width) / image.width) : height,
  };
}

/** Whether one side is scaled by more than the other. A fraction of a pixel does not count. */
const isStretched = (image, scaled) => Math.abs((image.width * scaled.height) / image.height - scaled.width) >= 1;

/** Turn pixels grey. Returns whether they had colour. */
function makeGrey(context, width, height) {
  const pixels = context.getImageData(0, 0, width, height);
  let wasColoured = false;
  for (let i = 0; i < pixels.data.length; i += 4) {
    const [r, g, b] = pixels.data.subarray(i, i + 3);
    if (r === g && g === b) continue;
    wasColoured = true;
    pixels.data.fill(Math.round(0.299 * r + 0.587 * g + 0.114 * b), i, i + 3); // ITU-R BT.601
  }
  context.putImageData(pixels, 0, 0);
  return wasColoured;
}

function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}
