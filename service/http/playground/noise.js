/** Adds noise to an image up to a chosen timestep, and denoises it from there. */

import { formOf, isAbort, send } from "./api.js";
import { follow as events, isArrays, pictureOf } from "./arrays.js";
import { choiceField, complain, h, numberField, seedField } from "./controls.js";
import { dropzone } from "./drop.js";
import { ANY, classField, labelOf, promptFields, promptsOf, samplerField } from "./form.js";
import { isLatent, isPixelArt, linkTo, randomSeed, ratioOf, seconds, sizeName, steps } from "./model.js";
import { picture } from "./picture.js";
import { blobOf, bytesOf } from "./png.js";
import { prepared } from "./prepare.js";
import { announce, progressOf } from "./progress.js";

const QUIET_MS = 250; // after the last change, before a request to denoise

/**
 * @param {HTMLElement} view
 * @param {import("./model.js").Info} info
 */
export function noiseView(view, info) {
  const form = view.querySelector("form");
  const stage = view.querySelector(".stage");
  const progress = progressOf(stage);
  const panels = Object.fromEntries(["clean", "noisy", "mended"].map((name) => [name, panelOf(stage, name, info)]));
  const last = info.num_train_timesteps - 1;
  const timestep = numberField({ name: "timestep", label: "Timestep", min: 0, max: last, value: Math.round(0.4 * last) });
  const prompts = promptFields(info);
  const label = info.num_classes === null ? null : classField(info);
  const sampler = samplerField(info);
  const count = denoiseSteps(info);
  const seed = seedField({ value: String(randomSeed()), label: "Seed of the noise" });
  const fields = [timestep, ...prompts, label, sampler, count, seed].filter(Boolean);
  const drawOne = h("button", { type: "button", className: "button quiet" }, "Draw one");
  form.append(sourceOf(view, info, take, drawOne), ...fields.map(({ root }) => root));

  /** @type {{blob: Blob, name: string}|null} */
  let source = null;
  /** @type {AbortController|null} */
  let noising = null;
  let isStale = false; // the pictures are older than the settings
  let quiet = 0; // a timer

  async function take(file, name) {
    try {
      const { blob, size, said } = await prepared(file, name, info);
      use(blob, size, said);
    } catch (error) {
      progress.clear();
      progress.fail(error);
    }
  }

  /** Draw the array of an image again: the gallery has a picture of it. */
  async function takeArray(item) {
    progress.begin("Drawing");
    try {
      use(await (await send(linkTo(info, item.recipe, item.size))).blob(), item.size, `${item.name}, seed ${item.recipe.seed}`);
    } catch (error) {
      fail(error);
    }
  }

  function use(blob, size, said) {
    source = { blob, name: said };
    for (const panel of Object.values(panels)) panel.fit(size);
    panels.clean.show(blob, "The clean image", said);
    panels.noisy.blank();
    panels.mended.blank();
    announce(`${said}.`);
    changed();
  }

  /** Add noise again at once, one request at a time, with the newest settings last. Denoise after a quiet time. */
  async function changed() {
    if (!source) return;
    clearTimeout(quiet);
    progress.clear();
    complain(fields);
    isStale = true;
    if (noising) return;
    noising = new AbortController();
    try {
      let noisy = null;
      while (isStale) {
        isStale = false;
        noisy = await noised(noising.signal);
      }
      quiet = setTimeout(() => denoise(noisy), QUIET_MS);
    } catch (error) {
      fail(error);
    } finally {
      noising = null;
    }
  }

  function fail(error) {
    progress.fail(error);
    if (!isAbort(error)) complain(fields, error);
  }

  /** The noisy image: an exact .npy for denoising, and a PNG for the eye, with values beyond ±1 clipped. */
  async function noised(signal) {
    const t = timestep.value;
    const chosen = seed.value === "" ? String(randomSeed()) : seed.value;
    const ask = async (accept) => {
      const body = formOf({ image: source.blob, timestep: t, seed: chosen });
      return (await send("noise", { method: "POST", body, signal, headers: { Accept: accept } })).blob();
    };
    const types = isArrays(info) ? ["application/x-npy"] : ["application/x-npy", "image/png"];
    const [exact, seen = exact] = await Promise.all(types.map(ask));
    panels.noisy.show(seen, `The image with the noise of timestep ${t}`, `timestep ${t} of ${info.num_train_timesteps}`);
    return { exact, timestep: t, seed: chosen };
  }

  async function denoise(noisy) {
    const signal = progress.begin("Asking");
    const most = Math.max(1, Number(noisy.timestep)); // the most steps from this timestep
    const asked = !info.num_inference_steps && Number(count.value) > most ? most : count.value || "1";
    const class_label = label && labelOf(label.value);
    const isGuided = class_label !== null || prompts.some(({ value }) => value);
    const body = formOf({
      image: noisy.exact,
      timestep: noisy.timestep,
      num_inference_steps: asked,
      sampler: sampler.value,
      seed: noisy.seed,
      ...given(prompts),
      ...(class_label === null ? {} : { class_label: String(class_label) }),
      ...(isGuided ? { guidance_scale: info.recommended.guidance_scale } : {}),
    });
    try {
      for await (const event of events(info, "denoise", { method: "POST", body, signal })) {
        progress.tell(event);
        if (event.name === "image") {
          panels.mended.show(blobOf(bytesOf(event.data.b64_json)), "The denoised image", steps(Number(asked)));
        }
        if (event.name === "done") {
          const { denoise_s, decode_s = 0 } = event.data.timings;
          progress.end(`${steps(Number(asked))} in ${seconds(denoise_s + decode_s)}`);
        }
      }
    } catch (error) {
      if (!signal.aborted) fail(error);
    }
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => event.target.type !== "file" && changed());
  drawOne.addEventListener("click", async () => {
    progress.begin("Drawing");
    try {
      const query = new URLSearchParams({ seed: String(randomSeed()), ...given(prompts) });
      const response = await send(`sample?${query}`, { headers: { Accept: isArrays(info) ? "application/x-npy" : "image/png" } });
      use(await response.blob(), info.sizes[0], `A drawn image, seed ${response.headers.get("x-seed")}`);
    } catch (error) {
      fail(error);
    }
  });

  return {
    /** Take an image of the gallery. @param {import("./gallery.js").Item} item */
    take(item) {
      for (const prompt of prompts) prompt.value = item.recipe[prompt.name] ?? "";
      if (label) label.value = item.recipe.class_label ?? ANY;
      if (isArrays(info)) {
        takeArray(item);
        return;
      }
      use(item.blob, item.size, `${item.name}, seed ${item.recipe.seed}`);
    },
  };
}

