"use strict";
// The page's only script. Data is set as text (textContent, properties), never as markup: texts are not ours.

const FILTERS = ["split", "corpus", "signer", "language"];
const SPEEDS = [1, 0.5, 0.25];
const PER_PAGE = 50;
const TYPING_MILLISECONDS = 200;
const numbers = new Intl.NumberFormat("en");
const state = { q: "", split: "", corpus: "", signer: "", language: "", sort: "", page: 1, sample: null };
const view = { summary: null, rows: [], pages: 1, request: 0, detailRequest: 0, speed: 0, loop: true };
const el = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(node.dataset, value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

async function ask(path) {
  const response = await fetch(path);
  const values = await response.json();
  if (!response.ok) throw new Error(values.error || response.statusText);
  return values;
}

// -- state and URL ---------------------------------------------------------------------------------------------------
function readUrl() {
  const query = new URLSearchParams(location.search);
  for (const name of ["q", "sort", ...FILTERS]) state[name] = query.get(name) || "";
  state.page = Math.max(1, Number.parseInt(query.get("page") || "1", 10) || 1);
  const sample = query.get("sample");
  state.sample = sample !== null && /^\d{1,12}$/.test(sample) ? Number(sample) : null;
}

function listQuery() {
  const query = new URLSearchParams();
  for (const name of ["q", "sort", ...FILTERS]) if (state[name]) query.set(name, state[name]);
  if (state.page > 1) query.set("page", state.page);
  return query;
}

function writeUrl(push) {
  const query = listQuery();
  if (state.sample !== null) query.set("sample", state.sample);
  const text = query.toString();
  const url = text ? `?${text}` : location.pathname;
  if (push) history.pushState(null, "", url);
  else history.replaceState(null, "", url);
}

// -- head and filters ------------------------------------------------------------------------------------------------
function size(bytes) {
  for (const [factor, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (bytes >= factor) return `${(bytes / factor).toFixed(1)} ${unit}`;
  }
  return `${bytes} B`;
}

function duration(seconds) {
  if (seconds >= 3600) return `${(seconds / 3600).toFixed(1)} h`;
  if (seconds >= 60) return `${(seconds / 60).toFixed(1)} min`;
  return `${seconds.toFixed(1)} s`;
}

function showSummary() {
  const set = view.summary;
  const name = set.location.replace(/\/+$/, "").split("/").slice(-2).join("/");
  document.title = `${name} – shard set`;
  el("location").textContent = set.location;
  el("location").title = set.location;
  const amount = set.kind === "text" ? `${numbers.format(set.tokens)} tokens` : duration(set.seconds);
  el("summary").textContent = [
    `${set.kind} set`, `${numbers.format(set.samples)} samples`, amount, `${numbers.format(set.shards)} shards`, size(set.bytes),
  ].join(" · ");
  el("rows").classList.toggle("text", set.kind !== "video");
  for (const filter of FILTERS) fillChoices(filter, set.choices[filter]);
}

function fillChoices(name, choices) {
  const select = el(name);
  select.replaceChildren(make("option", { value: "", textContent: `All ${{ split: "splits", corpus: "corpora", signer: "signers", language: "languages" }[name]}` }));
  for (const { value, samples } of choices.common) {
    select.append(make("option", { value, textContent: `${value} (${numbers.format(samples)})` }));
  }
  if (choices.all > choices.common.length) {
    select.append(make("option", { disabled: true, textContent: `${numbers.format(choices.all - choices.common.length)} more: use the search` }));
  }
  select.parentElement.hidden = choices.all < 2 && !state[name];
}

function showFilters() {
  if (el("q").value !== state.q && document.activeElement !== el("q")) el("q").value = state.q;
  for (const name of FILTERS) {
    const select = el(name);
    if (state[name] && ![...select.options].some((option) => option.value === state[name])) {
      select.append(make("option", { value: state[name], textContent: state[name] }));
    }
    select.value = state[name];
    select.classList.toggle("set", Boolean(state[name]));
  }
  el("sort").value = state.sort;
  el("sort").classList.toggle("set", Boolean(state.sort));
  el("clear").hidden = !(state.q || FILTERS.some((name) => state[name]));
}

function change(values) {
  Object.assign(state, { page: 1 }, values);
  writeUrl(true);
  showFilters();
  return showList();
}

function clearFilters() {
  el("q").value = "";
  return change({ q: "", split: "", corpus: "", signer: "", language: "" });
}

// -- list ------------------------------------------------------------------------------------------------------------
const thumbnails = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !target.firstChild) {
      const src = `video/${target.dataset.number}#t=${(Number(target.dataset.seconds) / 2).toFixed(2)}`;
      target.append(make("video", { src, muted: true, preload: "metadata", playsInline: true, tabIndex: -1 }));
    } else if (!isIntersecting && target.firstChild) {
      target.firstChild.removeAttribute("src"); // a browser keeps only so many players
      target.firstChild.load();
      target.replaceChildren();
    }
  }
}, { rootMargin: "120px" });

