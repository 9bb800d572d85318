/** Sends requests to the page's own server. Errors become sentences. Asks for the API key if the server needs one. */

const KEY = `stepwise key of ${location.pathname}`;
const EXPLAINED = { 429: true, 503: true };

/** An error answer of the server: a problem document, RFC 9457. */
export class Problem extends Error {
  /**
   * @param {{status: number, detail: string, errors?: {loc: (string|number)[], msg: string}[]}} said
   * @param {string|null} retryAfter seconds
   */
  constructor(said, retryAfter = null) {
    super(sentence(said.detail) + (EXPLAINED[said.status] && retryAfter ? ` Try again in ${retryAfter} s.` : ""));
    this.status = said.status;
    this.fields = said.errors ?? [];
  }

  /** @param {Response} response */
  static async of(response) {
    const isProblem = response.headers.get("content-type")?.startsWith("application/problem+json");
    const detail = `the server answered ${response.status} ${response.statusText}`;
    const said = isProblem ? await response.json() : { status: response.status, detail };
    return new Problem(said, response.headers.get("retry-after"));
  }
}

/** The server does not answer. */
class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached. Is it running, and are you online?");
  }
}

/** The person gives no key. */
export class KeyRefused extends Error {
  constructor() {
    super("This server needs an API key.");
  }
}

/** @type {(why: string) => Promise<string>} */
let askForKey = () => Promise.reject(new KeyRefused());
/** @type {Promise<void>|null} */
let asking = null;

/**
 * Set the function that asks for a key.
 * @param {(why: string) => Promise<string>} ask resolves with the key; rejects with KeyRefused
 */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const forgetKey = () => sessionStorage.removeItem(KEY);

/**
 * Send a request, with the key if there is one. If the server refuses the key, ask for another and send again.
 * @param {string} path relative to the page, which a proxy may serve under a prefix
 * @param {RequestInit} [init]
 * @returns {Promise<Response>} always ok
 * @throws {Problem|Unreachable|KeyRefused|DOMException} the last is an AbortError
 */
export async function send(path, init = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = new Headers(init.headers);
    if (key !== null) headers.set("Authorization", `Bearer ${asBytes(key)}`);
    let response;
    try {
      response = await fetch(path, { ...init, headers });
    } catch (error) {
      throw init.signal?.aborted ? error : new Unreachable();
    }
    if (response.ok) return response;
    const problem = await Problem.of(response);
    if (problem.status !== 401) throw problem;
    if (sessionStorage.getItem(KEY) === key) await haveKey(key === null ? "" : problem.message);
  }
}

/**
 * A form. What is undefined or null is left out, and a list has a part for each member.
 * @param {Record<string, any>} values
 */
export function formOf(values) {
  const form = new FormData();
  for (const [name, value] of Object.entries(values)) {
    for (const one of [value].flat()) if (one != null) form.append(name, one);
  }
  return form;
}

/** Get a key. Several requests without a key ask only once. */
function haveKey(why) {
  asking ??= askForKey(why)
    .then((key) => sessionStorage.setItem(KEY, key))
    .finally(() => (asking = null));
  return asking;
}

/** The text with a character for each byte of its UTF-8, as headers need it. */
function asBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

/** @param {string} text a message: small first letter, no full stop */
export function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}

/** Whether an error comes from a request that this page cancelled. */
export const isAbort = (error) => error instanceof DOMException && error.name === "AbortError";
