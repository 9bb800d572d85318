/** Two images in one place, before and after. A divider shows more of one and less of the other. */

import { h } from "./controls.js";
import { isPixelArt, ratioOf } from "./model.js";
import { picture } from "./picture.js";

const MIDDLE = 50; // percent
const STEPS = {
  ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100,
};

/**
 * @param {import("./model.js").Info} info
 * @param {HTMLCanvasElement} before becomes a part of it
 * @param {string} name of the image before
 * @returns {{root: HTMLElement, after: ReturnType<typeof picture>}}
 */
export function dividerOf(info, before, name) {
  const { width, height } = before;
  before.setAttribute("role", "img");
  before.setAttribute("aria-label", `Before: ${name}`);
  const after = picture(info, "div", { width, height });
  const handle = h("div", {
    className: "handle", tabIndex: 0, role: "slider", "aria-label": "Before and after", "aria-valuemin": "0", "aria-valuemax": "100",
  });
  const root = h("div", { className: "picture divider" }, before, after.root, handle);
  root.style.setProperty("--ratio", String(ratioOf({ width, height })));
  root.classList.toggle("pixels", isPixelArt({ width, height }));
  let at = MIDDLE;

  /** @param {number} percent of the width; left of it is the image before */
  function put(percent) {
    at = Math.max(0, Math.min(100, Math.round(percent)));
    root.style.setProperty("--at", `${at}%`);
    handle.setAttribute("aria-valuenow", String(at));
    handle.setAttribute("aria-valuetext", `${at} % before, ${100 - at} % after`);
  }

  function follow(event) {
    const box = root.getBoundingClientRect();
    put((100 * (event.clientX - box.left)) / box.width);
  }

  root.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    root.setPointerCapture(event.pointerId);
    follow(event);
  });
  root.addEventListener("pointermove", (event) => root.hasPointerCapture(event.pointerId) && follow(event));
  handle.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    put(at + STEPS[event.key]);
  });
  put(MIDDLE);
  return { root, after };
}
