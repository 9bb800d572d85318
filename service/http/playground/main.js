/** The playground: reads /info and /openapi.json, and builds the page. */

import { forgetKey, hasKey, onKeyNeeded, send } from "./api.js";
import { isArrays, whatIsShown } from "./arrays.js";
import { compareView } from "./compare.js";
import { drawView } from "./draw.js";
import { makeGallery } from "./gallery.js";
import { imageView } from "./image.js";
import { keyDialog } from "./key.js";
import { explained } from "./model.js";
import { noiseView } from "./noise.js";
import { makeViewer, openWithKey } from "./viewer.js";

const $ = (id) => document.getElementById(id);

/** The views of what the model can do. @param {import("./model.js").Info} info */
function viewsOf(info) {
  if (info.inpaints) return ["image"];
  return isArrays(info) ? ["draw", "compare", "denoise"] : ["draw", "image", "compare", "denoise"];
}

/** Show the view in the page's address. @param {string[]} views */
function route(views) {
  const named = location.hash.slice(1);
  const shown = views.includes(named) ? named : views[0];
  for (const view of document.querySelectorAll(".view")) view.hidden = view.id !== `view-${shown}`;
  for (const link of document.querySelectorAll("nav a")) {
    link.hidden = !views.includes(link.hash.slice(1));
    if (link.hash === `#${shown}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/**
 * @param {import("./model.js").Info} info
 * @param {any} api the document /openapi.json
 */
function show(info, api) {
  document.title = `${info.model.name} · Stepwise`;
  document.querySelector("footer p").textContent =
    `${info.model.name} on ${info.device}, ${info.precision} · Stepwise ${info.version}`;
  const shown = whatIsShown(info);
  $("channels").textContent = shown;
  $("channels").hidden = !shown;
  const views = viewsOf(info);
  const go = (view) => {
    location.hash = view;
    route(views);
    scrollTo(0, 0);
  };
  let [draw, image, denoise] = [null, null, null];
  const viewer = makeViewer($("viewer"), info, views, {
    draw(recipe, { origin }) {
      go(origin ? "image" : "draw");
      if (origin) image.again(recipe, origin);
      else draw.again(recipe);
    },
    image(item) {
      go("image");
      image.take(item);
    },
    denoise(item) {
      go("denoise");
      denoise.take(item);
    },
  });
  const gallery = makeGallery($("gallery"), info, viewer.open);
  route(views);
  addEventListener("hashchange", () => route(views));
  draw = drawView($("view-draw"), info, api, gallery);
  if (views.includes("image")) image = imageView($("view-image"), info, api, gallery);
  compareView($("view-compare"), info, gallery);
  denoise = noiseView($("view-denoise"), info);
  if (hasKey()) guard();
}

/** With a key, links must send the key. The documentation's page cannot. */
function guard() {
  $("docs").hidden = true;
  $("forget").hidden = false;
  $("info").addEventListener("click", (event) => {
    event.preventDefault();
    openWithKey("info", $("status"));
  });
}

async function start() {
  $("start").hidden = true;
  try {
    const [info, api] = await Promise.all(["info", "openapi.json"].map(async (path) => (await send(path)).json()));
    show(info, api);
  } catch (error) {
    $("start").hidden = false;
    $("start").querySelector(".trouble").textContent = explained(error);
  }
}

onKeyNeeded(keyDialog($("key")));
$("start").querySelector("button").addEventListener("click", start);
$("forget").addEventListener("click", () => {
  forgetKey();
  location.reload();
});
start();
