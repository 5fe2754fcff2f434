// The query, as text or as a file, and its results.

import { fetchJson, make, score } from "./page.fetch.js";
import { closeOpened, moveFocus, showHits } from "./page.results.js";

const FIRST = 12; // results
const MOST = 96;
const $ = (id) => document.getElementById(id);
const FIELDS = ["folder", "since", "until"];

let indexes = [];
let latest = new AbortController(); // of the newest request: an older response is ignored
let again = start; // repeats the newest request

const chosen = () => indexes.find((index) => index.name === $("index").value);

// --- The query -------------------------------------------------------------------------------

function filters() {
  return Object.fromEntries(FIELDS.map((name) => [name, $(name).value.trim()]));
}

/** Puts the query into the address, for bookmarks and the Back button. */
function writeHash() {
  const values = { q: $("query").value.trim(), ...filters() };
  if (indexes.length > 1) values.index = $("index").value;
  const entries = Object.entries(values).filter(([, value]) => value);
  const hash = values.q ? `#${new URLSearchParams(entries)}` : "";
  if (hash !== location.hash) history.pushState(null, "", hash || location.pathname);
}

function readHash() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) $(name).value = values.get(name) || "";
  $("query").value = values.get("q") || "";
  if (indexes.some((index) => index.name === values.get("index"))) $("index").value = values.get("index");
  showFilters();
}

function submit() {
  writeHash();
  if (indexes.length) searchText();
  else start();
}

/** Repeats the query with other filters, or on another index. */
function refine() {
  if ($("query").value.trim()) return submit();
  writeHash();
  again(FIRST);
}

function searchText(k = FIRST) {
  const q = $("query").value.trim();
  if (!q || !indexes.length) return showStart();
  const parameters = { q, index: $("index").value, k: k + 1, ...filters() };
  runSearch(`Looking for “${q}”…`, k, searchText, async (signal) => {
    const { hits, cut } = await fetchJson("/api/search", parameters, { signal });
    return { hits, cut, query: q, title: `for “${q}”` };
  });
}

function searchFile(file, k = FIRST) {
  const picture = file.type.startsWith("image/");
  const index = chosen();
  if (!index) return start();
  const send = (to, signal) => {
    const body = new FormData();
    body.append("file", file);
    const parameters = { index: index.name, k: k + 1, ...filters(), ...(picture ? {} : { to }) };
    const path = `/api/search/${picture ? "image" : "video"}`;
    return fetchJson(path, parameters, { method: "POST", body, signal });
  };
  $("query").value = "";
  writeHash();
  const more = (k) => searchFile(file, k);
  runSearch(`Looking at ${file.name}…`, k, more, async (signal) => {
    const [videos, captions] = await Promise.all([
      send("videos", signal),
      picture || !index.captions ? { hits: [] } : send("captions", signal),
    ]);
    return { hits: videos.hits, captions: captions.hits.slice(0, 5), title: `like ${file.name}` };
  });
}

/** Requests k + 1 results and shows k, unless a newer request has started meanwhile. */
async function runSearch(doing, k, more, search) {
  const { signal } = begin(doing);
  document.title = doing.replace(/^Looking (for|at) |…$/g, "");
  again = (count = k) => more(count);
  $("more").onclick = () => more(Math.min(2 * k, MOST));
  try {
    const results = await search(signal);
    if (signal.aborted) return;
    const left = results.hits.length > k; // more results exist
    show({ ...results, hits: results.hits.slice(0, k), left });
    $("more").hidden = !left || k >= MOST;
    if (k === FIRST) $("status").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (!signal.aborted) showError(error);
  }
}

function begin(doing) {
  latest.abort();
  latest = new AbortController();
  document.body.classList.add("busy");
  $("results").setAttribute("aria-busy", "true");
  $("status").textContent = doing;
  $("error").hidden = $("empty").hidden = true;
  return latest;
}

function end() {
  document.body.classList.remove("busy");
  $("results").removeAttribute("aria-busy");
  showHits($("results"), "", [], "");
  $("status").textContent = "";
  for (const id of ["cut", "captions", "more", "error", "empty"]) $(id).hidden = true;
}

// --- The results ---------------------------------------------------------------------------

