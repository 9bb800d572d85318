/** Requests to the server that sent this page: its errors as sentences, and the API key where it wants one. */

const KEY = `stepwise key of ${location.pathname}`;
const EXPLAINED = { 429: true, 503: true };

/** What the server refuses or fails at: its problem document, RFC 9457. */
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

/** No answer at all. */
class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached. Is it running, and are you online?");
  }
}

/** The person does not want to give a key. */
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
 * Say how a key is asked for.
 * @param {(why: string) => Promise<string>} ask resolves with the key; rejects with KeyRefused
 */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const forgetKey = () => sessionStorage.removeItem(KEY);

/**
 * Send a request, with the key if there is one. Where the server wants another key, ask for it and send again.
 * @param {string} path relative to the page, which a proxy may serve under a prefix
 * @param {RequestInit} [init]
 * @returns {Promise<Response>} one that is ok
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

/** Several requests that lack a key ask for it once. */
function haveKey(why) {
  asking ??= askForKey(why)
    .then((key) => sessionStorage.setItem(KEY, key))
    .finally(() => (asking = null));
  return asking;
}

/** A header's characters are bytes: those of UTF-8. */
function asBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

/** @param {string} text begins small, and has no full stop, as messages do */
export function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}

/** Whether an error is that of a request that was cancelled here. */
export const isAbort = (error) => error instanceof DOMException && error.name === "AbortError";
