/** The settings of a drawing. */

import { choiceField, complain, h, numberField, numberOf, proseField, schemaField, seedField, selectField } from "./controls.js";
import { ETA, GUIDANCE, classNames, randomSeed, samplerName, sizeName, takesEta, takesNegative, takesText } from "./model.js";

export const ANY = "any";
const EACH = "each";
const SLIDER_STEPS = 100; // larger numbers are typed
const FEW_CLASSES = 16; // up to this many classes, the default is one image of each
const PREVIEWS = [["1", "every step"], ["2", "every 2 steps"], ["5", "every 5 steps"], ["10", "every 10 steps"], ["0", "none"]];

// Fields with a control of their own. The controls of other fields come from /openapi.json.
// Those for requests with an image are not for a view that sends none.
const BY_HAND = ["prompt", "negative_prompt", "class_label", "num_images", "seed", "sampler", "num_inference_steps", "guidance_scale", "eta", "preview_every", "height", "width",
  "image", "mask_image", "strength", "fit", "paste_original"];

/** The samplers of a model. @param {import("./model.js").Info} info */
export function samplerField(info) {
  const options = info.samplers.map((name) => [name, samplerName(name)]);
  return selectField({ name: "sampler", label: "Sampler", options, value: info.recommended.sampler });
}

/** The numbers of steps of a model. @param {import("./model.js").Info} info */
function stepsField(info) {
  const common = { name: "num_inference_steps", label: "Steps", value: String(info.recommended.num_inference_steps) };
  const only = info.num_inference_steps;
  if (only) return choiceField({ ...common, options: only.map((count) => [String(count), String(count)]) });
  const max = info.num_train_timesteps;
  const field = numberField({ ...common, min: 1, max, slider: Math.min(max, SLIDER_STEPS) });
  const { timesteps } = info.recommended;
  if (timesteps) field.root.append(h("p", { className: "hint" }, `Recommended: timesteps ${timesteps.join(", ")}`));
  return field;
}

/** The sizes of a model, if it has several. @param {import("./model.js").Info} info */
function sizeField(info) {
  const names = info.sizes.map(sizeName);
  if (names.length < 2) return null;
  return choiceField({ name: "height", label: "Size", options: names.map((name) => [name, name]), value: names[0] });
}

/** Classifier-free guidance; null for models without. @param {import("./model.js").Info} info */
export function guidanceField(info) {
  if (info.num_classes === null && !takesText(info)) return null;
  const value = info.recommended.guidance_scale;
  const slider = takesText(info) ? 16 : 8;
  return numberField({ name: "guidance_scale", label: "Guidance", ...GUIDANCE, step: 0.1, slider, value });
}

/** The prompts of a model with text; none for others. @param {import("./model.js").Info} info */
export function promptFields(info) {
  if (!takesText(info)) return [];
  const prompt = proseField({ name: "prompt", label: "Prompt", rows: 3, placeholder: "what is drawn" });
  if (!takesNegative(info)) return [prompt];
  return [prompt, proseField({ name: "negative_prompt", label: "Negative prompt", rows: 2, placeholder: "what is not drawn" })];
}

/** The API's fields for prompts. An empty negative prompt is left out. */
export const promptsOf = (prompts) => Object.fromEntries(prompts.map(({ name, value }) => [name, value || undefined]));

/** The classes of a model, with choices for none and for one of each. @param {import("./model.js").Info} info */
export function classField(info, withEach = false) {
  const options = [[ANY, "Any"], ...classNames(info).map((name, label) => [String(label), name])];
  const each = withEach && info.num_classes <= info.limits.max_images;
  if (each) options.splice(1, 0, [EACH, "One of each"]);
  const value = each && info.num_classes <= FEW_CLASSES ? EACH : ANY;
  return choiceField({ name: "class_label", label: "Class", options, value });
}

/** The API's label for a chosen class. @param {string} value */
export const labelOf = (value) => (value === ANY ? null : Number(value));

/**
 * @param {HTMLFormElement} form
 * @param {import("./model.js").Info} info
 * @param {any} api the document /openapi.json
 */