/** The prompts that are not empty. */
const given = (prompts) => Object.fromEntries(Object.entries(promptsOf(prompts)).filter(([, text]) => text));

function denoiseSteps(info) {
  const common = { name: "num_inference_steps", label: "Steps", value: String(info.recommended.num_inference_steps) };
  const only = info.num_inference_steps;
  if (only) return choiceField({ ...common, options: only.map((count) => [String(count), String(count)]) });
  const max = Math.max(1, info.num_train_timesteps - 1);
  return numberField({ ...common, min: 1, max, slider: Math.min(max, 100) });
}

/** One of the three pictures. */
function panelOf(stage, name, info) {
  const figure = stage.querySelector(`.${name}`);
  const words = figure.querySelector("span");
  const shown = picture(info);
  figure.querySelector(".frame").append(shown.root);
  figure.classList.toggle("none", true);
  const fit = (size) => {
    figure.style.setProperty("--ratio", String(ratioOf(size)));
    shown.root.classList.toggle("pixels", isPixelArt(size));
  };
  fit(info.sizes[0]);
  let url = "";
  return {
    fit,
    async show(blob, alt, text) {
      const seen = isArrays(info) && blob.type !== "image/png" ? (await pictureOf(blob)).png : blob;
      const before = url;
      url = URL.createObjectURL(seen);
      shown.show(url, alt);
      URL.revokeObjectURL(before);
      words.textContent = text;
      figure.classList.remove("none");
    },
    blank() {
      shown.blank();
      words.textContent = "";
      figure.classList.add("none");
    },
  };
}

/** Where the image comes from. */
function sourceOf(view, info, take, drawOne) {
  const kind = `${info.sizes.map(sizeName).join(" or ")}${info.image_shape[0] === 1 ? ", grey" : ""}`;
  const ofArrays = `An .npy of float32 ${info.sizes.map((size) => `[${info.image_shape[0]}, ${size.height}, ${size.width}]`).join(" or ")}.`;
  const hint = isArrays(info) ? ofArrays : `Any size: the page crops and scales the image to ${kind}.`;
  const also = isLatent(info)
    ? "This model adds noise to latents. What you see of them is what its decoder makes of them."
    : "Or open one of the gallery, and press Denoise.";
  const zone = dropzone(view, isArrays(info) ? ".npy" : "image/*", hint, take);
  return h("div", { className: "source" }, zone, h("div", { className: "pair" }, drawOne, h("p", { className: "hint" }, also)));
}
