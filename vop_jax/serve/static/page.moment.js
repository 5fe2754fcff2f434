// An open result: the video at its moment and, below it, the score of each frame over time.

import { fetchJson, breakable, clock, day, make, media, score, span } from "./page.fetch.js";

const STEPS = 200; // of the slider, along the clip
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/**
 * {node, close}: a panel for a hit. `leave` is called where the user closes it, and `similar` with
 * the moment whose like is to be found.
 */
export function openMoment(index, hit, query, leave, similar) {
  const address = media(index, hit);
  const name = hit.name.split("/").pop();
  const screen = make("div", { class: "screen" });
  // Its height is reserved, so that the page below does not jump.
  const below = make("div", { class: query ? "below scored" : "below" });
  const replay = make("button", { type: "button", class: "primary" }, "Play the moment");
  const download = make("a", { href: address, download: name }, "Download");
  const like = make("button", { type: "button", onclick: () => similar(moment) }, "Find similar");
  const steps = ["Previous", "Next"].map((text) =>
    make("button", { type: "button", "aria-label": `${text} moment`, hidden: true }, text));
  const facts = make("p", {});
  const shut = make("button", { type: "button", class: "close", "aria-label": "Close", onclick: leave }, "×");
  const about = make(
    "div",
    { class: "about" },
    make("div", {}, make("h2", {}, ...breakable(hit.name)), facts),
    make("div", { class: "buttons" }, ...steps, replay, like, download),
    shut,
  );
  const node = make("li", { class: "moment", "aria-label": hit.name }, about, screen, below);
  let moment = hit;
  let stop = () => {};
  const show = (shown) => {
    stop();
    moment = shown;
    const gone = new AbortController(); // aborts the requests of the moment
    const panel = { hit: shown, index, query, address, screen, below, replay, download, signal: gone.signal };
    const scored = shown.score === undefined ? [] : [`score ${score(shown.score)}`];
    facts.textContent = [span(shown), ...scored, `changed ${day(hit.modified)}`].join(" · ");
    for (const part of [screen, below]) part.replaceChildren();
    offerSteps(panel, steps, show);
    const absent = "This file was moved or deleted since it was indexed.";
    const video = hit.missing ? showMessage(panel, absent, false) : play(panel);
    stop = () => {
      gone.abort();
      video?.pause();
      video?.removeAttribute("src"); // else it continues loading
      video?.load();
    };
  };
  show(hit);
  return { node, close: () => (stop(), node.remove()) };
}

/** Buttons to the moments before and after; hidden where the file has only its whole clip. */
async function offerSteps({ hit, index, signal }, steps, show) {
  const { file_id, start, end } = hit;
  let around;
  try {
    around = await fetchJson("/api/neighbours", { index, file_id, start, end }, { signal });
  } catch {
    return; // the index has changed, or the panel is closed
  }
  for (const [i, moment] of [around.previous, around.next].entries()) {
    steps[i].hidden = !around.count;
    steps[i].setAttribute("aria-disabled", !moment); // `disabled` would lose the focus
    steps[i].onclick = () => moment && show({ ...hit, ...moment, score: undefined });
  }
}

function play(panel) {
  const { hit, address, screen, replay, signal } = panel;
  const video = make("video", {
    src: `${address}#t=${hit.start.toFixed(3)},${hit.end.toFixed(3)}`,
    controls: true,
    playsinline: true,
    preload: "auto",
    "aria-label": hit.name,
  });
  screen.append(video);
  const start = () => video.play().catch(() => {}); // a browser may forbid it; the button remains
  if (!calm.matches) start();
  replay.onclick = () => {
    video.currentTime = hit.start;
    start();
  };
  video.addEventListener("loadedmetadata", () => {
    if (!video.videoWidth) return cannotPlay(panel);
    if (panel.query) drawScores(panel, video);
  }, { signal });
  video.addEventListener("error", () => cannotPlay(panel), { signal });
  return video;
}

/** Asks the server whether the file is gone or its codec is unknown to the browser. */
async function cannotPlay(panel) {
  const { address, query, signal } = panel;
  try {
    const response = await fetch(address, { headers: { Range: "bytes=0-0" }, signal });
    if (response.ok) showMessage(panel, "This browser cannot play this file. Download it to play it elsewhere.", true);
    else showMessage(panel, (await response.json()).error, false);
    if (response.ok && query) drawScores(panel, null);
  } catch (error) {
    if (!signal.aborted) showMessage(panel, "The server does not answer.", false);
  }
}

