/** text/event-stream over fetch. Unlike EventSource, fetch can POST and send a key. */

import { Problem, send } from "./api.js";

/** The stream ended before its last event. */
class Broken extends Error {
  constructor() {
    super("The connection broke twice before the images were here.");
  }
}

/**
 * Ask for events. If the stream breaks, ask once more.
 * @param {string} path
 * @param {RequestInit & {signal: AbortSignal}} init with a seed, so that the second try gives the same images
 * @yields {{name: string, data: any}} the events of docs/api.md, and `again` before the second try
 * @throws {Error} the errors of `send`; Problem also for the event `error`
 */
export async function* watch(path, init) {
  for (let tries = 1; ; tries++) {
    const response = await send(path, { ...init, headers: { ...init.headers, Accept: "text/event-stream" } });
    try {
      yield* told(response, init.signal);
      return;
    } catch (error) {
      if (!(error instanceof Broken) || tries === 2) throw error;
      yield { name: "again", data: {} };
    }
  }
}

/** All events of a response, up to `done`. */
async function* told(response, signal) {
  for await (const event of parsed(chunks(response, signal))) {
    if (event.name === "error") throw new Problem(event.data);
    yield event;
    if (event.name === "done") return;
  }
  throw new Broken();
}

/** The text of a response, piece by piece. */
async function* chunks(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw signal.aborted ? new DOMException("cancelled", "AbortError") : new Broken();
  }
}

/** The events in a text. Comments and incomplete events are left out. */
async function* parsed(texts) {
  let rest = "";
  for await (const text of texts) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map(field));
      if (fields.data !== undefined) yield { name: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

function field(line) {
  const colon = line.indexOf(":");
  return [line.slice(0, colon), line.slice(colon + 1).trimStart()];
}
