// Requests to the server, and DOM elements: names from files enter as text, never as HTML.

/** Fetches JSON; throws an Error with one line to show, or AbortError. */
export async function fetchJson(path, parameters = {}, options = {}) {
  const entries = Object.entries(parameters).filter(([, value]) => value !== "");
  let response, body;
  try {
    response = await fetch(`${path}?${new URLSearchParams(entries)}`, options);
    body = await response.json().catch((error) => {
      if (error.name === "AbortError") throw error;
      return {};
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new Error(body.error || `The server failed with status ${response.status}.`);
  return body;
}

/** An element with attributes, listeners (functions, by `onname`) and children; null is none. */
export function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** A file's name that may break after /, _ and -. */
export function breakable(name) {
  return name.split(/(?<=[/_-])(?=.)/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}

/** 75.25 -> "1:15.3"; a whole second has no fraction. */
export function clock(seconds) {
  const tenths = Math.round(Math.max(0, seconds) * 10);
  const [hours, minutes] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60];
  const rest = (tenths % 600) / 10;
  const two = (number, digits) => number.toFixed(digits).padStart(digits ? 4 : 2, "0");
  const tail = two(rest, Number.isInteger(rest) ? 0 : 1);
  return hours ? `${hours}:${two(minutes, 0)}:${tail}` : `${minutes}:${tail}`;
}

export const span = (hit) => `${clock(hit.start)} – ${clock(hit.end)}`;
export const plural = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;
/** Unix time -> "25 Nov 2026". */
export const day = (seconds) =>
  new Date(1000 * seconds).toLocaleDateString("en-GB", { year: "numeric", month: "short", day: "numeric" });
export const score = (value) => value.toFixed(3);
export const media = (index, hit) => `/media/${encodeURIComponent(index)}/${hit.file_id}`;
export const thumbnail = (index, hit) =>
  `/api/thumbnail/${encodeURIComponent(index)}/${hit.file_id}?t=${((hit.start + hit.end) / 2).toFixed(3)}`;
