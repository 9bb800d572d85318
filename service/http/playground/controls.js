/** Form controls, each with a label and room for a complaint. */

import { MAX_SEED, fieldName, fieldSentence, randomSeed } from "./model.js";

/**
 * @typedef {object} Field
 * @property {string} name of the API's field
 * @property {HTMLElement} root
 * @property {string} value
 * @property {(disabled: boolean) => void} disable
 */

const MAX_CHIPS = 12;
let made = 0;

/**
 * An element with properties, attributes (names with a dash, and role) and children.
 * @param {string} tag
 * @param {Record<string, any>} properties
 * @param {...(Node|string)} children
 * @returns {any}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** A number, by slider or by keys. The slider's range may be shorter than the number's. */
export function numberField({ name, label, min, max, step = 1, value, slider = max }) {
  const id = `field-${made++}`;
  const range = h("input", { type: "range", id, min, max: slider, step, value });
  const number = h("input", { type: "number", min, max, step, value, "aria-label": `${label}, as a number` });
  range.addEventListener("input", () => (number.value = range.value));
  number.addEventListener("input", () => (range.value = number.value));
  return field(name, h("label", { htmlFor: id }, label), h("div", { className: "pair" }, range, number), [range, number], {
    kind: "row",
    get: () => number.value,
    set: (text) => (number.value = range.value = text),
  });
}

/** One of a few, in a list. */
export function selectField({ name, label, options, value }) {
  const id = `field-${made++}`;
  const select = h("select", { id }, ...options.map(([key, text]) => h("option", { value: key }, text)));
  select.value = value;
  return field(name, h("label", { htmlFor: id }, label), select, [select], {
    kind: "row",
    get: () => select.value,
    set: (key) => (select.value = key),
  });
}

/** One of several, side by side if they are few. */
export function choiceField({ name, label, options, value }) {
  if (options.length > MAX_CHIPS + 2) return selectField({ name, label, options, value });
  const group = `group-${made++}`;
  const [set, inputs] = chips("radio", group, label, options);
  const choose = (key) => inputs.forEach((input) => (input.checked = input.value === key));
  choose(value);
  return field(name, null, set, inputs, {
    get: () => inputs.find((input) => input.checked)?.value ?? "",
    set: choose,
  });
}

/** A box to check. The value is true or false. */
export function checkField({ name, label, hint = "" }) {
  const input = h("input", { type: "checkbox" });
  const whole = field(name, null, h("label", { className: "check" }, input, label), [input], {
    get: () => String(input.checked),
    set: (text) => (input.checked = text === "true"),
    read: () => input.checked,
  });
  if (hint) whole.root.append(h("p", { className: "hint" }, hint));
  return whole;
}

/** Any of several. The value is the chosen ones, with commas. */
export function severalField({ name, label, options, value }) {
  const [set, inputs] = chips("checkbox", `group-${made++}`, label, options);
  const choose = (keys) => inputs.forEach((input) => (input.checked = keys.split(",").includes(input.value)));
  choose(value);
  return field(name, null, set, inputs, {
    get: () => inputs.filter((input) => input.checked).map((input) => input.value).join(","),
    set: choose,
  });
}

function chips(type, group, label, options) {
  const inputs = options.map(([key]) => h("input", { type, name: group, value: key }));
  const labels = options.map(([, text], i) => h("label", { className: "chip" }, inputs[i], h("span", {}, text)));
  return [h("fieldset", {}, h("legend", {}, label), h("div", { className: "chips" }, ...labels)), inputs];
}

/** Text. */
export function textField({ name, label, value, placeholder = "", hint = "" }) {
  const id = `field-${made++}`;
  const input = h("input", { type: "text", id, value, placeholder, inputMode: "numeric", autocomplete: "off" });
  const whole = field(name, h("label", { htmlFor: id }, label), input, [input], {
    get: () => input.value.trim(),
    set: (text) => (input.value = text),
  });
  if (hint) whole.root.append(h("p", { className: "hint" }, hint));
  return whole;
}

