// The list, its filters, the keys and the address of what is open.
const $ = (id) => document.getElementById(id);
const ROW = 62; // pixels, as the style has it
const LENGTHS = { "1 step": [1, 1], "2 steps": [2, 2], "3 to 4 steps": [3, 4], "5 or more": [5, 1e9] };
const FILTERS = {
  result: ["Result", (row) => [row.result]],
  stop: ["Ended", (row) => [row.stop]],
  tool: ["Tool", (row) => (row.tools.length ? row.tools : ["no tool"])],
  family: ["Family", (row) => [row.family]],
  length: ["Length", (row) => [Object.keys(LENGTHS).find((name) => row.steps >= LENGTHS[name][0] && row.steps <= LENGTHS[name][1]) ?? "no step"]],
  failure: ["Failure", (row) => (row.failures.length ? row.failures : ["none"])],
  verdict: ["Filter", (row) => (row.verdict ? [row.verdict] : [])],
  change: ["Against beside", (row) => (row.other ? [changeOf(row)] : [])],
};
const SORTS = {
  "in order": null, "most tokens": (row) => -row.tokens, "longest text": (row) => -row.chars,
  "most steps": (row) => -row.steps, slowest: (row) => -row.seconds, "worst score": (row) => row.score ?? -1,
};
const state = { runs: [], masked: false, run: 0, beside: -1, pinned: null, filters: {}, sort: "in order", query: "", found: null, rows: [], open: null, mask: false };
let asked = 0; // number of the newest request for a detail; older answers are dropped
let searched = 0; // the same of a search
let two = -1; // the run beside the first when the page is opened without an address

const changeOf = (row) => {
  const here = row.result === "correct", there = row.other.result === "correct";
  return here === there ? (here ? "both correct" : "neither correct") : here ? "only here correct" : "only beside correct";
};

function read(given) {
  state.masked = given.mask;
  state.runs = given.runs.map((run) => ({ ...run, rows: run.rows.map((values) => Object.fromEntries(run.columns.map((name, at) => [name, values[at]]))) }));
}

function join() {
  const beside = state.runs[state.beside];
  const byTask = new Map();
  for (const row of beside?.rows ?? []) if (!byTask.has(row.task)) byTask.set(row.task, row);
  for (const row of state.runs[state.run].rows) row.other = byTask.get(row.task);
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text]) => { const made = el("option", "", text); made.value = value; return made; }));
  select.value = chosen;
}

function showRuns() {
  options($("run"), state.runs.map((run, at) => [at, `${run.name} (${run.rows.length.toLocaleString("en-US")})`]), state.run);
  options($("beside"), [[-1, "nothing"], ...state.runs.map((run, at) => [at, run.name]).filter(([at]) => at !== state.run)], state.beside);
  const run = state.runs[state.run];
  $("state").textContent = run.open ? "still being written, or stopped" : "";
  $("problems").hidden = !run.problems.length;
  $("problems").replaceChildren(...(run.problems.length ? [el("details", "", el("summary", "", `${run.problems.length} line(s) could not be read`), run.problems.slice(0, 50).map((text) => el("p", "", text)))] : []));
}

function showFilters() {
  const boxes = [];
  for (const [key, [label, values]] of Object.entries(FILTERS)) {
    const counts = new Map();
    for (const row of state.runs[state.run].rows) for (const value of values(row)) counts.set(value, (counts.get(value) ?? 0) + 1);
    if (!counts.has(state.filters[key])) delete state.filters[key];
    if (counts.size < 2 && !(key in state.filters)) continue;
    const select = el("select", key in state.filters ? "set" : "");
    const names = [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) => [value, `${words(value) || "none"} (${count})`]);
    options(select, [["\u0000", `${label}: all`], ...names], state.filters[key] ?? "\u0000");
    select.setAttribute("aria-label", label);
    select.addEventListener("change", () => {
      if (select.value === "\u0000") delete state.filters[key]; else state.filters[key] = select.value;
      select.className = key in state.filters ? "set" : "";
      filter();
    });
    boxes.push(select);
  }
  const sort = el("select", "");
  options(sort, Object.keys(SORTS).map((name) => [name, `Sort: ${name}`]), state.sort);
  sort.setAttribute("aria-label", "Sort");
  sort.addEventListener("change", () => { state.sort = sort.value; filter(); });
  $("filters").replaceChildren(...boxes, sort);
}

function filter() {
  const chosen = Object.entries(state.filters);
  const all = state.runs[state.run].rows;
  state.rows = all.filter((row) => chosen.every(([key, value]) => FILTERS[key][1](row).includes(value)) && (!state.found || state.found.has(row.n)));
  const by = SORTS[state.sort];
  if (by) state.rows.sort((a, b) => by(a) - by(b) || a.n - b.n);
  const correct = state.rows.filter((row) => row.result === "correct").length;
  $("count").textContent = `${state.rows.length.toLocaleString("en-US")} of ${all.length.toLocaleString("en-US")}, ${correct.toLocaleString("en-US")} correct`;
  $("clear").hidden = !chosen.length && !state.query;
  draw();
  remember();
}

