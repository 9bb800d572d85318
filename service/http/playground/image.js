/** Drawing from an image, and into a part of one. */

import { formOf } from "./api.js";
import { choiceField, h, numberField, numberOf, schemaField } from "./controls.js";
import { drawWith } from "./drawing.js";
import { dropzone } from "./drop.js";
import { settingsForm } from "./form.js";
import { maskOf, pngOf } from "./mask.js";
import { fieldName, labelText, megabytes, nearestSize } from "./model.js";
import { makePainter } from "./painter.js";
import { bitmapOf, fitInto } from "./prepare.js";
import { announce, progressOf } from "./progress.js";
import { makeResults } from "./results.js";

const READ = ["image/png", "image/jpeg", "image/webp"]; // by the server
const STRENGTH = { ofAll: 0.8, ofPart: 1 }; // the API's defaults
const FITS = { crop: "Crop", stretch: "Stretch" };

/**
 * What an image was drawn from.
 * @typedef {object} Origin
 * @property {Blob} file
 * @property {string} name
 * @property {Blob|null} mask a PNG of the size of the drawn image
 */

/**
 * @param {HTMLElement} view
 * @param {import("./model.js").Info} info
 * @param {any} api the document /openapi.json
 * @param {ReturnType<import("./gallery.js").makeGallery>} gallery
 */