async function showList() {
  const request = ++view.request;
  const query = listQuery();
  query.set("per_page", PER_PAGE);
  let result;
  try {
    result = await ask(`api/samples?${query}`);
  } catch (error) {
    if (request === view.request) el("matching").textContent = error.message;
    return;
  }
  if (request !== view.request) return; // a later search has been asked meanwhile
  Object.assign(view, { rows: result.rows, pages: result.pages });
  state.page = result.page;
  const first = (result.page - 1) * result.per_page;
  el("matching").textContent = result.matching === view.summary.samples
    ? `${numbers.format(result.matching)} samples`
    : `${numbers.format(result.matching)} of ${numbers.format(view.summary.samples)} samples`;
  if (result.pages > 1) el("matching").textContent += `, ${numbers.format(first + 1)}–${numbers.format(first + result.rows.length)} shown`;
  el("pager").hidden = result.pages < 2;
  el("page").value = result.page;
  el("pages").textContent = `of ${numbers.format(result.pages)}`;
  el("previous").disabled = result.page <= 1;
  el("next").disabled = result.page >= result.pages;
  el("empty").hidden = result.rows.length > 0;
  thumbnails.disconnect();
  el("rows").replaceChildren(...result.rows.map(listRow));
  el("rows").scrollTop = 0;
  markChosen(false);
}

function listRow(row) {
  const item = make("li", { tabIndex: -1, data: { number: row.number } });
  if (view.summary.kind === "video") {
    const picture = make("div", { className: "picture", data: { number: row.number, seconds: row.duration_seconds } });
    thumbnails.observe(picture);
    item.append(picture);
  }
  const second = [row.gloss, row.sample_id].filter(Boolean).join(" · ");
  item.append(
    make("div", { className: "words" },
      make("p", { textContent: row.text, lang: row.language, dir: "auto" }),
      make("p", { className: "second", textContent: second, title: second })),
    make("div", { className: "facts" },
      make("div", {}, splitName(row.split)),
      make("div", { textContent: [row.signer, lengthOf(row)].filter(Boolean).join(" · ") })));
  item.addEventListener("click", () => choose(row.number));
  return item;
}

function splitName(split) {
  return make("span", { className: "split", textContent: split, data: { split } });
}

function lengthOf(row) {
  return row.frames > 0 ? `${row.duration_seconds.toFixed(2)} s` : `${numbers.format(row.tokens)} tokens`;
}

function markChosen(scroll) {
  for (const item of el("rows").children) {
    const chosen = Number(item.dataset.number) === state.sample;
    if (chosen) {
      item.setAttribute("aria-current", "true");
      if (scroll) item.scrollIntoView({ block: "nearest" });
    } else item.removeAttribute("aria-current");
  }
}

// -- one sample ------------------------------------------------------------------------------------------------------
function choose(number, push = true) {
  state.sample = number;
  writeUrl(push);
  markChosen(true);
  return showSample();
}

async function showSample() {
  const request = ++view.detailRequest;
  document.body.classList.toggle("open", state.sample !== null);
  el("nothing").hidden = state.sample !== null;
  if (state.sample === null) {
    el("sample").hidden = true;
    el("sample").replaceChildren();
    return;
  }
  let detail;
  try {
    detail = await ask(`api/samples/${state.sample}`);
  } catch (error) {
    if (request !== view.detailRequest) return;
    el("sample").hidden = false;
    el("sample").replaceChildren(head(`Sample ${state.sample}`), make("p", { className: "failure", textContent: error.message }));
    return;
  }
  if (request !== view.detailRequest) return;
  const row = detail.row;
  const shown = [head(row.sample_id)];
  if (detail.media_type) shown.push(...player(detail));
  shown.push(make("p", { className: row.text.length > 240 ? "said long" : "said", textContent: row.text, lang: row.language, dir: "auto" }));
  if (row.gloss) shown.push(make("p", { className: "gloss", textContent: row.gloss, dir: "auto" }));
  shown.push(...tokens(detail), ...facts(detail), ...meta(detail));
  el("sample").replaceChildren(...shown);
  el("sample").hidden = false;
  el("detail").scrollTop = 0;
}

