/** The served model, in words and in the API's terms. Pure functions of /info. */

/** @typedef {{width: number, height: number}} Size of an image, in pixels */

/**
 * @typedef {object} Info the answer of /info; docs/api.md
 * @property {string} version
 * @property {{name: string}} model
 * @property {number} num_train_timesteps
 * @property {[number, number, number]} image_shape channels, height, width of the default size
 * @property {Size[]} sizes the default one first
 * @property {number[]|null} latent_shape
 * @property {number|null} num_classes
 * @property {string[]|null} class_names
 * @property {object|null} text facts of the text encoder; null for models without prompts
 * @property {string[]} embedded_fields the fields of a request that the network is told as numbers
 * @property {string[]} samplers
 * @property {number[]|null} num_inference_steps the choices of distilled weights; null for other weights
 * @property {{sampler: string, num_inference_steps: number, guidance_scale: number, timesteps: number[]|null}} recommended
 * @property {boolean} inpaints whether the network draws a part of an image anew, and nothing else
 * @property {{max_images: number, timeout_s: number, max_body: number}} limits `max_body` in bytes
 * @property {string} device
 * @property {string} precision
 * @property {string} fingerprint
 */

/** @typedef {import("./png.js").Recipe} Recipe */

/** The API's limits for every model. */
export const GUIDANCE = { min: 1, max: 30 }; // below 1 is off, as 1 is
export const ETA = { min: 0, max: 1 };
export const MAX_SEED = 2 ** 53 - 1;

const SAMPLERS = {
  ddim: "DDIM", ddpm: "DDPM", dpmpp_2m: "DPM-Solver++ 2M", dpmpp_2m_sde: "DPM-Solver++ 2M SDE", euler: "Euler",
  euler_a: "Euler ancestral", heun: "Heun", lcm: "LCM", pndm: "PNDM", tcd: "TCD", unipc: "UniPC",
};
const PIXELATED_BELOW = 128; // pixels of the longer side
const LONGEST_NAME = 120; // characters of an image's name

/** @param {string} name */
export const samplerName = (name) => SAMPLERS[name] ?? name;

/** @param {string} sampler */
export const takesEta = (sampler) => sampler === "ddim" || sampler === "tcd";

/** Whether the model draws what a text says. @param {Info} info */
export const takesText = (info) => Boolean(info.text);

/** Whether the model compares with a negative prompt. A network that is told guidance_scale does not. @param {Info} info */
export const takesNegative = (info) => takesText(info) && !info.embedded_fields.includes("guidance_scale");

/** What an image is called: its class, or the beginning of its prompt. @param {Info} info @param {Recipe} recipe */
export function nameOf(info, { class_label: label = null, prompt = "" }) {
  if (takesText(info)) return shortened(prompt) || "No prompt";
  if (label === null) return info.num_classes === null ? "Image" : "Any class";
  return info.class_names?.[label] ?? `Class ${label}`;
}

/** @param {string} text */
function shortened(text) {
  const letters = Array.from(text.trim().replace(/\s+/g, " "));
  return letters.length > LONGEST_NAME ? `${letters.slice(0, LONGEST_NAME).join("")}…` : letters.join("");
}

/** @param {Info} info @returns {string[]} */
export function classNames(info) {
  return Array.from({ length: info.num_classes ?? 0 }, (_, label) => info.class_names?.[label] ?? String(label));
}

/** Whether images are so small that the page shows their pixels as squares. @param {Size} size */
export const isPixelArt = ({ width, height }) => Math.max(width, height) < PIXELATED_BELOW;

/** @param {Info} info */
export const isLatent = (info) => info.latent_shape !== null;

/** @param {Size} size */
export const sizeName = ({ width, height }) => `${width}×${height}`;

/** Width over height. @param {Size} size */
export const ratioOf = ({ width, height }) => width / height;

/** The served size whose ratio is nearest. @param {Info} info @param {Size} size */
export function nearestSize(info, size) {
  const distance = (one) => Math.abs(Math.log(ratioOf(one) / ratioOf(size)));
  return info.sizes.reduce((best, one) => (distance(one) < distance(best) ? one : best));
}

/** A random seed, as the server draws them. */
export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** How an image was drawn, in two lines. @param {Recipe} recipe */
export function settingsOf(recipe) {
  const parts = recipe.num_inference_steps === null ? [] : [steps(recipe.num_inference_steps)];
  if (recipe.guidance_scale > 1) parts.push(`guidance ${recipe.guidance_scale}`);
  if (recipe.eta > 0) parts.push(`eta ${recipe.eta}`);
  return [samplerName(recipe.sampler), parts.join(" · ")];
}

/** @param {number} count */
export const steps = (count) => `${count} step${count === 1 ? "" : "s"}`;

/** @param {number} count */
export const images = (count) => `${count} image${count === 1 ? "" : "s"}`;

/** @param {number} bytes */
export const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 20 ? 2 : 1)} MiB`;

/** @param {number} s */
export const seconds = (s) => (s < 1 ? `${s.toFixed(2)} s` : s < 100 ? `${s.toFixed(1)} s` : `${Math.round(s)} s`);

/**
 * The address of an image. It gives the same bytes from every server with the same fingerprint.
 * @param {Info} info
 * @param {Recipe} recipe
 * @param {Size} size
 */
export function linkTo(info, recipe, size) {
  const { model, fingerprint, class_label = null, eta, seed, prompt_sha256, negative_prompt_sha256, ...others } = recipe;
  if (sizeName(size) !== sizeName(info.sizes[0])) Object.assign(others, { height: size.height, width: size.width });
  const query = new URLSearchParams({ seed: String(seed) });
  for (const [name, value] of Object.entries(others)) if (value !== null) query.set(name, String(value));
  if (eta > 0) query.set("eta", String(eta));
  if (class_label !== null) query.set("class_label", labelText(info, class_label));
  query.set("model", fingerprint);
  return `sample?${query}`;
}

/** A label for a query or a form. The server matches text as a name first, and a name may look like another class's index. */
export function labelText(info, label) {
  const names = info.class_names ?? [];
  return names.indexOf(names[label]) === label && names.length ? names[label] : String(label);
}

const FIELDS = {
  num_images: "Images",
  seed: "Seed",
  sampler: "Sampler",
  num_inference_steps: "Steps",
  eta: "Eta",
  class_label: "Class",
  guidance_scale: "Guidance",
  preview_every: "Previews",
  timestep: "Timestep",
  image: "The image",
  mask_image: "The mask",
  image_sha256: "SHA-256 of the image",
  mask_sha256: "SHA-256 of the mask",
  timeout_s: "Time limit",
  model: "The fingerprint",
};

/** The page's name for a field. @param {string} name of the API */
export const fieldName = (name) => FIELDS[name] ?? name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

/**
 * An invalid field as a sentence.
 * @param {{loc: (string|number)[], msg: string}} error
 */
export function fieldSentence(error) {
  const [name] = error.loc;
  return `${fieldName(name)} ${error.msg}.`;
}

/** An error in sentences. @param {Error & {fields?: any[]}} error */
export function explained(error) {
  return error.fields?.length ? error.fields.map(fieldSentence).join(" ") : error.message;
}
