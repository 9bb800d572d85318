/** Models whose images are neither grey nor RGB answer .npy alone. The page shows pictures of the first channels. */

import { send } from "./api.js";
import { watch } from "./events.js";
import { base64Of, withRecipe } from "./png.js";

const NPY = "application/x-npy";
const HEADER = 10; // bytes ahead of the header's text, in version 1 of .npy

/** Whether the model's images are no pictures. @param {import("./model.js").Info} info */
export const isArrays = (info) => ![1, 3].includes(info.image_shape[0]);

/** What the page shows of an image, as a sentence; empty for pictures. @param {import("./model.js").Info} info */
export function whatIsShown(info) {
  const [channels] = info.image_shape;
  if (!isArrays(info)) return "";
  return channels < 3
    ? `Images have ${channels} channels. This page shows the first, in grey.`
    : `Images have ${channels} channels. This page shows the first three, as red, green and blue.`;
}

/**
 * The events of a request, as `watch` of events.js. A model that answers .npy alone has no progress and no previews; its
 * images come at the end, as PNGs of their first channels.
 * @param {import("./model.js").Info} info
 * @param {string} path
 * @param {RequestInit & {signal: AbortSignal}} init
 */
export async function* follow(info, path, init) {
  if (!isArrays(info)) {
    yield* watch(path, init);
    return;
  }
  const response = await send(path, { ...init, headers: { ...init.headers, Accept: NPY } });
  const asked = typeof init.body === "string" ? JSON.parse(init.body) : {};
  const images = imagesOf(await response.arrayBuffer());
  yield { name: "queued", data: { position: 0, eta_s: 0, promise_s: 0 } };
  for (const [index, image] of images.entries()) {
    const recipe = recipeOf(info, asked, Number(response.headers.get("x-seed")) + index, index);
    const png = new Uint8Array(await (await pngOf(image)).arrayBuffer());
    yield { name: "image", data: { index, seed: recipe.seed, b64_json: base64Of(withRecipe(png, recipe)) } };
  }
  yield { name: "done", data: { timings: timingsOf(response) } };
}

/**
 * A picture of the first channels of an .npy.
 * @param {Blob} npy
 * @returns {Promise<{png: Blob, size: {width: number, height: number}}>}
 * @throws {Error} a sentence
 */
export async function pictureOf(npy) {
  const [image] = imagesOf(await npy.arrayBuffer());
  const [, height, width] = image.shape;
  return { png: await pngOf(image), size: { width, height } };
}

/**
 * The images in an .npy of float32 [C, H, W] or [N, C, H, W].
 * @param {ArrayBuffer} buffer
 * @returns {{values: Float32Array, shape: number[]}[]}
 * @throws {Error} a sentence
 */
function imagesOf(buffer) {
  const text = new TextDecoder("latin1").decode(buffer.slice(HEADER, HEADER + new DataView(buffer).getUint16(HEADER - 2, true)));
  const shape = /'shape': \(([^)]*)\)/.exec(text)?.[1].split(",").filter((part) => part.trim()).map(Number);
  if (!shape || !text.includes("'<f4'") || !text.includes("'fortran_order': False") || ![3, 4].includes(shape.length)) {
    throw new Error("The file is no .npy of float32 [C, H, W].");
  }
  const values = new Float32Array(buffer.slice(HEADER + text.length));
  const one = shape.slice(-3);
  const size = one.reduce((product, length) => product * length, 1);
  return Array.from({ length: shape.length === 4 ? shape[0] : 1 }, (_, i) => ({ values: values.subarray(i * size, (i + 1) * size), shape: one }));
}

/** A PNG of the first three channels, or in grey of the first: −1 … 1 becomes black … white. */
function pngOf({ values, shape: [channels, height, width] }) {
  const area = height * width;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = Math.round(127.5 * (1 + values[(channels < 3 ? 0 : c) * area + i])); // clamped
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

/** The recipe of an image, which an .npy does not hold. */
function recipeOf(info, asked, seed, index) {
  const { num_images, preview_every, timeout_s, class_label = null, ...others } = asked;
  const { sampler, num_inference_steps, guidance_scale } = info.recommended;
  return {
    sampler,
    num_inference_steps: others.timesteps ? null : num_inference_steps,
    eta: 0,
    guidance_scale: class_label === null ? 1 : guidance_scale,
    ...others,
    seed,
    class_label: Array.isArray(class_label) ? class_label[index] : class_label,
    model: info.model.name,
    fingerprint: info.fingerprint,
  };
}

/** The seconds in Server-Timing. */
function timingsOf(response) {
  const parts = (response.headers.get("server-timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries(Array.from(parts, ([, name, ms]) => [`${name}_s`, Number(ms) / 1000]));
}
