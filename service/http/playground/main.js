/** The playground: reads /info and /openapi.json, and builds the page. */

import { forgetKey, hasKey, onKeyNeeded, send } from "./api.js";
import { whatIsShown } from "./arrays.js";
import { compareView } from "./compare.js";
import { drawView } from "./draw.js";
import { makeGallery } from "./gallery.js";
import { keyDialog } from "./key.js";
import { explained } from "./model.js";
import { noiseView } from "./noise.js";
import { makeViewer, openWithKey } from "./viewer.js";

const VIEWS = ["draw", "compare", "denoise"];
const $ = (id) => document.getElementById(id);

/** Show the view in the page's address. */
function route() {
  const named = location.hash.slice(1);
  const shown = VIEWS.includes(named) ? named : VIEWS[0];
  for (const name of VIEWS) $(`view-${name}`).hidden = name !== shown;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${shown}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** @param {string} view */
function go(view) {
  location.hash = view;
  route();
  scrollTo(0, 0);
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
  let [draw, denoise] = [null, null];
  const viewer = makeViewer($("viewer"), info, {
    draw(recipe) {
      go("draw");
      draw.again(recipe);
    },
    denoise(item) {
      go("denoise");
      denoise.take(item);
    },
  });
  const gallery = makeGallery($("gallery"), info, viewer.open);
  route();
  addEventListener("hashchange", route);
  draw = drawView($("view-draw"), info, api, gallery);
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
