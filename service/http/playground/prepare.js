/** Turns images of any size into PNGs of a served size, in a canvas. */

import { isArrays, pictureOf } from "./arrays.js";
import { nearestSize, sizeName } from "./model.js";

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
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${name} is not an image that this browser can read.`);
  }
  const size = nearestSize(info, bitmap);
  const { width, height } = size;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [width / scale, height / scale];
  context.drawImage(bitmap, (bitmap.width - w) / 2, (bitmap.height - h) / 2, w, h, 0, 0, width, height);

  const did = [];
  const isCropped = Math.abs(bitmap.width - w) >= 1 || Math.abs(bitmap.height - h) >= 1;
  if (isCropped) did.push("cropped");
  if (scale !== 1) did.push(`scaled from ${bitmap.width}×${bitmap.height} to ${sizeName(size)}`);
  if (info.image_shape[0] === 1 && makeGrey(context, width, height)) did.push("made grey");
  bitmap.close();
  const blob = await canvas.convertToBlob({ type: "image/png" });
  return { blob, size, said: did.length ? `${name}, ${listed(did)}` : `${name}, as it is` };
}

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
