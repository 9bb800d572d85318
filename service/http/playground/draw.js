/** Drawing: the settings, and the stage where noise becomes images. */

import { h } from "./controls.js";
import { drawWith } from "./drawing.js";
import { settingsForm } from "./form.js";
import { isPixelArt, ratioOf } from "./model.js";
import { inline, layout, picture } from "./picture.js";
import { progressOf } from "./progress.js";

const GAP = 10; // pixels, as in the style sheet
const SHARE_OF_HEIGHT = 0.7; // of the window, for the stage

/**
 * @param {HTMLElement} view
 * @param {import("./model.js").Info} info
 * @param {any} api the document /openapi.json
 * @param {ReturnType<import("./gallery.js").makeGallery>} gallery
 */
export function drawView(view, info, api, gallery) {
  const stage = view.querySelector(".stage");
  const list = stage.querySelector(".tiles");
  const form = view.querySelector("form");
  const settings = settingsForm(form, info, api);
  const progress = progressOf(stage);
  let tiles = [];
  let size = settings.size(); // of the tiles
  let isBusy = false;
  let isFresh = true; // nothing is drawn yet

  function place() {
    const room = { width: stage.clientWidth, height: innerHeight * SHARE_OF_HEIGHT, gap: GAP };
    const fit = layout(tiles.length, ratioOf(size), room, isPixelArt(size) ? size.width : 1);
    list.style.setProperty("--columns", String(fit.columns));
    list.style.setProperty("--width", `${fit.width}px`);
    list.style.setProperty("--ratio", String(ratioOf(size)));
  }

  /** Show `count` tiles of noise, of the size that the settings name. */
  function set(count, newSize = settings.size()) {
    if (count !== tiles.length || newSize !== size || !isFresh) {
      size = newSize;
      tiles = Array.from({ length: count }, (_, i) => {
        const shown = picture(info, "span", size);
        const name = `Image ${i + 1}: noise`;
        const button = h("button", { type: "button", className: "tile", disabled: true, "aria-label": name }, shown.root);
        return { ...shown, button, item: h("li", {}, button) };
      });
      list.replaceChildren(...tiles.map(({ item }) => item));
    }
    place();
  }

  async function draw() {
    if (isBusy) return;
    isBusy = true;
    const request = settings.read();
    const asked = settings.size();
    settings.complain();
    settings.busy(true);
    const signal = progress.begin("Asking");
    try {
      await ask(request, asked, signal);
    } catch (error) {
      progress.fail(error);
      settings.complain(error);
      for (const tile of tiles) if (tile.button.disabled) tile.blank();
    } finally {
      isBusy = false;
      settings.busy(false);
    }
  }

  function ask(request, asked, signal) {
    const init = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal };
    return drawWith(info, init, progress, {
      queued() {
        isFresh = false;
        set(request.num_images, asked);
        reveal();
      },
      preview: (index, base64) => tiles[index].show(inline(base64), ""),
      image(index, base64) {
        const item = gallery.add(base64, request);
        const tile = tiles[index];
        tile.show(item.url, item.alt);
        tile.button.disabled = false;
        tile.button.setAttribute("aria-label", `${item.alt}: details`);
        tile.button.addEventListener("click", () => gallery.open(item));
      },
    });
  }

  /** Scroll to the stage. On a narrow screen, the stage is below the settings. */
  function reveal() {
    if (stage.getBoundingClientRect().top > innerHeight / 2) stage.scrollIntoView();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  form.addEventListener("input", () => isFresh && set(settings.count()));
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isBusy && !view.hidden) stage.querySelector(".cancel").click();
  });
  new ResizeObserver(place).observe(stage);
  set(settings.count());

  return {
    /** Draw a recipe's image. @param {import("./png.js").Recipe} recipe */
    again(recipe) {
      settings.fill(recipe);
      return draw();
    },
  };
}
