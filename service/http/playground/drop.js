/** The control to drop, paste or choose a file. */

import { h } from "./controls.js";

/**
 * @param {HTMLElement} view that takes files anywhere
 * @param {string} accept
 * @param {string} hint
 * @param {(file: File, name: string) => void} take
 * @returns {HTMLElement}
 */
export function dropzone(view, accept, hint, take) {
  const input = h("input", { type: "file", accept, className: "unseen" });
  const zone = h("label", { className: "drop" }, input, h("b", {}, "Drop an image, or choose one"), h("span", {}, hint));
  const over = (is) => zone.classList.toggle("over", is);
  input.addEventListener("change", () => {
    const [file] = input.files;
    if (file) take(file, file.name);
    input.value = ""; // so that the same file can be chosen again
  });
  view.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  view.addEventListener("dragleave", () => over(false));
  view.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    const [file] = event.dataTransfer.files;
    if (file) take(file, file.name);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file && !view.hidden) take(file, "What you pasted");
  });
  return zone;
}
