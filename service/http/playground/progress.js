/** The progress of a request: a bar, words, errors, and a button to cancel. */

import { isAbort } from "./api.js";
import { explained, images, seconds } from "./model.js";

/** A warning as a sentence. @param {string} text */
const capital = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

/** Tell screen readers a text. @param {string} text */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/**
 * @param {HTMLElement} stage with a .progress and a .trouble
 */
export function progressOf(stage) {
  const place = stage.querySelector(".progress");
  const bar = place.querySelector("progress");
  const doing = place.querySelector(".doing");
  const when = place.querySelector(".when");
  const cancel = place.querySelector(".cancel");
  const trouble = stage.querySelector(":scope > .trouble");
  const warning = stage.querySelector(":scope > .warning");
  let began = 0;
  let promise = 0; // seconds after the beginning
  let abort = null;
  let isRough = false; // previews are a linear map of latents
  cancel?.addEventListener("click", () => abort?.abort());

  let taken = ""; // the images or steps so far, in words
  const rough = () => (isRough ? ", rough preview" : "");
  const warn = (sentences = []) => {
    if (warning) warning.textContent = sentences.map(capital).join(" ");
  };
  const left = () => Math.max(0, promise - (performance.now() - began) / 1000);

  return {
    /** Begin. @returns {AbortSignal} of the button to cancel */
    begin(text) {
      abort?.abort();
      abort = new AbortController();
      trouble.textContent = "";
      warn();
      place.dataset.state = "busy";
      bar.removeAttribute("value");
      doing.textContent = text;
      taken = "";
      when.textContent = "";
      if (cancel) cancel.hidden = false;
      return abort.signal;
    },

    /** An event of a stream. @param {{name: string, data: any}} event */
    tell({ name, data }) {
      if (name === "queued") {
        began = performance.now();
        promise = data.promise_s;
        const ahead = data.position;
        doing.textContent = ahead ? `Waiting: ${ahead} request${ahead === 1 ? " goes" : "s go"} first` : "Starting";
        when.textContent = `about ${seconds(data.eta_s)}, at most ${seconds(data.promise_s)}`;
        warn(data.warnings);
        announce([`${doing.textContent}, ${when.textContent}.`, ...(data.warnings ?? []).map(capital)].join(" "));
      } else if (name === "progress") {
        bar.value = data.fraction;
        taken = data.images > 1 ? `${data.images_done} of ${images(data.images)}` : `Step ${data.step} of ${data.steps}`;
        doing.textContent = taken + rough();
        when.textContent = `about ${seconds(data.eta_s)} left, at most ${seconds(left())}`;
      } else if (name === "preview") {
        isRough = data.decoder === "linear";
        if (taken) doing.textContent = taken + rough();
      } else if (name === "again") {
        bar.removeAttribute("value");
        taken = "";
        doing.textContent = "The connection broke; asking again";
        when.textContent = "";
        announce("The connection broke. The same images are asked for again.");
      }
    },

    /** Show the warnings of the server. @param {string[]} [sentences] */
    warn,

    /** Show how many parts of a whole are done. */
    part(done, all, text) {
      bar.value = done / all;
      doing.textContent = text;
    },

    /** End with a message. */
    end(text) {
      place.dataset.state = "done";
      bar.value = 1;
      doing.textContent = text;
      when.textContent = "";
      if (cancel) cancel.hidden = true;
      announce(`${text}.`);
    },

    /** End with an error. @param {Error} error */
    fail(error) {
      place.dataset.state = "idle";
      bar.value = 0;
      doing.textContent = isAbort(error) ? "Cancelled" : "";
      when.textContent = "";
      if (cancel) cancel.hidden = true;
      if (isAbort(error)) announce("Cancelled.");
      else trouble.textContent = explained(error);
    },

    /** Show an error, or none. What runs goes on. @param {Error} [error] */
    complain(error) {
      trouble.textContent = error ? explained(error) : "";
    },

    /** Whether most of the screen is above it or below it. */
    isOutOfSight() {
      const { top, bottom } = place.getBoundingClientRect();
      return bottom < 0 || top > innerHeight;
    },

    /** Show nothing. */
    clear(text = "") {
      abort?.abort();
      place.dataset.state = "idle";
      bar.value = 0;
      doing.textContent = text;
      when.textContent = "";
      trouble.textContent = "";
    },
  };
}
