/** Compares one seed under several samplers and numbers of steps. */

import { isAbort } from "./api.js";
import { follow as events } from "./arrays.js";
import { complain, h, numberOf, seedField, severalField, textField } from "./controls.js";
import { classField, guidanceField, labelOf, promptFields, promptsOf } from "./form.js";
import { explained, images, isLatent, randomSeed, ratioOf, samplerName, seconds, steps, takesText } from "./model.js";
import { inline, picture } from "./picture.js";
import { progressOf } from "./progress.js";

const MOST = 48; // images
const AT_ONCE = 4; // of a browser's six connections to a server

/**
 * @param {HTMLElement} view
 * @param {import("./model.js").Info} info
 * @param {ReturnType<import("./gallery.js").makeGallery>} gallery
 */
export function compareView(view, info, gallery) {
  const form = view.querySelector("form");
  const stage = view.querySelector(".stage");
  const sheet = stage.querySelector(".sheet");
  const progress = progressOf(stage);
  const prompts = promptFields(info);
  const label = info.num_classes === null ? null : classField(info);
  const seed = seedField({});
  const guidance = guidanceField(info);
  const samplers = severalField({
    name: "sampler", label: "Samplers", options: info.samplers.map((name) => [name, samplerName(name)]),
    value: takesText(info) ? info.recommended.sampler : info.samplers.join(","), // large models take long
  });
  const counts = stepCounts(info);
  const fields = [...prompts, label, seed, samplers, counts, guidance].filter(Boolean);
  const submit = h("button", { className: "button", type: "submit" }, "Compare");
  form.append(...fields.map(({ root }) => root), submit);
  const follow = () => label && guidance.disable(labelOf(label.value) === null);
  let isBusy = false;

  /** The rows and columns of the table. Throws an error for invalid settings. */
  function read() {
    const rows = samplers.value.split(",").filter(Boolean);
    const columns = [...new Set(counts.value.split(/[\s,;]+/).filter(Boolean))].map(numberOf);
    const wrong = (name, msg) => Object.assign(new Error(), { fields: [{ loc: [name], msg }] });
    if (rows.length === 0) throw wrong("sampler", "must be chosen");
    if (columns.length === 0) throw wrong("num_inference_steps", "must be one number or more, as in 4, 15");
    if (rows.length * columns.length > MOST) {
      throw wrong("num_inference_steps", `make ${rows.length * columns.length} images, and may make ${MOST} at most`);
    }
    const common = {
      ...promptsOf(prompts),
      seed: seed.value === "" ? randomSeed() : numberOf(seed.value),
      class_label: label ? labelOf(label.value) : undefined,
      guidance_scale: guidance && !(label && labelOf(label.value) === null) ? numberOf(guidance.value) : undefined,
    };
    return { rows, columns, common };
  }

  async function compare() {
    if (isBusy) return;
    complain(fields);
    const signal = progress.begin("Asking");
    isBusy = true;
    submit.setAttribute("aria-disabled", "true");
    try {
      const { rows, columns, common } = read();
      const cells = table(sheet, info, rows, columns, common.seed);
      await fill(cells, common, signal);
    } catch (error) {
      progress.fail(error);
      complain(fields, error);
    } finally {
      isBusy = false;
      submit.setAttribute("aria-disabled", "false");
    }
  }

  async function fill(cells, common, signal) {
    const left = [...cells];
    let [come, failed] = [0, 0];
    const tell = (done) => {
      progress.part(done, cells.length, `${done} of ${images(cells.length)}${isLatent(info) ? ", rough previews" : ""}`);
    };
    const work = async () => {
      for (let cell = left.shift(); cell; cell = left.shift()) {
        try {
          await drawInto(info, cell, common, signal, gallery, progress);
          come += 1;
        } catch (error) {
          if (isAbort(error)) throw error;
          cell.fail(explained(error));
          failed += 1;
        }
        tell(come + failed);
      }
    };
    tell(0);
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    progress.end(`${images(come)} of seed ${common.seed}${failed ? `; ${failed} could not be drawn` : ""}`);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  form.addEventListener("input", follow);
  follow();
  empty(sheet, "One seed, the same noise: what do samplers and steps make of it?");
}

function stepCounts(info) {
  const common = { name: "num_inference_steps", label: "Steps" };
  const only = info.num_inference_steps;
  if (only) return severalField({ ...common, options: only.map((count) => [String(count), String(count)]), value: only.join(",") });
  const best = info.recommended.num_inference_steps;
  const least = Math.min(best, 2); // one step is too few for some samplers
  const value = [...new Set([best / 4, best / 2, best, 2 * best].map((count) => Math.max(least, Math.round(count))))];
  return textField({ ...common, value: value.filter((count) => count <= info.num_train_timesteps).join(", "), hint: "Several, with commas" });
}

function empty(sheet, text) {
  sheet.replaceChildren(h("p", { className: "empty" }, text));
}

/** A table with a row for each sampler and a column for each number of steps. */
function table(sheet, info, rows, columns, seed) {
  const cells = [];
  const head = h("tr", {}, h("td", {}), ...columns.map((count) => h("th", { scope: "col" }, steps(count))));
  const body = rows.map((sampler) => {
    const made = columns.map((count) => {
      const cell = cellOf(info, sampler, count);
      cells.push(cell);
      return h("td", {}, cell.root);
    });
    return h("tr", {}, h("th", { scope: "row" }, samplerName(sampler)), ...made);
  });
  const caption = h("caption", { className: "unseen" }, `Seed ${seed}`);
  sheet.replaceChildren(h("table", {}, caption, h("thead", {}, head), h("tbody", {}, ...body)));
  sheet.style.setProperty("--columns", String(columns.length));
  sheet.style.setProperty("--ratio", String(ratioOf(info.sizes[0])));
  return cells;
}

function cellOf(info, sampler, count) {
  const shown = picture(info, "span");
  const button = h("button", { type: "button", className: "tile", disabled: true, "aria-label": `${samplerName(sampler)}, ${steps(count)}: noise` }, shown.root);
  const words = h("p", { className: "words" }, "\u00a0");
  return {
    sampler,
    count,
    root: h("div", { className: "cell" }, button, words),
    preview: (base64) => shown.show(inline(base64), ""),
    image(item, open) {
      shown.show(item.url, item.alt);
      button.disabled = false;
      button.setAttribute("aria-label", `${item.alt}, ${samplerName(sampler)}, ${steps(count)}: details`);
      button.addEventListener("click", open);
    },
    say: (text) => (words.textContent = text),
    fail(text) {
      words.textContent = text;
      words.classList.add("complaint");
    },
  };
}

async function drawInto(info, cell, common, signal, gallery, progress) {
  const request = { ...common, sampler: cell.sampler, num_inference_steps: cell.count, preview_every: 1 };
  const init = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal };
  for await (const { name, data } of events(info, "sample", init)) {
    if (name === "queued") progress.warn(data.warnings); // the same for each cell
    if (name === "preview") cell.preview(data.b64_json);
    if (name === "image") {
      const item = gallery.add(data.b64_json, request);
      cell.image(item, () => gallery.open(item));
    }
    if (name === "done") cell.say(seconds(data.timings.denoise_s));
  }
}