function show({ hits, left, captions = [], cut = false, query = "", title }) {
  end();
  $("cut").hidden = !cut;
  showHits($("results"), $("index").value, hits, query);
  $("captions").hidden = !captions.length;
  $("captions").querySelector("ol").replaceChildren(...captions.map(captionRow));
  const count = `${left ? "First " : ""}${hits.length} result${hits.length === 1 ? "" : "s"}`;
  $("status").textContent = hits.length ? `${count} ${title}` : "";
  if (hits.length || captions.length) return;
  const narrow = Object.values(filters()).some(Boolean);
  const why = narrow ? "No video passes the filters: clear them." : "Nothing is indexed here yet.";
  showEmpty(`No results ${title}`, why);
}

function captionRow(hit) {
  const look = () => {
    $("query").value = hit.caption;
    submit();
  };
  const text = make("button", { type: "button", title: "Search for this text", onclick: look }, hit.caption);
  return make("li", {}, text, make("span", { class: "score" }, score(hit.score)));
}

function showError(error) {
  end();
  $("reason").textContent = error.message;
  $("error").hidden = false;
}

function showEmpty(title, text) {
  $("empty-title").textContent = title;
  $("empty-text").textContent = text;
  $("facts").replaceChildren();
  $("empty").hidden = false;
}

/** The state before a query: facts of the index. */
function showStart() {
  latest.abort();
  end();
  again = () => searchText();
  document.title = "Search videos";
  const index = chosen();
  if (!index) return showEmpty("No index is served", "Start the server with --index=DIR.");
  const count = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;
  showEmpty(`${count(index.files, "video")} to search`, "Describe in a sentence what happens in them.");
  const facts = {
    Folder: index.folder,
    Moments: index.moments > index.files ? index.moments.toLocaleString("en") : "",
    Captions: index.captions ? index.captions.toLocaleString("en") : "",
    Prompts: `${index.method}, ${count(index.frames, "frame")} of each clip`,
    CLIP: index.clip,
  };
  const rows = Object.entries(facts).filter(([, value]) => value);
  $("facts").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function showFilters() {
  const count = Object.values(filters()).filter(Boolean).length;
  $("filtered").textContent = ` · ${count}`;
  $("filtered").hidden = !count;
}

// --- Keys, files, start ----------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const writing = event.target.closest?.("input, select, textarea");
  if (event.key === "/" && (!writing || writing.type === "range")) {
    $("query").select();
    event.preventDefault();
  } else if (event.key === "Escape") {
    if (closeOpened()) event.preventDefault();
  } else if (event.key === "ArrowDown" && event.target === $("query")) {
    document.querySelector(".card")?.focus();
  } else if (event.key.startsWith("Arrow") && moveFocus($("results"), event.key, $("query"))) {
    event.preventDefault();
  }
}

function listen() {
  $("form").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  $("index").addEventListener("change", refine);
  for (const name of FIELDS) $(name).addEventListener("change", () => (showFilters(), refine()));
  $("clear").addEventListener("click", () => {
    for (const name of FIELDS) $(name).value = "";
    showFilters();
    refine();
  });
  $("retry").addEventListener("click", () => again());
  $("upload").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files.length) searchFile($("file").files[0]);
    $("file").value = ""; // the same file may be chosen again
  });
  window.addEventListener("popstate", () => (readHash(), searchText()));
  document.addEventListener("keydown", onKey);
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) window.addEventListener(name, onDrag);
}

function onDrag(event) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  const left = event.type === "dragleave" && event.relatedTarget === null;
  $("drop").hidden = left || event.type === "drop";
  if (event.type === "drop") searchFile(event.dataTransfer.files[0]);
}

/** Method and folder name; if two indexes agree in both, also the index's name. */
function label(index) {
  const last = (one) => one.folder.split("/").filter(Boolean).pop() || one.folder;
  const text = `${index.method} · ${last(index)}`;
  const same = indexes.filter((one) => one.method === index.method && last(one) === last(index));
  return same.length > 1 ? `${text} (${index.name})` : text;
}

async function start() {
  const { signal } = begin("Loading the indexes…");
  again = start;
  try {
    indexes = await fetchJson("/api/indexes", {}, { signal });
  } catch (error) {
    if (!signal.aborted) showError(error);
    return;
  }
  $("index").replaceChildren(...indexes.map((index) => make("option", { value: index.name }, label(index))));
  $("choose").hidden = indexes.length < 2;
  if (location.hash) {
    readHash();
    searchText();
  } else {
    showStart(); // the text that was typed meanwhile stays
    $("query").focus({ preventScroll: true });
  }
}

listen();
start();
