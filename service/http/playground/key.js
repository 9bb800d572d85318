/** Asks for the API key. */

import { KeyRefused } from "./api.js";

/**
 * @param {HTMLDialogElement} dialog
 * @returns {(why: string) => Promise<string>} for api.onKeyNeeded
 */
export function keyDialog(dialog) {
  const input = dialog.querySelector("input");
  return (why) =>
    new Promise((resolve, reject) => {
      dialog.querySelector(".trouble").textContent = why;
      input.value = "";
      dialog.returnValue = "";
      dialog.addEventListener(
        "close",
        () => {
          const key = input.value.trim();
          input.value = "";
          if (dialog.returnValue === "take" && key) resolve(key);
          else reject(new KeyRefused());
        },
        { once: true },
      );
      dialog.showModal();
    });
}