export function settingsForm(form, info, api) {
  const prompts = promptFields(info);
  const label = info.num_classes === null ? null : classField(info, true);
  const count = numberField({
    name: "num_images", label: "Images", min: 1, max: info.limits.max_images, slider: Math.min(info.limits.max_images, 64), value: 1,
  });
  const seed = seedField({});
  const size = sizeField(info);
  const sampler = samplerField(info);
  const steps = stepsField(info);
  const guidance = guidanceField(info);
  const eta = info.samplers.some(takesEta) ? numberField({ name: "eta", label: "Eta", ...ETA, step: 0.05, value: 0 }) : null;
  const preview = selectField({ name: "preview_every", label: "Previews", options: PREVIEWS, value: "1" });
  const { properties } = api.paths["/sample"].post.requestBody.content["application/json"].schema;
  const names = Object.keys(properties).filter((name) => !BY_HAND.includes(name) && !isFixed(properties[name]));
  const others = names.map((name) => schemaField(name, properties[name]));
  const timesteps = others.find(({ name }) => name === "timesteps");
  const recommendedTimesteps = String(info.recommended.timesteps ?? "");
  timesteps.value = recommendedTimesteps;
  const fields = [...prompts, label, count, seed, size, sampler, steps, guidance, eta, preview, ...others].filter(Boolean);
  const submit = h("button", { className: "button", type: "submit" }, "Draw");
  const more = h("details", { open: matchMedia("(min-width: 60rem)").matches }, h("summary", {}, "How it is drawn"),
    ...[sampler, steps, guidance, eta, preview].filter(Boolean).map(({ root }) => root),
    h("details", {}, h("summary", {}, "More"), ...others.map(({ root }) => root)));
  form.append(...[...prompts, label, count, seed, size].filter(Boolean).map(({ root }) => root), more, submit);

  function follow() {
    // Recommended timesteps give way to another number of steps.
    const isOther = steps.value !== String(info.recommended.num_inference_steps);
    if (isOther && timesteps.value === recommendedTimesteps) timesteps.value = "";
    count.disable(label?.value === EACH);
    if (label) guidance.disable(label.value === ANY);
    if (eta) eta.root.hidden = !takesEta(sampler.value);
  }
  form.addEventListener("input", follow);
  follow();
  const chosenSize = () => info.sizes.find((one) => sizeName(one) === size?.value) ?? info.sizes[0];

  return {
    /** The body of POST /sample. The page draws the seed, so that it can ask again after a break of the stream. */
    read() {
      const all = label?.value === EACH ? classNames(info).map((_, i) => i) : null;
      const stepCount = numberOf(steps.value);
      const every = Number(preview.value);
      return {
        ...promptsOf(prompts),
        num_images: all ? all.length : numberOf(count.value),
        seed: seed.value === "" ? randomSeed() : numberOf(seed.value),
        sampler: sampler.value,
        // Timesteps replace the recommended number.
        num_inference_steps: timesteps.value && stepCount === info.recommended.num_inference_steps ? undefined : stepCount,
        eta: takesEta(sampler.value) ? numberOf(eta.value) : undefined,
        class_label: all ?? (label ? labelOf(label.value) : undefined),
        guidance_scale: guidance && label?.value !== ANY ? numberOf(guidance.value) : undefined,
        preview_every: stepCount >= 1 ? Math.min(every, stepCount) : every,
        ...(size ? { height: chosenSize().height, width: chosenSize().width } : {}),
        ...Object.fromEntries(others.map(({ name, read }) => [name, read()])),
      };
    },

    /** Set the form to a recipe with its size, for one image. @param {import("./png.js").Recipe} recipe */
    fill(recipe) {
      for (const prompt of prompts) prompt.value = recipe[prompt.name] ?? "";
      if (label) label.value = recipe.class_label ?? ANY;
      count.value = 1;
      seed.value = recipe.seed;
      if (size) size.value = sizeName(recipe);
      sampler.value = recipe.sampler;
      steps.value = recipe.num_inference_steps ?? info.recommended.num_inference_steps;
      if (guidance && !(label && recipe.class_label === null)) guidance.value = recipe.guidance_scale;
      if (eta) eta.value = recipe.eta;
      for (const other of others) {
        other.value = recipe[other.name] ?? "";
        if (other.value) unfold(other.root);
      }
      follow();
      complain(fields);
    },

    /** How many images the form asks for. */
    count: () => (label?.value === EACH ? info.num_classes : Math.max(1, Math.min(Number(count.value) || 1, info.limits.max_images))),

    size: chosenSize,

    /** @param {Error} [error] */
    complain(error) {
      for (const { loc } of error?.fields ?? []) unfold(fields.find(({ name }) => name === loc[0])?.root);
      complain(fields, error);
    },

    /** @param {boolean} busy */
    busy(busy) {
      submit.setAttribute("aria-disabled", String(busy));
      submit.textContent = busy ? "Drawing…" : "Draw";
    },
  };
}

/** Whether the model takes one value alone: null, or the only word or number. */
function isFixed({ anyOf = [], minimum, maximum, enum: choices }) {
  const isNull = anyOf.length > 0 && anyOf.every(({ type }) => type === "null");
  return isNull || choices?.length === 1 || (minimum !== undefined && minimum === maximum);
}

/** Open all foldable parts around an element. */
function unfold(element) {
  for (let fold = element?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
}