// Only the rows that can be seen are elements.
function draw() {
  const box = $("list"), top = Math.max(0, Math.floor(box.scrollTop / ROW) - 5), seen = Math.ceil(box.clientHeight / ROW) + 10;
  $("rows").style.height = `${state.rows.length * ROW}px`;
  $("rows").replaceChildren(...state.rows.slice(top, top + seen).map((row, at) => listRow(row, top + at)));
  const active = state.open ? document.getElementById(`row-${state.open.n}`) : null;
  if (active) box.setAttribute("aria-activedescendant", active.id); else box.removeAttribute("aria-activedescendant");
  if (!state.rows.length) $("rows").replaceChildren(el("p", "empty", state.runs[state.run].rows.length ? "Nothing matches. Esc clears the filters." : "No trajectory is finished yet."));
}

function listRow(row, at) {
  const mark = (result) => el("i", `mark ${RESULT_KINDS[result] || "none"}`);
  const facts = [words(row.family), row.stop === "final_answer" ? null : words(row.stop), `${row.steps} step${row.steps === 1 ? "" : "s"}`, `${row.tokens.toLocaleString("en-US")} tok`, row.tools.join(", "), row.sampled ? "sampled" : null, row.verdict && row.verdict !== "kept" ? row.verdict : null].filter(Boolean);
  const made = el("div", "row", mark(row.result), state.beside >= 0 ? (row.other ? mark(row.other.result) : el("i", "mark absent")) : null,
    el("div", "", el("div", "q", row.question || row.id), el("div", "f", facts.join(" \u00b7 "))));
  made.id = `row-${row.n}`;
  made.style.transform = `translateY(${at * ROW}px)`;
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", String(state.open?.n === row.n));
  made.setAttribute("aria-setsize", state.rows.length);
  made.setAttribute("aria-posinset", at + 1);
  made.setAttribute("aria-label", `${row.result}: ${visible(row.question || row.id)}`);
  made.addEventListener("click", () => open(row));
  return made;
}

function beside(row) {
  if (state.pinned) return [state.pinned.run, state.pinned.row];
  return state.beside >= 0 && row.other ? [state.beside, row.other] : null;
}

async function open(row, keepScroll = false) {
  state.open = row;
  draw();
  remember();
  const mine = ++asked, other = beside(row);
  const shown = other ? [[...other], [state.run, row]] : [[state.run, row]];
  if (other && !state.pinned) shown.reverse();
  try {
    const views = await Promise.all(shown.map(async ([run, item]) => trajectoryView(await store.trajectory(run, item.n), item, state.runs[run].name)));
    if (mine !== asked) return;
    $("detail").className = views.length > 1 ? "two" : "";
    $("detail").replaceChildren(...(state.beside >= 0 && !other ? [el("p", "note", `${state.runs[state.beside].name} has no trajectory of this task.`)] : []), ...views);
    if (!keepScroll) $("detail").scrollTop = 0;
    if (state.masked) await showMasks(views, shown, mine);
  } catch (error) {
    if (mine === asked) $("detail").replaceChildren(el("p", "note bad", `This trajectory cannot be shown: ${error.message}`));
  }
}

async function showMasks(views, shown, mine) {
  for (const [at, [run, item]] of shown.entries()) {
    const place = views[at].querySelector(".mask-place"), button = el("button", "", state.mask ? "Hide the tokens in the loss" : "Show the tokens in the loss");
    button.type = "button"; button.title = "m";
    button.addEventListener("click", toggleMask);
    const mask = state.mask ? maskView(await store.mask(run, item.n)) : null;
    if (mine === asked) place.replaceChildren(button, ...(mask ? [mask] : []));
  }
}

function toggleMask() { state.mask = !state.mask; if (state.open) open(state.open, true); }

function move(by) {
  if (!state.rows.length) return;
  const at = state.open ? state.rows.findIndex((row) => row.n === state.open.n) : -1;
  select(at < 0 ? (by < 0 ? state.rows.length - 1 : 0) : Math.min(state.rows.length - 1, Math.max(0, at + by)));
}

function select(at) {
  reveal(at);
  open(state.rows[at]);
}