function head(title) {
  const back = make("button", { id: "back", type: "button", textContent: "‹ List" });
  back.addEventListener("click", () => choose(null));
  const copy = make("button", { type: "button", textContent: "Copy link" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href);
    copy.textContent = "Copied";
  });
  return make("div", { className: "top" }, back, make("h2", { textContent: title, title }), copy);
}

function player(detail) {
  const { row, number } = detail;
  const video = make("video", { id: "player", src: `video/${number}`, controls: true, muted: true, loop: view.loop, playsInline: true, preload: "auto" });
  video.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  video.playbackRate = video.defaultPlaybackRate = SPEEDS[view.speed];
  const clock = make("span", { className: "clock" });
  const tick = () => { clock.textContent = `frame ${Math.min(row.frames, Math.floor(video.currentTime * row.fps + 0.01) + 1)} of ${row.frames}`; };
  const failure = make("p", { className: "failure", hidden: true });
  video.addEventListener("error", () => {
    failure.hidden = false;
    failure.textContent = `This browser cannot play the video (${detail.media_type}${video.error ? `: ${video.error.message}` : ""}).`;
  });
  for (const event of ["timeupdate", "seeked", "loadedmetadata"]) video.addEventListener(event, tick);
  tick();
  const loop = toggle("Loop", view.loop, (on) => { view.loop = video.loop = on; });
  const speed = make("button", { id: "speed", type: "button", title: "Speed (s)", textContent: `${SPEEDS[view.speed]}×` });
  speed.addEventListener("click", nextSpeed);
  const back = make("button", { type: "button", textContent: "‹ frame", title: "One frame back (,)" });
  const on = make("button", { type: "button", textContent: "frame ›", title: "One frame forward (.)" });
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));
  video.dataset.fps = row.fps;
  return [make("div", { id: "stage" }, video), make("div", { className: "controls" }, back, on, speed, loop, clock), failure];
}

function toggle(text, pressed, changed) {
  const button = make("button", { type: "button", textContent: text, "aria-pressed": String(pressed) });
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    changed(on);
  });
  return button;
}

function nextSpeed() {
  view.speed = (view.speed + 1) % SPEEDS.length;
  const video = el("player");
  if (!video) return;
  video.playbackRate = SPEEDS[view.speed];
  el("speed").textContent = `${SPEEDS[view.speed]}×`;
}

function step(frames) {
  const video = el("player");
  if (!video) return;
  const fps = Number(video.dataset.fps) || 25;
  video.pause();
  const frame = Math.floor(video.currentTime * fps + 0.01) + frames;
  video.currentTime = Math.max(0, (frame + 0.5) / fps); // the middle of a frame is never rounded to its neighbour
}

function facts(detail) {
  const { row } = detail;
  const rate = row.duration_seconds > 0 ? row.text.length / row.duration_seconds : 0;
  const video = row.frames > 0;
  const entries = [
    ["Split", splitName(row.split)],
    ["Corpus", row.corpus],
    ["Signer", row.signer],
    ["Language", [row.language, row.sign_language].filter(Boolean).join(" / ")],
    ["Duration", video ? `${row.duration_seconds.toFixed(2)} s` : ""],
    ["Frames", video ? `${row.frames} at ${row.fps} fps` : ""],
    ["Size", row.width && row.height ? `${row.width} × ${row.height}` : ""],
    ["Words", numbers.format(detail.words)],
    ["Speed", video ? `${rate.toFixed(1)} characters/s` : ""],
    ["Stored", size(row.size)],
    ["Checksum", make("span", { className: detail.checksum_ok ? "good" : "bad", textContent: detail.checksum_ok ? "✓ matches" : "✗ bytes were changed" })],
    ["Sample", `${numbers.format(detail.number)} in shard order`],
    ["Where", make("span", { className: "mono", textContent: `${row.shard} : ${row.key} @ ${row.offset}+${row.size}` }), "wide"],
  ];
  const shown = entries.filter(([, value]) => value !== "");
  return [
    make("h3", { textContent: "Sample" }),
    make("dl", { className: "facts-list" }, ...shown.map(([name, value, wide]) =>
      make("div", { className: wide || "" }, make("dt", { textContent: name }), make("dd", {}, value)))),
  ];
}