function showMessage({ screen, replay, download }, text, downloadable) {
  screen.replaceChildren(make("p", { role: "alert" }, text));
  replay.hidden = true;
  download.hidden = !downloadable;
  if (downloadable) download.classList.add("primary");
}

/** Scores of the moment's frames; if it is a part of a clip, coarser ones of the rest, too. */
async function scores({ hit, index, query, signal }, duration) {
  const of = async (start, end) => {
    const { seconds, scores } = await fetchJson(
      "/api/explain",
      { index, q: query, file_id: hit.file_id, start, end },
      { signal },
    );
    return seconds.map((time, i) => ({ time, score: scores[i] }));
  };
  const inside = ({ time }) => time >= hit.start && time < hit.end;
  const whole = hit.end - hit.start > 0.9 * duration;
  const [near, far] = await Promise.all([of(hit.start, hit.end), whole ? [] : of(0, duration)]);
  return [...near, ...far.filter((frame) => !inside(frame))].sort((a, b) => a.time - b.time);
}

async function drawScores(panel, video) {
  const { hit, below, signal } = panel;
  const duration = video && Number.isFinite(video.duration) ? video.duration : hit.end;
  below.replaceChildren(make("p", { class: "reading" }, "Scores of the frames…"));
  let frames;
  try {
    frames = await scores(panel, duration);
  } catch (error) {
    if (!signal.aborted) below.replaceChildren(make("p", { class: "reading" }, error.message));
    return;
  }
  if (signal.aborted || !frames.length) return;
  const slider = make("input", {
    type: "range", min: 0, max: duration, step: duration / STEPS, value: video ? video.currentTime : hit.start,
    "aria-label": "Time in the clip; above it the score of each frame", disabled: !video,
  });
  const now = make("output", {});
  const best = frames.reduce((a, b) => (b.score > a.score ? b : a));
  const toBest = make("button", { type: "button", disabled: !video, onclick: () => (video.currentTime = best.time) },
    `Best ${score(best.score)} at ${clock(best.time)}`);
  const lowest = Math.min(...frames.map((frame) => frame.score));
  const range = make("span", { class: "range" }, `Frames score ${score(lowest)} to ${score(best.score)}`);
  const chart = make("div", { class: "chart" }, bars(frames, best, hit, duration), slider);
  below.replaceChildren(chart, make("p", { class: "reading" }, now, range, toBest));
  follow(video, slider, (time) => {
    const score_ = score(frameAt(frames, time).score);
    now.textContent = `${clock(time)} · score ${score_}`;
    slider.setAttribute("aria-valuetext", `${clock(time)}, score ${score_}`);
  }, signal);
}

const frameAt = (frames, time) =>
  frames.reduce((a, b) => (Math.abs(b.time - time) < Math.abs(a.time - time) ? b : a));

/** A bar for each frame, to the middle between it and the next, from below the lowest score. */
function bars(frames, best, hit, duration) {
  const values = frames.map((frame) => frame.score);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const height = (value) => (high > low ? 0.12 + (0.88 * (value - low)) / (high - low) : 1);
  const edge = (i) =>
    i <= 0 ? 0 : i >= frames.length ? duration : (frames[i - 1].time + frames[i].time) / 2;
  const rect = (x, width, tall, kind) =>
    make("rect", { x, y: 1 - tall, width: Math.max(0, width), height: tall, class: kind });
  const svg = make("svg", { viewBox: `0 0 ${duration} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  if (hit.end - hit.start < 0.9 * duration) svg.append(rect(hit.start, hit.end - hit.start, 1, "found"));
  frames.forEach((frame, i) => {
    const gap = Math.min((edge(i + 1) - edge(i)) * 0.12, duration / 250);
    svg.append(rect(edge(i) + gap / 2, edge(i + 1) - edge(i) - gap, height(frame.score), frame === best ? "best" : "bar"));
  });
  return svg;
}

/** The slider follows the video, and the video the slider. */
function follow(video, slider, onTime, signal) {
  if (!video) return onTime(Number(slider.value));
  const update = () => {
    slider.value = video.currentTime;
    onTime(video.currentTime);
  };
  const run = () => {
    if (signal.aborted) return;
    update();
    if (!video.paused) requestAnimationFrame(run); // "timeupdate" comes four times a second
  };
  for (const event of ["play", "seeked", "pause"]) video.addEventListener(event, run, { signal });
  slider.addEventListener("input", () => {
    video.currentTime = Number(slider.value);
    onTime(video.currentTime);
  });
  run();
}
