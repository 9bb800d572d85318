/** Pictures in the shape of the model's images. They show noise until an image arrives. */

import { h } from "./controls.js";
import { isPixelArt } from "./model.js";

const MOST_NOISE = 64; // pixels a side; finer noise looks the same
const LEAST_WIDTH = 56; // of a picture on the screen

/**
 * @param {import("./model.js").Info} info
 * @param {string} tag of the element around it
 * @param {import("./model.js").Size} size of the image
 */
export function picture(info, tag = "div", size = info.sizes[0]) {
  const [channels] = info.image_shape;
  const { width, height } = size;
  const noise = noiseOf(channels, Math.min(width, MOST_NOISE), Math.min(height, MOST_NOISE));
  const img = h("img", { alt: "", hidden: true });
  const root = h(tag, { className: "picture" }, noise, img);
  root.classList.toggle("pixels", isPixelArt(size));
  return {
    root,
    /** @param {string} url @param {string} alt */
    show(url, alt) {
      img.src = url;
      img.alt = alt;
      img.hidden = false;
      noise.hidden = true;
    },
    blank() {
      img.hidden = true;
      img.removeAttribute("src");
      noise.hidden = false;
    },
  };
}

/** The address of a preview's PNG. @param {string} base64 */
export const inline = (base64) => `data:image/png;base64,${base64}`;

/** Gaussian noise as a decoration. The model's own noise comes from the seed. */
function noiseOf(channels, width, height) {
  const canvas = h("canvas", { width, height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const grey = normal();
    for (let c = 0; c < 3; c++) pixels.data[i + c] = 127.5 * (1 + 0.6 * (channels === 1 ? grey : normal()));
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

/**
 * The number of columns, and the width of each, that show `count` pictures large and in full lines.
 * @param {number} count
 * @param {number} ratio width over height
 * @param {{width: number, height: number, gap: number}} room
 * @param {number} pixels of a picture's width; whole multiples look sharp; 1 for any width
 */
export function layout(count, ratio, room, pixels) {
  const sharp = (width) => (width > pixels ? Math.floor(width / pixels) * pixels : width);
  let best = { columns: 1, width: 0, score: 0 };
  for (let columns = 1; columns <= count; columns++) {
    const rows = Math.ceil(count / columns);
    const across = (room.width - room.gap * (columns - 1)) / columns;
    const down = ((room.height - room.gap * (rows - 1)) / rows) * ratio;
    const width = sharp(Math.min(across, Math.max(down, LEAST_WIDTH)));
    const score = width * (count / (columns * rows)) ** 2; // empty places look unfinished
    if (score > best.score) best = { columns, width, score };
  }
  return best;
}
