// The library; the query, as text, as a file or as a moment; and its results.

import { fetchJson, make, plural, score, span } from "./page.fetch.js";
import { closeOpened, moveFocus, showHits } from "./page.results.js";

const FIRST = 12; // results
const MOST = 96;
const PAGE = 24; // videos of the library
const $ = (id) => document.getElementById(id);
const FIELDS = ["folder", "since", "until"];

let indexes = [];
let page = 1; // of the library
let model = null; // the moment whose like is looked for
let latest = new AbortController(); // of the newest request: an older response is ignored
let again = start; // repeats the newest request

const chosen = () => indexes.find((index) => index.name === $("index").value);

// --- The query -------------------------------------------------------------------------------

function filters() {
  return Object.fromEntries(FIELDS.map((name) => [name, $(name).value.trim()]));
}

/** Puts what is shown into the address, for bookmarks and the Back button. */
function writeHash() {
  const values = { q: $("query").value.trim(), ...filters() };
  if (indexes.length > 1) values.index = $("index").value;
  if (model) Object.assign(values, { like: model.file_id, start: model.start, end: model.end, name: model.name });
  else if (!values.q) Object.assign(values, { page: page > 1 ? page : "", order: $("order").value });
  if (values.order === "newest") values.order = "";
  const entries = Object.entries(values).filter(([, value]) => value !== "");
  const hash = entries.length ? `#${new URLSearchParams(entries)}` : "";
  if (hash !== location.hash) history.pushState(null, "", hash || location.pathname);
}

function readHash() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) $(name).value = values.get(name) || "";
  $("query").value = values.get("q") || "";
  $("order").value = values.get("order") === "folder" ? "folder" : "newest";
  page = Math.max(1, Math.trunc(Number(values.get("page"))) || 1);
  const [file_id, start, end] = ["like", "start", "end"].map((name) => Number(values.get(name)));
  model = file_id ? { file_id, start, end, name: values.get("name") || "" } : null;
  if (indexes.some((index) => index.name === values.get("index"))) $("index").value = values.get("index");
  showFilters();
}

function submit() {
  model = null;
  page = 1;
  writeHash();
  run();
}

/** Shows what the fields and the address say. */
function run() {
  if (!indexes.length) start();
  else if ($("query").value.trim()) searchText();
  else if (model) searchSimilar();
  else browse();
}

/** Repeats what is shown with other filters, or on another index. */
function refine() {
  if ($("query").value.trim()) return submit();
  page = 1;
  writeHash();
  again(FIRST);
}

/** `min_score`: "none" also shows videos that the server takes for chance. */
function searchText(k = FIRST, min_score = "") {
  const q = $("query").value.trim();
  const parameters = { q, index: $("index").value, k: k + 1, min_score, ...filters() };
  const more = (k) => searchText(k, min_score);
  runSearch(`Looking for “${q}”…`, k, more, async (signal) => {
    const body = await fetchJson("/api/search", parameters, { signal });
    return { ...body, query: q, title: `for “${q}”`, weak: !min_score };
  });
}

function findSimilar(hit) {
  model = hit;
  $("query").value = "";
  writeHash();
  searchSimilar();
}