function reveal(at) {
  const box = $("list");
  if (at * ROW < box.scrollTop) box.scrollTop = at * ROW;
  if ((at + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (at + 1) * ROW - box.clientHeight;
}

function moveStep(by) {
  const box = $("detail"), tops = [...box.querySelectorAll(".trajectory:first-of-type .step")].map((step) => step.offsetTop - box.offsetTop - 8);
  const next = by > 0 ? tops.find((top) => top > box.scrollTop + 4) : tops.reverse().find((top) => top < box.scrollTop - 4) ?? 0;
  if (next !== undefined) box.scrollTo({ top: next });
}

async function search(text) {
  state.query = text;
  const mine = ++searched;
  const found = text.trim() ? new Set(await store.search(state.run, text.trim(), state.runs[state.run].rows.length)) : null;
  if (mine !== searched) return;
  state.found = found;
  filter();
}

async function choose(run) {
  state.run = run;
  if (state.beside === run) state.beside = -1;
  const task = state.open?.task;
  join(); showRuns(); showFilters();
  await search(state.query);
  const same = state.rows.find((row) => row.task === task);
  state.open = null;
  if (same) select(state.rows.indexOf(same));
  else if (state.rows.length) select(0);
  else $("detail").replaceChildren(el("p", "note", "Nothing to show here."));
}

// The address says what is open, so that it can be sent to someone or come back to.
function remember() {
  const said = new URLSearchParams();
  said.set("run", state.runs[state.run].name);
  if (state.beside >= 0) said.set("beside", state.runs[state.beside].name);
  if (state.open) said.set("id", state.open.id);
  if (state.query) said.set("q", state.query);
  if (state.sort !== "in order") said.set("sort", state.sort);
  if (state.mask) said.set("mask", "1");
  for (const [key, value] of Object.entries(state.filters)) said.set(`f.${key}`, value);
  history.replaceState(null, "", `#${said}`);
}

async function restore() {
  const said = new URLSearchParams(location.hash.slice(1));
  const named = (key) => state.runs.findIndex((run) => run.name === said.get(key));
  state.run = Math.max(0, named("run"));
  state.beside = said.has("beside") ? named("beside") : two;
  two = -1;
  state.filters = Object.fromEntries([...said].filter(([key]) => key.startsWith("f.") && key.slice(2) in FILTERS).map(([key, value]) => [key.slice(2), value]));
  state.sort = said.get("sort") in SORTS ? said.get("sort") : "in order";
  state.mask = said.get("mask") === "1";
  $("search").value = said.get("q") ?? "";
  join(); showRuns(); showFilters();
  const wanted = said.get("id");
  state.open = null;
  await search($("search").value);
  const at = state.rows.findIndex((row) => row.id === wanted);
  if (at >= 0) select(at);
  else if (wanted) $("detail").replaceChildren(el("p", "note bad", `There is no trajectory ${wanted} in ${state.runs[state.run].name}.`));
  else if (state.rows.length) select(0);
}

async function reload() {
  if (!store.live) return;
  read(await store.runs());
  $("state").replaceChildren();
  join(); showRuns(); showFilters();
  await search(state.query);
  const at = state.rows.findIndex((row) => row.id === state.open?.id);
  if (at >= 0) state.open = state.rows[at];
  draw();
}

async function watch() {
  try {
    const now = await store.state();
    const fresh = now.reduce((sum, [count], at) => sum + Math.max(0, count - state.runs[at].rows.length), 0);
    if (fresh) {
      const button = el("button", "fresh", `${fresh} new: load (r)`);
      button.type = "button";
      button.addEventListener("click", reload);
      $("state").replaceChildren(button);
    }
  } catch {
    $("state").textContent = "The viewer has been stopped; what is loaded stays.";
  }
  setTimeout(watch, 3000);
}

function theme(next) {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = next ?? (dark ? "light" : "dark");
  try { localStorage.setItem("agentkd-theme", document.documentElement.dataset.theme); } catch { /* a page without storage forgets it */ }
}

function pin() {
  if (!state.open) return;
  state.pinned = state.pinned ? null : { run: state.run, row: state.open };
  open(state.open, true);
}

function clear() {
  state.filters = {};
  $("search").value = "";
  showFilters();
  search("");
}

const KEYS = {
  j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1), g: () => state.rows.length && select(0), G: () => state.rows.length && select(state.rows.length - 1),
  Enter: () => $("detail").focus(), n: () => moveStep(1), p: () => moveStep(-1), b: pin, m: () => state.masked && toggleMask(), r: reload, t: () => theme(),
  "/": () => { $("search").focus(); $("search").select(); }, "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Escape") {
    if (document.activeElement === $("list")) clear();
    $("list").focus();
    event.preventDefault();
    return;
  }
  if (typing) {
    if (event.target === $("search") && event.key === "Enter") { $("list").focus(); event.preventDefault(); }
    return;
  }
  const inside = $("detail").contains(document.activeElement);
  if (inside && ["ArrowDown", "ArrowUp", "Enter"].includes(event.key)) return; // they scroll, and open what is folded
  if (event.target.matches("button, summary") && event.key === "Enter") return;
  if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
});

async function start() {
  try { const known = localStorage.getItem("agentkd-theme"); if (known) theme(known); } catch { /* none */ }
  read(await store.runs());
  if (new URLSearchParams(location.search).has("two") && state.runs.length > 1) two = 1;
  $("list").addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);
  addEventListener("hashchange", restore);
  let timer = 0;
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => search($("search").value), 120); });
  $("run").addEventListener("change", () => choose(Number($("run").value)));
  $("beside").addEventListener("change", () => { state.beside = Number($("beside").value); state.pinned = null; join(); showRuns(); showFilters(); filter(); if (state.open) open(state.open); });
  $("clear").addEventListener("click", clear);
  $("theme").addEventListener("click", () => theme());
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("list").focus();
  await restore();
  document.documentElement.dataset.ready = "1";
  if (store.live) setTimeout(watch, 3000);
}
start().catch((error) => { $("detail").replaceChildren(el("p", "note bad", `The page cannot be shown: ${error.message}`)); });
