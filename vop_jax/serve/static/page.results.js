// The grid of results; at most one of them is open.

import { breakable, make, score, span, thumbnail } from "./page.fetch.js";
import { openMoment } from "./page.moment.js";

let opened = null; // {item, panel} of the result that is open

/** Replaces the cards of a list. */
export function showHits(list, index, hits, query) {
  closeOpened();
  list.style.removeProperty("--aspect");
  list.replaceChildren(...hits.map((hit, i) => card(list, index, hit, query, i === 0)));
}

function card(list, index, hit, query, first) {
  const picture = make("span", { class: "picture" });
  if (hit.missing) picture.append("file is gone");
  else picture.append(frame(list, index, hit, first, picture));
  const button = make(
    "button",
    { type: "button", class: "card", "aria-expanded": "false", onclick: () => toggle(index, hit, query, item) },
    picture,
    make("span", { class: "name", title: hit.name }, ...breakable(hit.name)),
    make("span", { class: "when" }, span(hit)),
    make("span", { class: "score", title: "Cosine of the angle between query and video" }, score(hit.score)),
  );
  if (hit.missing) button.classList.add("missing");
  const item = make("li", {}, button);
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

function toggle(index, hit, query, item) {
  const same = opened?.item === item;
  closeOpened();
  if (same) return;
  const panel = openMoment(index, hit, query, closeOpened);
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
  const inside = panel.node.contains(document.activeElement);
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
  const next = cards.findIndex((one) => one.offsetTop > cards[0].offsetTop);
  const row = next < 0 ? cards.length : next;
  const to = at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[key];
  if (to < 0 && key === "ArrowUp") above.focus();
  else cards[Math.max(0, Math.min(to, cards.length - 1))].focus();
  return true;
}
