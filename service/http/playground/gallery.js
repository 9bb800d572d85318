/** The drawn images, newest first, until the person leaves the page. */

import { h } from "./controls.js";
import { isPixelArt, nameOf, settingsOf } from "./model.js";
import { blobOf, bytesOf, recipeOf, sizeOf } from "./png.js";

const MOST = 500; // images in the gallery

/**
 * @typedef {object} Item
 * @property {Blob} blob the PNG, unchanged
 * @property {string} url of the blob
 * @property {import("./png.js").Recipe} recipe
 * @property {import("./model.js").Size} size
 * @property {string} name of its class, or its prompt
 * @property {string} alt
 * @property {string} file the name of a saved file
 * @property {import("./image.js").Origin} [origin] what it was drawn from, beside noise
 */

/**
 * @param {HTMLElement} section
 * @param {import("./model.js").Info} info
 * @param {(items: Item[], item: Item) => void} open shows one image of the gallery
 */
export function makeGallery(section, info, open) {
  const list = section.querySelector("ul");
  const count = section.querySelector(".count");
  /** @type {(Item & {card: HTMLElement})[]} */
  let items = [];

  function tell() {
    section.hidden = items.length === 0;
    count.textContent = String(items.length);
  }

  function drop(dropped) {
    for (const item of dropped) {
      item.card.remove();
      URL.revokeObjectURL(item.url);
    }
  }

  section.querySelector("button").addEventListener("click", () => {
    drop(items);
    items = [];
    tell();
  });

  const show = (item) => open(items, item);
  return {
    /**
     * Add a PNG of the service.
     * @param {string} base64
     * @param {{prompt?: string, negative_prompt?: string}} asked what the recipe may not tell: see STEPWISE_RECIPE_PROMPTS
     * @param {import("./image.js").Origin} [origin]
     * @returns {Item}
     */
    add(base64, { prompt, negative_prompt }, origin) {
      const bytes = bytesOf(base64);
      const recipe = { ...recipeOf(bytes), ...(prompt && { prompt }), ...(negative_prompt && { negative_prompt }) };
      const known = items.find((item) => JSON.stringify(item.recipe) === JSON.stringify(recipe));
      if (known) return known;
      const name = nameOf(info, recipe);
      const blob = blobOf(bytes);
      const item = {
        blob, url: URL.createObjectURL(blob), recipe, size: sizeOf(bytes), name, origin,
        alt: `${name}, seed ${recipe.seed}`,
        file: `${recipe.model}-${recipe.seed}.png`,
      };
      item.card = cardOf(item, () => show(item));
      list.prepend(item.card);
      items.unshift(item);
      drop(items.splice(MOST));
      tell();
      return item;
    },
    open: show,
  };
}

function cardOf(item, open) {
  const image = h("img", { src: item.url, alt: "", ...item.size, loading: "lazy" });
  image.classList.toggle("pixels", isPixelArt(item.size));
  const button = h("button", { type: "button", className: "card" },
    h("span", { className: "frame" }, image),
    h("b", {}, item.name),
    h("span", { className: "seed" }, `seed ${item.recipe.seed}`),
    ...settingsOf(item.recipe).map((line) => h("span", { className: "how" }, line)));
  button.addEventListener("click", open);
  return h("li", {}, button);
}
