/** The images that one request draws from an image: one of them large, before and after, and small ones to choose from. */

import { h } from "./controls.js";
import { dividerOf } from "./divider.js";
import { images, settingsOf } from "./model.js";
import { inline, picture } from "./picture.js";

/**
 * @param {HTMLElement} place
 * @param {import("./model.js").Info} info
 * @param {{details: (item: import("./gallery.js").Item) => void, use: (item: import("./gallery.js").Item) => void}} actions
 */
export function makeResults(place, info, actions) {
  const name = h("b");
  const how = h("span");
  const download = h("a", { className: "button quiet" }, "Download");
  const details = h("button", { type: "button", className: "button quiet" }, "Details");
  const use = h("button", { type: "button", className: "button quiet" }, "Use as image");
  const facts = h("figcaption", {}, name, how, h("div", { className: "chips" }, download, details, use));
  let shown = []; // {url, alt, item} of each image; nothing while there is none
  let [chosen, thumbs, after] = [0, [], null];
  details.addEventListener("click", () => actions.details(shown[chosen].item));
  use.addEventListener("click", () => actions.use(shown[chosen].item));

  /** Show one image large. */
  function choose(index) {
    chosen = index;
    const { url, alt, item } = shown[index] ?? {};
    if (url) after.show(url, alt);
    else after.blank();
    thumbs.forEach(({ button }, i) => button.setAttribute("aria-pressed", String(i === index)));
    facts.hidden = !item;
    if (!item) return;
    name.textContent = item.alt;
    how.textContent = settingsOf(item.recipe).join(" · ");
    Object.assign(download, { href: item.url, download: item.file });
  }

  function put(index, one) {
    shown[index] = one;
    thumbs[index]?.show(one.url, "");
    if (index === chosen) choose(index);
  }

  return {
    /**
     * Begin, with noise.
     * @param {HTMLCanvasElement} before
     * @param {string} called the image before
     * @param {number} count of images
     */
    begin(before, called, count) {
      const divider = dividerOf(info, before, called);
      after = divider.after;
      shown = [];
      thumbs = Array.from({ length: count > 1 ? count : 0 }, (_, i) => {
        const small = picture(info, "span", before);
        const button = h("button", { type: "button", className: "tile", "aria-label": `Image ${i + 1} of ${count}` }, small.root);
        button.addEventListener("click", () => choose(i));
        return { ...small, button };
      });
      const list = h("ul", { className: "thumbs", "aria-label": images(count) }, ...thumbs.map(({ button }) => h("li", {}, button)));
      list.hidden = count < 2;
      list.style.setProperty("--ratio", String(before.width / before.height));
      place.replaceChildren(divider.root, list, facts);
      choose(0);
    },

    /** @param {number} index @param {string} base64 */
    preview: (index, base64) => put(index, { url: inline(base64), alt: "" }),

    /** @param {number} index @param {import("./gallery.js").Item} item */
    image: (index, item) => put(index, { url: item.url, alt: `After: ${item.alt}`, item }),

    /** Take away the previews of what was not drawn to its end. */
    stop() {
      shown = shown.map((one) => (one?.item ? one : undefined));
      thumbs.forEach((small, i) => shown[i] || small.blank());
      if (after) choose(chosen);
    },
  };
}
