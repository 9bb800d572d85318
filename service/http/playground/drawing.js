/** One request that draws images, from the first event to the last. */

import { follow as events } from "./arrays.js";
import { images, seconds } from "./model.js";

/**
 * Draw, and show the progress.
 * @param {import("./model.js").Info} info
 * @param {RequestInit & {signal: AbortSignal}} init of POST /sample
 * @param {ReturnType<import("./progress.js").progressOf>} progress
 * @param {{queued: () => void, preview: (index: number, base64: string) => void, image: (index: number, base64: string) => void}} show
 */
export async function drawWith(info, init, progress, show) {
  let come = 0;
  for await (const event of events(info, "sample", init)) {
    const { name, data } = event;
    progress.tell(event);
    if (name === "queued") {
      come = 0;
      show.queued();
    } else if (name === "preview") {
      show.preview(data.index, data.b64_json);
    } else if (name === "image") {
      show.image(data.index, data.b64_json);
      come += 1;
    } else if (name === "done") {
      const { denoise_s, decode_s = 0 } = data.timings;
      progress.end(`${images(come)} in ${seconds(denoise_s + decode_s)}`);
    }
  }
}
