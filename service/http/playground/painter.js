/** Paints a mask over an image: with mouse, pen, touch and keyboard. */

import { choiceField, h, numberField } from "./controls.js";
import { copyOf, emptyMask, inverted, isEmpty, resized, stroke, wholeOf } from "./mask.js";
import { isPixelArt, ratioOf } from "./model.js";
import { announce } from "./progress.js";

const MOST_UNDONE = 32; // changes that can be undone
const [PAINT] = new Uint32Array(Uint8Array.of(64, 200, 186, 255).buffer); // red, green, blue, opacity; the style sheet lets the image shine through
const PEN_ERASER = 32; // of PointerEvent.buttons
const [BRUSH, ERASER] = ["brush", "eraser"];
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * @param {HTMLElement} place
 * @param {import("./model.js").Info} info
 * @param {() => void} changed called after each change of the mask
 */
export function makePainter(place, info, changed) {
  const photo = h("canvas", { role: "img", "aria-label": "The image, as it is fitted" });
  const sheet = h("canvas", {
    className: "paint", tabIndex: 0, role: "application", "aria-label": "Paint what is drawn anew", "aria-describedby": "painting",
  });
  const ring = h("span", { className: "ring", hidden: true });
  const frame = h("div", { className: "picture canvas" }, photo, sheet, ring);
  const tool = choiceField({ name: "tool", label: "Tool", options: [[BRUSH, "Brush"], [ERASER, "Eraser"]], value: BRUSH });
  const most = Math.max(...info.sizes.map(({ width, height }) => Math.max(width, height)));
  const size = numberField({ name: "brush", label: "Brush size", min: 1, max: most, slider: Math.ceil(most / 2), value: Math.ceil(most / 8) });
  const button = (text, act) => {
    const made = h("button", { type: "button", className: "button quiet" }, text);
    made.addEventListener("click", act);
    return made;
  };
  const undo = button("Undo", undoOne);
  const invert = button("Invert", () => replace(inverted(mask), "Inverted"));
  const clear = button("Clear", () => isEmpty(mask) || replace(emptyMask(mask), "Cleared"));
  const keys = h("p", { className: "hint", id: "painting" },
    info.inpaints ? "This model draws a part of an image anew: paint that part. " : "What you paint is drawn anew. Without paint, all of the image is. ",
    "By keyboard: ", key("Arrows"), " move the brush; with ", key("Shift"), " by one pixel. ", key("Space"), " paints; hold it to paint a line. ",
    key("E"), " changes between brush and eraser. ", key("["), " and ", key("]"), " change the size. ", key("Ctrl+Z"), " undoes.");
  place.append(frame, h("div", { className: "tools" }, tool.root, size.root, h("div", { className: "chips" }, undo, invert, clear)), keys);

  /** @type {import("./mask.js").Mask} */
  let mask = emptyMask(info.sizes[0]);
  /** @type {import("./mask.js").Mask[]} */
  let earlier = [];
  let at = { x: 0, y: 0 }; // the brush
  /** @type {number|null} */
  let pointer = null; // that paints
  let isHeld = false; // the space bar

  const sizeOfBrush = () => Math.max(1, Math.min(Number(size.value) || 1, most));

  /** Show a part of the mask. */
  function show({ left, top, right, bottom } = wholeOf(mask)) {
    if (left < right && top < bottom) {
      const pixels = new ImageData(right - left, bottom - top);
      const colours = new Uint32Array(pixels.data.buffer);
      for (let y = top, i = 0; y < bottom; y++) {
        for (let x = left; x < right; x++, i++) if (mask.values[y * mask.width + x]) colours[i] = PAINT;
      }
      sheet.getContext("2d").putImageData(pixels, left, top);
    }
    // A button that is `disabled` loses the focus.
    undo.setAttribute("aria-disabled", String(earlier.length === 0));
    clear.setAttribute("aria-disabled", String(isEmpty(mask)));
  }

  function showRing() {
    const of = (part, whole) => `${(100 * part) / whole}%`;
    ring.style.setProperty("--x", of(at.x + 0.5, mask.width));
    ring.style.setProperty("--y", of(at.y + 0.5, mask.height));
    ring.style.setProperty("--size", of(sizeOfBrush(), mask.width));
  }

  function keep() {
    earlier.push(copyOf(mask));
    earlier.splice(0, earlier.length - MOST_UNDONE);
  }

  function replace(other, said) {
    keep();
    mask = other;
    show();
    announce(`${said}.`);
    changed();
  }

  function undoOne() {
    const before = earlier.pop();
    if (!before) return;
    mask = before;
    show();
    announce("Undone.");
    changed();
  }

  /** Paint or erase from the brush's place to another. */
  function paint(to, erases = tool.value === ERASER) {
    const part = stroke(mask, at, to, sizeOfBrush(), erases ? 0 : 1);
    at = to;
    show(part);
    changed();
  }

  /** The pixel below a pointer. */
  function pixelOf(event) {
    const box = sheet.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * mask.width);
    return { x, y: Math.floor(((event.clientY - box.top) / box.height) * mask.height) };
  }

  sheet.addEventListener("pointerdown", (event) => {
    if (pointer !== null || (event.pointerType === "mouse" && event.button !== 0)) return;
    pointer = event.pointerId;
    sheet.setPointerCapture(pointer);
    keep();
    at = pixelOf(event);
    move(event);
  });
  function move(event) {
    ring.hidden = false;
    if (pointer === event.pointerId) paint(pixelOf(event), tool.value === ERASER || (event.buttons & PEN_ERASER) > 0);
    else if (pointer === null) at = pixelOf(event);
    showRing();
  }
  sheet.addEventListener("pointermove", move);
  sheet.addEventListener("lostpointercapture", (event) => {
    if (pointer === event.pointerId) pointer = null;
  });
  sheet.addEventListener("pointerleave", () => (ring.hidden = document.activeElement !== sheet));

  /** A key that the mask takes. Returns what to announce; null for another key. */
  function pressed(event) {
    const [dx, dy] = MOVES[event.key] ?? [];
    if (dx !== undefined) {
      const by = event.shiftKey ? 1 : Math.max(1, Math.round(sizeOfBrush() / 4));
      const inside = (value, length) => Math.max(0, Math.min(length - 1, value));
      const to = { x: inside(at.x + dx * by, mask.width), y: inside(at.y + dy * by, mask.height) };
      if (isHeld) paint(to);
      else at = to;
      const isPainted = mask.values[at.y * mask.width + at.x] === 1;
      return `${at.x + 1}, ${at.y + 1}: ${isPainted ? "painted" : "not painted"}`;
    }
    if (event.key === " ") {
      if (event.repeat) return "";
      isHeld = true;
      keep();
      paint(at);
      return tool.value === ERASER ? "Erased" : "Painted";
    }
    if (event.key === "e" || event.key === "E") {
      tool.value = tool.value === ERASER ? BRUSH : ERASER;
      return tool.value === ERASER ? "Eraser" : "Brush";
    }
    if (event.key === "[" || event.key === "]") {
      const by = Math.max(1, Math.round(sizeOfBrush() / 8)) * (event.key === "[" ? -1 : 1);
      size.value = Math.max(1, Math.min(sizeOfBrush() + by, most));
      return `Brush size ${size.value}`;
    }
    return null;
  }

  sheet.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
      event.preventDefault();
      undoOne();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const said = pressed(event);
    if (said === null) return;
    event.preventDefault();
    showRing();
    if (said) announce(`${said}.`);
  });
  sheet.addEventListener("keyup", (event) => {
    if (event.key === " ") isHeld = false;
  });
  sheet.addEventListener("focus", () => {
    ring.hidden = false;
    showRing();
  });
  sheet.addEventListener("blur", () => {
    isHeld = false;
    ring.hidden = true;
  });
  size.root.addEventListener("input", showRing);

  return {
    /** The mask; null without paint. */
    mask: () => (isEmpty(mask) ? null : mask),

    /** What shows the image and the paint. */
    frame,

    /** The canvas of the image, as it is fitted. */
    photo,

    /** Make the image and its mask of this size. The paint stays. @param {import("./model.js").Size} chosen */
    fit(chosen) {
      for (const canvas of [photo, sheet]) Object.assign(canvas, chosen);
      frame.style.setProperty("--ratio", String(ratioOf(chosen)));
      frame.classList.toggle("pixels", isPixelArt(chosen));
      if (mask.width !== chosen.width || mask.height !== chosen.height) {
        earlier = [];
        mask = resized(mask, chosen);
      }
      at = { x: Math.floor(chosen.width / 2), y: Math.floor(chosen.height / 2) };
      show();
      showRing();
    },

    /** Begin anew, with this mask or without paint. @param {import("./mask.js").Mask} [other] */
    begin(other = emptyMask(mask)) {
      earlier = [];
      mask = other;
      changed();
    },
  };
}

const key = (name) => h("kbd", {}, name);