/** A longer text. Enter submits the form, Shift+Enter begins a line. */
export function proseField({ name, label, rows, placeholder = "" }) {
  const id = `field-${made++}`;
  const input = h("textarea", { id, rows, placeholder, autocomplete: "off" });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    input.form.requestSubmit();
  });
  return field(name, h("label", { htmlFor: id }, label), input, [input], {
    get: () => input.value.trim(),
    set: (text) => (input.value = text),
  });
}

/** A seed: a number, or empty for a new seed each time. */
export function seedField({ name = "seed", label = "Seed", value = "" }) {
  const id = `field-${made++}`;
  const input = h("input", {
    type: "text", id, value, placeholder: "another each time", inputMode: "numeric", autocomplete: "off", maxLength: String(MAX_SEED).length,
  });
  const roll = h("button", { type: "button", className: "button quiet", title: "Take a random seed" }, "Roll");
  const both = h("div", { className: "pair" }, input, roll);
  roll.addEventListener("click", () => {
    input.value = String(randomSeed());
    input.dispatchEvent(new Event("input", { bubbles: true }));
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  return field(name, h("label", { htmlFor: id }, label), both, [input], {
    get: () => input.value.trim(),
    set: (text) => (input.value = text),
  });
}

/**
 * The control for a field, by its schema in /openapi.json. Requests leave the field out while its control is empty.
 * @param {string} name
 * @param {any} schema
 * @returns {Field & {read: () => any}} `read` gives the API's value
 */
export function schemaField(name, schema) {
  const kinds = (schema.anyOf ?? [schema]).filter(({ type }) => type !== "null");
  const choices = kinds.find((kind) => kind.enum)?.enum;
  const label = fieldName(name);
  if (choices) {
    const chosen = selectField({ name, label, options: [["", "default"], ...choices.map((one) => [one, one])], value: "" });
    return Object.assign(chosen, { read: () => chosen.value || undefined });
  }
  if (kinds.every(({ type }) => type === "boolean")) return checkField({ name, label, hint: schema.description });
  const isList = kinds.every(({ type }) => type === "array");
  const isText = kinds.some(({ type, items }) => (isList ? items : { type }).type === "string");
  const typed = textField({ name, label, value: "", placeholder: "default", hint: schema.description });
  const parsed = isText ? (text) => text || undefined : numberOf;
  const read = () => (isList && typed.value ? typed.value.split(/[\s,;]+/).map(parsed) : parsed(typed.value));
  return Object.assign(typed, { read });
}

/** @param {""|"row"} kind row: the label is beside the control */
function field(name, label, control, inputs, { get, set, kind = "", ...more }) {
  const complaint = h("p", { className: "complaint", id: `field-${made++}`, hidden: true });
  const root = h("div", { className: `field ${kind}`, "data-field": name }, ...(label ? [label] : []), control, complaint);
  return {
    name,
    root,
    get value() {
      return get();
    },
    set value(text) {
      set(String(text));
    },
    disable(disabled) {
      root.classList.toggle("off", disabled);
      for (const input of inputs) input.disabled = disabled;
    },
    /** @param {string} sentence "" for no complaint */
    complain(sentence) {
      complaint.textContent = sentence;
      complaint.hidden = !sentence;
      for (const input of inputs) {
        if (sentence) input.setAttribute("aria-describedby", complaint.id);
        else input.removeAttribute("aria-describedby");
        input.setAttribute("aria-invalid", String(Boolean(sentence)));
      }
    },
    focus: () => inputs[0].focus(),
    ...more,
  };
}

/** The number in a text; undefined for no text; the text itself if it is no number, so that the server complains. */
export function numberOf(text) {
  if (text === "") return undefined;
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

/**
 * Show an error's complaints beside the fields, and clear earlier complaints.
 * @param {Field[]} fields
 * @param {{fields?: {loc: (string|number)[], msg: string}[]}} [error]
 */
export function complain(fields, error) {
  for (const field of fields) field.complain("");
  const wrong = (error?.fields ?? []).flatMap((one) => {
    const field = fields.find(({ name }) => name === one.loc[0]);
    field?.complain(fieldSentence(one));
    return field ? [field] : [];
  });
  wrong[0]?.focus();
}
