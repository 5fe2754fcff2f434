// The grid of results; at most one of them is open.

import { breakable, clock, day, make, plural, score, span, thumbnail } from "./page.fetch.js";
import { openMoment } from "./page.moment.js";

let opened = null; // {item, panel} of the result that is open

/**
 * Replaces the cards of a list; `similar` is called with a hit whose like is to be found.
 * With `folders`, each folder has a heading.
 */
export function showHits(list, index, hits, query, similar, folders = false) {
  closeOpened();
  list.style.removeProperty("--aspect");
  let last = null;
  const rows = hits.flatMap((hit, i) => {
    const folder = hit.name.split("/").slice(0, -1).join("/");
    const heading = folders && folder !== last ? [make("li", { class: "folder" }, make("h2", {}, ...breakable(folder || "/")))] : [];
    last = folder;
    return [...heading, card(list, index, hit, query, similar, i === 0)];
  });
  list.classList.toggle("by-folder", folders);
  list.replaceChildren(...rows);
}

function card(list, index, hit, query, similar, first) {
  const picture = make("span", { class: "picture" });
  if (hit.missing) picture.append("file is gone");
  else picture.append(frame(list, index, hit, first, picture));
  const button = make(
    "button",
    { type: "button", class: "card", "aria-expanded": "false", onclick: () => toggle(index, hit, query, similar, item) },
    picture,
    make("span", { class: "name", title: hit.name }, ...breakable(hit.name)),
    make("span", { class: "when" }, hit.score === undefined ? clock(hit.end) : span(hit)),
    hit.score === undefined
      ? make("span", { class: "score" }, hit.moments ? plural(hit.moments, "moment") : "")
      : make("span", { class: "score", title: "Cosine of the angle between query and video" }, score(hit.score)),
    make("span", { class: "date", title: "The file's last change" }, day(hit.modified)),
  );
  if (hit.missing) button.classList.add("missing");
  const like = make(
    "button",
    { type: "button", class: "similar", title: "Find similar", "aria-label": `Find similar to ${hit.name}`, onclick: () => similar(hit) },
    make("svg", { class: "icon", viewBox: "0 0 20 20", "aria-hidden": "true" }, make("path", { d: "M3 3h9v9H3zM8 15v2h9V8h-2" })),
  );
  const item = make("li", {}, button, like);
  return item;
}

function frame(list, index, hit, first, picture) {
  const image = make("img", { src: thumbnail(index, hit), alt: "", loading: first ? "eager" : "lazy" });
  image.addEventListener("error", () => picture.replaceChildren("no preview"));
  // Most folders have videos of one shape: all cards take that of the first result.
  if (first)
    image.addEventListener("load", () => {
      const aspect = image.naturalWidth / image.naturalHeight;
      list.style.setProperty("--aspect", Math.min(Math.max(aspect, 1), 16 / 9));
    });
  return image;
}

function toggle(index, hit, query, similar, item) {
  const same = opened?.item === item;
  closeOpened();
  if (same) return;
  const panel = openMoment(index, hit, query, closeOpened, similar);
  item.after(panel.node);
  item.firstChild.setAttribute("aria-expanded", "true");
  opened = { item, panel };
  panel.node.scrollIntoView({ block: "nearest" });
}

/** Closes the open result; returns whether there was one. */
export function closeOpened() {
  if (!opened) return false;
  const { item, panel } = opened;
  opened = null;
  const inside = [panel.node, item].some((one) => one.contains(document.activeElement));
  panel.close();
  item.firstChild.setAttribute("aria-expanded", "false");
  if (inside) item.firstChild.focus();
  return true;
}

/** Moves the focus between cards by an arrow key; returns whether a card had it. */
export function moveFocus(list, key, above) {
  const cards = [...list.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  if (at < 0) return false;
  const place = (one) => one.parentNode; // the positions of cards are relative to their items
  const down = key === "ArrowDown";
  let to = cards[at + { ArrowLeft: -1, ArrowRight: 1 }[key]];
  if (down || key === "ArrowUp") {
    const [top, left] = [place(cards[at]).offsetTop, place(cards[at]).offsetLeft];
    const beyond = cards.filter((one) => (down ? place(one).offsetTop > top : place(one).offsetTop < top));
    const next = beyond.at(down ? 0 : -1); // of the next row; the row may be shorter
    const row = beyond.filter((one) => place(one).offsetTop === place(next).offsetTop);
    const far = (one) => Math.abs(place(one).offsetLeft - left);
    to = row.reduce((a, b) => (far(b) < far(a) ? b : a), next ?? (down ? cards.at(-1) : above));
  }
  to?.focus();
  return true;
}