function searchSimilar(k = FIRST) {
  const { file_id, start, end, name } = model;
  const parameters = { index: $("index").value, file_id, start, end, k: k + 1, ...filters() };
  runSearch(`Looking for videos like ${name}…`, k, searchSimilar, async (signal) => {
    const { hits } = await fetchJson("/api/similar", parameters, { signal });
    return { hits, title: `like ${name}, ${span(model)}` };
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
  model = null;
  page = 1;
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
  document.title = doing.replace(/^Looking (for videos|for|at) |…$/g, "");
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
  for (const id of ["cut", "captions", "more", "error", "empty", "library", "pager"]) $(id).hidden = true;
}

// --- The results ---------------------------------------------------------------------------

function show({ hits, left, captions = [], cut = false, query = "", title, weak = false }) {
  end();
  $("cut").hidden = !cut;
  showHits($("results"), $("index").value, hits, query, findSimilar);
  $("captions").hidden = !captions.length;
  $("captions").querySelector("ol").replaceChildren(...captions.map(captionRow));
  $("status").textContent = hits.length ? `${left ? "First " : ""}${plural(hits.length, "result")} ${title}` : "";
  if (hits.length || captions.length) return;
  const narrow = Object.values(filters()).some(Boolean);
  let why = narrow ? "No video that passes the filters resembles it: clear them." : "No video resembles it. Try other words.";
  if (!chosen()?.files) why = "Nothing is indexed here yet.";
  showEmpty(`Nothing found ${title}`, why);
  $("anyway").hidden = !weak;
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
  $("empty").hidden = false;
  $("anyway").hidden = true;
}

/** The state before a query: a page of the library. */
async function browse() {
  const { signal } = begin("Loading the library…");
  document.title = "Search videos";
  again = browse;
  const [index, shown] = [chosen(), page];
  const parameters = { index: index.name, order: $("order").value, offset: (page - 1) * PAGE, k: PAGE };
  try {
    const { total, files } = await fetchJson("/api/files", { ...parameters, ...filters() }, { signal });
    if (!signal.aborted) showLibrary(index, files, total, shown);
  } catch (error) {
    if (!signal.aborted) showError(error);
  }
}

function showLibrary(index, files, total, shown) {
  end();
  const pages = Math.max(1, Math.ceil(total / PAGE));
  if (shown > pages) return turnTo(pages); // the library has shrunk
  const narrow = Object.values(filters()).some(Boolean);
  if (total || !narrow) showEmpty(`${plural(total, "video")} to search`, "Describe in a sentence what happens in them.");
  else showEmpty("No video passes the filters", "Clear them to see all.");
  $("library").hidden = false;
  showFacts(index);
  showHits($("results"), index.name, files, "", findSimilar, $("order").value === "folder");
  $("pager").hidden = pages === 1;
  $("page").textContent = `Page ${shown} of ${pages}`;
  $("back").setAttribute("aria-disabled", shown === 1);
  $("forth").setAttribute("aria-disabled", shown === pages);
}

function turnTo(number) {
  page = number;
  writeHash();
  browse();
  scrollTo(0, 0);
}

function turn(event) {
  if (event.currentTarget.getAttribute("aria-disabled") !== "true") turnTo(page + (event.currentTarget.id === "back" ? -1 : 1));
}

function showFacts(index) {
  const facts = {
    Folder: index.folder,
    Moments: index.moments > index.files ? index.moments.toLocaleString("en") : "",
    Captions: index.captions ? index.captions.toLocaleString("en") : "",
    Prompts: `${index.method}, ${plural(index.frames, "frame")} of each clip`,
    CLIP: index.clip,
  };
  const rows = Object.entries(facts).filter(([, value]) => value);
  $("facts").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

/** Folders that continue what is typed into the filter. */
async function suggestFolders() {
  const parameters = { index: $("index").value, prefix: $("folder").value.trim() };
  const folders = await fetchJson("/api/folders", parameters).catch(() => []);
  if (parameters.prefix !== $("folder").value.trim()) return; // more was typed meanwhile
  $("folders").replaceChildren(...folders.map((folder) => make("option", { value: folder })));
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
  $("index").addEventListener("change", () => {
    if (model) [model, again] = [null, browse]; // another index has other moments
    refine();
  });
  for (const name of FIELDS) $(name).addEventListener("change", () => (showFilters(), refine()));
  for (const event of ["focus", "input"]) $("folder").addEventListener(event, suggestFolders);
  $("order").addEventListener("change", () => turnTo(1));
  for (const id of ["back", "forth"]) $(id).addEventListener("click", turn);
  $("clear").addEventListener("click", () => {
    for (const name of FIELDS) $(name).value = "";
    showFilters();
    refine();
  });
  $("anyway").addEventListener("click", () => searchText(FIRST, "none"));
  $("retry").addEventListener("click", () => again());
  $("upload").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files.length) searchFile($("file").files[0]);
    $("file").value = ""; // the same file may be chosen again
  });
  window.addEventListener("popstate", () => (readHash(), run()));
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
  if (!indexes.length) return (end(), showEmpty("No index is served", "Start the server with --index=DIR."));
  if (location.hash) readHash(), run();
  else {
    browse(); // the text that was typed meanwhile stays
    $("query").focus({ preventScroll: true });
  }
}

listen();
start();
