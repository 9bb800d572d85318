/** Shows one large image, with its recipe and its actions. */

import { hasKey, send } from "./api.js";
import { h } from "./controls.js";
import { explained, fieldName, isPixelArt, linkTo, randomSeed, ratioOf, samplerName, takesText } from "./model.js";

const LONG = 100; // characters of a value that may scroll

/** @typedef {import("./gallery.js").Item} Item */

/**
 * @param {HTMLDialogElement} dialog
 * @param {import("./model.js").Info} info
 * @param {string[]} views of the page
 * @param {{draw: (recipe: import("./png.js").Recipe, item: Item) => void, image: (item: Item) => void, denoise: (item: Item) => void}} actions
 */
export function makeViewer(dialog, info, views, actions) {
  const find = (selector) => dialog.querySelector(selector);
  const note = find(".note");
  const address = find(".link input");
  const opener = find(".link a");
  /** @type {Item[]} */
  let items = [];
  /** @type {Item} */
  let shown;

  function show(item) {
    shown = item;
    const image = h("img", { src: item.url, alt: item.alt, ...item.size });
    image.classList.toggle("pixels", isPixelArt(item.size));
    find(".picture").replaceChildren(image);
    find(".picture").style.setProperty("--ratio", String(ratioOf(item.size)));
    find("h2").textContent = item.name;
    find("dl").replaceChildren(...facts(info, item).flatMap(([name, value]) => [h("dt", {}, name), valueOf(value)]));
    Object.assign(find(".download"), { href: item.url, download: item.file });
    find(".link").hidden = Boolean(item.origin); // an address cannot carry an image
    opener.href = linkTo(info, item.recipe, item.size);
    address.value = opener.href;
    note.textContent = "";
    find(".newer").disabled = item === items[0];
    find(".older").disabled = item === items.at(-1);
  }

  function turn(by) {
    const next = items[items.indexOf(shown) + by];
    if (next) show(next);
  }

  function leaveFor(act) {
    dialog.close();
    act();
  }

  find(".close").addEventListener("click", () => dialog.close());
  find(".newer").addEventListener("click", () => turn(-1));
  find(".older").addEventListener("click", () => turn(1));
  find(".again").addEventListener("click", () => leaveFor(() => actions.draw({ ...shown.recipe, ...shown.size }, shown)));
  find(".vary").addEventListener("click", () => leaveFor(() => actions.draw({ ...shown.recipe, ...shown.size, seed: randomSeed() }, shown)));
  for (const name of ["image", "denoise"]) {
    find(`.${name}`).hidden = !views.includes(name);
    find(`.${name}`).addEventListener("click", () => leaveFor(() => actions[name](shown)));
  }
  address.addEventListener("focus", () => address.select());
  find(".copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(address.value);
      note.textContent = "Copied.";
    } catch {
      address.focus(); // selects the address; browsers give the clipboard only to pages over TLS or from this machine
      note.textContent = "Selected: copy it with Ctrl+C or ⌘C.";
    }
  });
  opener.addEventListener("click", (event) => {
    if (!hasKey()) return;
    event.preventDefault(); // a link cannot send the key
    openWithKey(opener.href, note);
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target === address) return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // a click beside the image
  });

  return {
    /** @param {Item[]} all newest first @param {Item} item */
    open(all, item) {
      items = all;
      show(item);
      dialog.showModal();
      find(".download").focus({ preventScroll: true }); // the image comes first
    },
  };
}

/** Fetch the target of a link, and show it in a tab. */
export async function openWithKey(address, note) {
  const tab = window.open("about:blank"); // at once, while browsers still count the click
  try {
    const blob = await (await send(address)).blob();
    if (tab) tab.location = URL.createObjectURL(blob);
    else note.textContent = "The browser did not open a tab.";
  } catch (error) {
    tab?.close();
    note.textContent = explained(error);
  }
}

/** A value. A long one scrolls, by keyboard too. */
function valueOf(value) {
  return h("dd", String(value).length > LONG ? { className: "long", tabIndex: 0 } : {}, value);
}

/** The facts of an image, by their names. @param {import("./model.js").Info} info @param {Item} item */
function facts(info, { recipe, name: heading }) {
  const {
    prompt, negative_prompt, prompt_sha256, negative_prompt_sha256,
    seed, sampler, num_inference_steps, class_label = null, guidance_scale, eta, model, fingerprint, ...others
  } = recipe;
  const rows = [];
  if (prompt && prompt !== heading) rows.push(["Prompt", prompt]);
  if (negative_prompt) rows.push(["Negative", negative_prompt]);
  rows.push(["Seed", seed], ["Sampler", samplerName(sampler)]);
  if (num_inference_steps !== null) rows.push(["Steps", num_inference_steps]);
  if (class_label !== null || takesText(info)) rows.push(["Guidance", guidance_scale > 1 ? guidance_scale : "off"]);
  if (eta > 0) rows.push(["Eta", eta]);
  for (const [name, value] of Object.entries(others)) rows.push([fieldName(name), value]);
  return [...rows, ["Model", model], ["Fingerprint", fingerprint]].map(([name, value]) => [name, String(value)]);
}