function tokens(detail) {
  if (!detail.tokens) return [];
  const { stored, total, tokens: list } = detail.tokens;
  const count = `${numbers.format(total)} tokens${stored ? ", as stored" : ` of ${view.summary.tokenizer}`}`;
  const more = total > list.length ? `, the first ${numbers.format(list.length)} shown` : "";
  return [
    make("h3", { textContent: count + more }),
    make("div", { id: "tokens", className: "pieces" }, ...list.map(({ id, piece, kind }) =>
      make("span", { className: `piece ${kind}`, title: kind === "plain" ? `id ${id}` : `${kind}, id ${id}` },
        piece === null ? null : make("b", { textContent: piece }), make("i", { textContent: id })))),
  ];
}

function meta(detail) {
  if (detail.meta === null) return [];
  const text = typeof detail.meta === "string" ? detail.meta : JSON.stringify(detail.meta, null, 2);
  return [make("details", {}, make("summary", { textContent: "Metadata member" }), make("pre", { className: "mono", textContent: text }))];
}

// -- keyboard, theme, start ------------------------------------------------------------------------------------------
async function turnPage(by) {
  const page = state.page + by;
  if (page < 1 || page > view.pages) return false;
  state.page = page;
  writeUrl(true);
  await showList();
  return true;
}

async function move(by) {
  let place = view.rows.findIndex((row) => row.number === state.sample);
  place = place < 0 ? (by > 0 ? 0 : view.rows.length - 1) : place + by;
  if (place < 0 || place >= view.rows.length) {
    if (!(await turnPage(by))) return;
    place = by > 0 ? 0 : view.rows.length - 1;
  }
  if (view.rows[place]) await choose(view.rows[place].number, false);
}

function playPause() {
  const video = el("player");
  if (!video) return;
  if (video.paused) video.play();
  else video.pause();
}

const KEYS = {
  ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), k: () => move(-1),
  n: () => turnPage(1), p: () => turnPage(-1), " ": playPause, ",": () => step(-1), ".": () => step(1),
  s: nextSpeed, t: () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true),
  "/": () => { el("q").focus(); el("q").select(); }, "?": () => el("help").showModal(), Escape: () => choose(null),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || el("help").open) return;
  const target = event.target;
  if (target.matches("input, select, textarea")) {
    if (event.key === "Escape") target.blur();
    return;
  }
  if (event.key === " " && target.matches("button, summary, video")) return;
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function setTheme(theme, keep) {
  document.documentElement.dataset.theme = theme;
  if (keep) localStorage.setItem("theme", theme);
}

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const kept = localStorage.getItem("theme");
  setTheme(kept === "dark" || kept === "light" ? kept : dark.matches ? "dark" : "light", false);
  dark.addEventListener("change", () => { if (!localStorage.getItem("theme")) setTheme(dark.matches ? "dark" : "light", false); });
}

function listen() {
  let typing = 0;
  el("q").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ q: el("q").value.trim() }), TYPING_MILLISECONDS);
  });
  el("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const name of [...FILTERS, "sort"]) el(name).addEventListener("change", () => change({ [name]: el(name).value }));
  for (const id of ["clear", "empty-clear"]) el(id).addEventListener("click", clearFilters);
  el("previous").addEventListener("click", () => turnPage(-1));
  el("next").addEventListener("click", () => turnPage(1));
  el("page").addEventListener("change", () => turnPage((Number.parseInt(el("page").value, 10) || state.page) - state.page));
  el("help-button").addEventListener("click", KEYS["?"]);
  el("theme-button").addEventListener("click", KEYS.t);
  document.addEventListener("keydown", onKey);
  window.addEventListener("popstate", () => { readUrl(); showFilters(); showList(); showSample(); });
}

async function start() {
  startTheme();
  readUrl();
  listen();
  try {
    view.summary = await ask("api/summary");
  } catch (error) {
    el("matching").textContent = error.message;
    return;
  }
  showSummary();
  showFilters();
  await Promise.all([showList(), showSample()]);
  markChosen(true);
}

start();