export function imageView(view, info, api, gallery) {
  const form = view.querySelector("form");
  const stage = view.querySelector(".stage");
  const editor = stage.querySelector(".editor");
  const progress = progressOf(stage);
  const { properties } = api.paths["/sample"].post.requestBody.content["application/json"].schema;
  const { strength, fit, paste } = fieldsOf(properties);
  const settings = settingsForm(form, info, api, [strength, fit, paste]);
  const results = makeResults(stage.querySelector(".result"), info, {
    details: gallery.open,
    use: (item) => take(item.blob, item.alt),
  });
  const work = h("div", { className: "work", hidden: true });
  const painter = makePainter(work, info, keepUp);
  const said = h("p", { className: "hint" });
  painter.frame.after(said);
  editor.append(work, dropzone(view, READ.join(","), `PNG, JPEG or WebP of any size, up to ${megabytes(info.limits.max_body)}.`, take));
  /** @type {{file: Blob, name: string, bitmap: ImageBitmap}|null} */
  let source = null;
  let turns = 0; // of taking an image: the last one wins
  let isTyped = false; // the strength
  let isBusy = false;

  /** Keep the settings in step with the mask. */
  function keepUp() {
    const isPart = info.inpaints || painter.mask() !== null;
    if (!isTyped) strength.value = isPart ? STRENGTH.ofPart : STRENGTH.ofAll;
    paste.root.hidden = !isPart;
  }

  /** Show the image as it is fitted. */
  function showFitted() {
    if (!source) return;
    painter.fit(settings.size());
    said.textContent = fitInto(painter.photo, source.bitmap, source.name, fit.value, info);
  }

  /**
   * Take an image, in the place of the one that is there.
   * @param {Blob} file
   * @param {string} name
   * @param {{size?: import("./model.js").Size, mask?: import("./mask.js").Mask}} [how] the nearest size, and no paint
   * @returns {Promise<boolean>} whether it is an image
   */
  async function take(file, name, { size, mask } = {}) {
    const turn = ++turns;
    try {
      checkSize(file.size, name);
      const bitmap = await bitmapOf(file, name);
      const read = READ.includes(file.type) ? file : await asPng(bitmap);
      if (turn !== turns) return false;
      source?.bitmap.close();
      source = { file: read, name, bitmap };
      settings.resize(size ?? nearestSize(info, bitmap));
      painter.begin(mask);
      showFitted();
      work.hidden = false;
      progress.complain();
      announce(`${said.textContent}.`);
      return true;
    } catch (error) {
      progress.complain(error);
      return false;
    }
  }

  function checkSize(bytes, name) {
    const most = info.limits.max_body;
    if (bytes > most) throw new Error(`${name} has ${megabytes(bytes)}, and this server takes ${megabytes(most)} at most.`);
  }

  async function draw() {
    if (isBusy) return;
    isBusy = true;
    settings.complain();
    settings.busy(true);
    const signal = progress.begin("Asking");
    try {
      if (!source) throw new Error("Choose an image first.");
      await ask(source, signal);
    } catch (error) {
      progress.fail(error);
      settings.complain(error);
      results.stop();
    } finally {
      isBusy = false;
      settings.busy(false);
    }
  }

  /** Ask for what is seen now: later changes are for the next request. */
  async function ask({ file, name }, signal) {
    const request = settings.read();
    const before = copyOf(painter.photo);
    const mask = painter.mask();
    const origin = { file, name, mask: mask && (await pngOf(mask)) };
    const label = request.class_label;
    const body = formOf({
      ...request,
      preview_every: Math.min(request.preview_every, stepsOf(request)),
      class_label: Array.isArray(label) ? label.map((one) => labelText(info, one)) : label != null ? labelText(info, label) : undefined,
      paste_original: mask && request.paste_original ? true : undefined,
      image: file,
      mask_image: origin.mask,
    });
    checkSize((await new Response(body).blob()).size, "The request");
    await drawWith(info, { method: "POST", body, signal }, progress, {
      queued() {
        results.begin(before, name, request.num_images ?? 1);
        if (progress.isOutOfSight()) stage.querySelector(".result").scrollIntoView();
      },
      preview: results.preview,
      image: (index, base64) => results.image(index, gallery.add(base64, request, origin)),
    });
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  form.addEventListener("input", ({ target }) => {
    if (strength.root.contains(target)) isTyped = true;
    if (target.closest("[data-field=fit], [data-field=height]")) showFitted();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isBusy && !view.hidden) stage.querySelector(".cancel").click();
  });
  keepUp();

  return {
    /** Take an image of the gallery. @param {import("./gallery.js").Item} item */
    take(item) {
      settings.describe(item.recipe);
      return take(item.blob, item.alt);
    },

    /** Draw a recipe's image. @param {import("./png.js").Recipe} recipe @param {Origin} origin */
    async again(recipe, { file, name, mask }) {
      const { width, height } = recipe;
      if (!(await take(file, name, { size: { width, height }, mask: mask ? await maskOf(mask) : undefined }))) return;
      settings.fill(recipe);
      isTyped = true;
      strength.value = recipe.strength;
      fit.value = recipe.fit ?? "stretch";
      paste.value = recipe.paste_original ?? false;
      showFitted();
      await draw();
    },
  };
}

/** The fields of requests with an image. */
function fieldsOf({ fit, paste_original }) {
  const strength = numberField({ name: "strength", label: "Strength", min: 0.05, max: 1, step: 0.05, value: STRENGTH.ofAll });
  strength.root.append(h("p", { className: "hint" }, "How much is drawn anew: at 0.1 little changes, at 1 hardly a trace is left."));
  const fits = choiceField({ name: "fit", label: fieldName("fit"), options: fit.enum.map((one) => [one, FITS[one] ?? one]), value: "crop" });
  return {
    strength: Object.assign(strength, { read: () => numberOf(strength.value) }),
    fit: Object.assign(fits, { read: () => fits.value }),
    paste: schemaField("paste_original", paste_original),
  };
}

/** How many steps a request takes at least. */
function stepsOf({ num_inference_steps, timesteps, strength }) {
  const steps = timesteps?.length ?? num_inference_steps;
  return Math.max(1, Math.floor(steps * strength) || 1);
}

/** A PNG of an image that the browser can read, and the server perhaps cannot. */
function asPng(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

/** @param {HTMLCanvasElement} canvas */
function copyOf(canvas) {
  const copy = h("canvas", { width: canvas.width, height: canvas.height });
  copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}
