// The chat page. All that a model has written goes into the document as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const IDEAS = ["What is 23 times 19?", "How many primes are there below 200?", "What is the sum of the first 50 odd numbers?"];
const turns = []; // what was said so far: {role, content}
let running = null; // the AbortController of the answer that is coming
let token = sessionStorage.getItem("agentkd-token") || "";

/** An element with a class, text and children. */
function make(tag, className = "", text = null, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== null) element.textContent = text;
  element.append(...children);
  return element;
}

const PYTHON = /(#[^\n]*)|("""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|\b(False|None|True|and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield)\b|\b(\d[\w.]*)/g;

/** Python in colours. */
function code(text, className = "code") {
  const block = make("pre", className);
  let at = 0;
  for (const found of text.matchAll(PYTHON)) {
    block.append(text.slice(at, found.index));
    const kind = ["c", "s", "k", "n"].find((_, number) => found[number + 1] !== undefined);
    block.append(make("span", kind, found[0]));
    at = found.index + found[0].length;
  }
  block.append(text.slice(at));
  return block;
}

function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(path, { ...options, headers, cache: "no-store" });
}

/** What an answer with an error status says. */
async function problem(answer) {
  let words = `The server answered ${answer.status}.`;
  try { words = (await answer.json()).error.message; } catch { /* no JSON: the status will do */ }
  const wait = answer.status === 429 && answer.headers.get("Retry-After");
  return wait ? `${words} Try again in ${wait} s.` : words;
}

async function loadModels() {
  let answer;
  try { answer = await request("v1/models"); } catch { return say("The server cannot be reached."); }
  if (answer.status === 401) return askToken(token ? "This token is not known here." : "");
  if (!answer.ok) return say(await problem(answer));
  const { data } = await answer.json();
  const chosen = $("model").value || sessionStorage.getItem("agentkd-model");
  $("model").replaceChildren(...data.map((model) => {
    const option = make("option", "", model.id);
    option.title = model.owned_by;
    return option;
  }));
  const best = data.find((model) => model.id === chosen) || data.find((model) => isAgent(model.id)) || data[0];
  if (best) $("model").value = best.id;
  say("");
  showOptions();
}

const isAgent = (model) => model.endsWith("-agent");
function showOptions() {
  sessionStorage.setItem("agentkd-model", $("model").value);
  $("actions-field").hidden = !isAgent($("model").value);
}

function say(words) {
  $("status").textContent = words;
  $("status").classList.toggle("hidden", !words);
}

function askToken(words) {
  $("token-problem").textContent = words;
  $("token").value = "";
  if (!$("token-dialog").open) $("token-dialog").showModal();
}

/** The events of a streamed answer. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return void (yield null);
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

/** An answer while it comes: steps, then what was said. */
class Answer {
  constructor(model) {
    this.steps = new Map();
    this.content = "";
    this.began = performance.now();
    this.cost = make("span", "cost");
    this.waiting = make("p", "waiting", "Thinking");
    this.box = make("article", isAgent(model) ? "theirs" : "theirs plain", null,
      make("div", "who", null, make("span", "", model), this.cost), this.waiting);
    this.box.setAttribute("aria-busy", "true");
  }

  step(event) {
    const fresh = drawStep(event);
    const old = this.steps.get(event.number);
    if (old) {
      for (const [index, part] of [...fresh.querySelectorAll("details")].entries()) {
        part.open = old.querySelectorAll("details")[index]?.open || false;
      }
      old.replaceWith(fresh);
    } else this.waiting.before(fresh);
    this.steps.set(event.number, fresh);
    this.waiting.textContent = event.state === "acting" ? "Running the code" : "Thinking";
    if (event.is_final) this.waiting.textContent = "Answering";
  }

  text(piece) {
    if (!piece) return;
    this.content += piece;
    if (!this.answer) this.waiting.before(this.answer = make("p", "answer"));
    this.answer.append(piece);
  }

  end(reason) {
    const why = { length: "It came to no answer within its limits.", stop: "It answered with nothing." }[reason];
    if (why && !this.content) this.waiting.before(make("p", "answer none", why));
  }

  fail(words) { this.waiting.before(make("p", "fault", words)); }

  close(usage) {
    this.waiting.remove();
    this.box.removeAttribute("aria-busy");
    for (const step of this.steps.values()) step.classList.remove("acting");
    const parts = [`${((performance.now() - this.began) / 1000).toFixed(1)} s`];
    if (this.steps.size) parts.unshift(`${this.steps.size} step${this.steps.size === 1 ? "" : "s"}`);
    if (usage) parts.push(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`);
    this.cost.textContent = parts.join(", ");
  }
}

function drawStep(event) {
  const times = [`model ${event.model_seconds.toFixed(1)} s`];
  if (event.state === "done" && event.code !== null) times.push(`code ${event.code_seconds.toFixed(2)} s`);
  if (event.usage?.output_tokens) times.push(`${event.usage.output_tokens} tokens`);
  const title = make("h3", "", null, make("span", "", `Step ${event.number}`), make("small", "", times.join(", ")));
  const step = make("section", "step", null, title);
  if (event.state === "acting") step.classList.add("acting");
  if (event.failure) step.classList.add("failed");
  if (event.is_final) step.classList.add("final");
  if (event.thought) step.append(make("p", "thought", event.thought));
  if (event.code !== null) step.append(make("p", "label", "Code"), code(event.code));
  if (event.candidates.length > 1) step.append(...drawVotes(event.candidates));
  if (event.tool_uses.length) step.append(make("div", "tools", null, ...event.tool_uses.map(drawTool)));
  if (event.failure && !event.observation) step.append(make("p", "problem", event.failure.message));
  if (event.observation) {
    const text = event.observation.replace(/^Observation:\n?/, "");
    step.append(make("p", "label", "Observation"), make("pre", "observation", text));
  }
  return step;
}

function drawTool(use) {
  const given = Object.values(use.arguments).map((value) => JSON.stringify(value)).join(", ");
  const chip = make("span", use.error ? "tool bad" : "tool", null, make("b", "", use.name), `(${given.slice(0, 120)})`);
  chip.title = use.error || use.result || "";
  return chip;
}

/** What the candidates came to, and how many came to it. */
function drawVotes(candidates) {
  const groups = new Map();
  for (const candidate of candidates) {
    const key = candidate.outcome ?? "";
    const group = groups.get(key) || { outcome: candidate.outcome, count: 0, chosen: false };
    group.count += 1;
    group.chosen ||= candidate.chosen;
    groups.set(key, group);
  }
  const rows = [...groups.values()].sort((a, b) => b.chosen - a.chosen || b.count - a.count).flatMap((group) => {
    const bar = make("progress", group.chosen ? "won" : "");
    bar.max = candidates.length;
    bar.value = group.count;
    bar.setAttribute("aria-label", `${group.count} of ${candidates.length} candidates`);
    const outcome = make("code", group.outcome === null ? "lost" : "", group.outcome === null ? "failed" : group.outcome || "(no output)");
    outcome.title = outcome.textContent;
    return [outcome, bar, make("span", group.chosen ? "count won" : "count", group.chosen ? `${group.count}, chosen` : `${group.count}`)];
  });
  const all = make("details", "", null, make("summary", "", `${candidates.length} candidates`));
  for (const candidate of candidates) {
    all.append(make("p", "label", candidate.chosen ? "Chosen" : candidate.failure ? candidate.failure.message : "Not chosen"), code(candidate.code ?? "(no code)"));
  }
  return [make("p", "label", "Votes"), make("div", "votes", null, ...rows), all];
}

const atEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 120;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

async function ask(question) {
  const model = $("model").value;
  const mine = { role: "user", content: question };
  const body = { model, stream: true, stream_options: { include_usage: true }, messages: $("remember").checked ? [...turns, mine] : [mine] };
  if (isAgent(model) && $("actions").value) body.agentkd = { actions: Number($("actions").value) };
  $("welcome").hidden = true;
  const answer = new Answer(model);
  $("log").append(make("div", "mine", null, make("p", "", question)), answer.box);
  toEnd();
  running = new AbortController();
  showRunning();
  let usage = null;
  try {
    const reply = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: running.signal });
    if (!reply.ok) {
      answer.fail(await problem(reply));
      if (reply.status === 401) askToken(token ? "This token is not known here." : "");
      return;
    }
    usage = await follow(reply, answer);
    turns.push(mine, { role: "assistant", content: answer.content });
  } catch (error) {
    answer.fail(error.name === "AbortError" ? "Stopped." : `The connection broke: ${error.message}`);
  } finally {
    answer.close(usage);
    running = null;
    showRunning();
  }
}

/** Show a stream; returns the usage. */
async function follow(reply, answer) {
  let usage = null;
  for await (const event of events(reply)) {
    if (event === null) return usage;
    const stay = atEnd();
    if (event.error) return answer.fail(event.error.message), usage;
    usage = event.usage || usage;
    if (event.agentkd_step) answer.step(event.agentkd_step);
    for (const choice of event.choices || []) {
      answer.text(choice.delta.content);
      if (choice.finish_reason) answer.end(choice.finish_reason);
    }
    if (stay) toEnd();
  }
  throw new Error("the answer has no end");
}

function showRunning() {
  $("send").textContent = running ? "Stop" : "Send";
  $("send").classList.toggle("stop", Boolean(running));
}

function fit() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight + 2}px`;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const question = $("question").value.trim();
  if (!question || !$("model").value) return;
  $("question").value = "";
  fit();
  ask(question);
});
$("question").addEventListener("input", fit);
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("token-dialog").open) running.abort();
});
$("model").addEventListener("change", showOptions);
$("key").addEventListener("click", () => askToken(""));
$("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  $("log").replaceChildren($("welcome"));
  $("welcome").hidden = false;
  $("question").focus();
});
$("token-cancel").addEventListener("click", () => $("token-dialog").close());
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("agentkd-token", token);
  $("token-dialog").close();
  loadModels();
});
$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  sessionStorage.setItem("agentkd-theme", theme);
  setTheme(theme);
});

setTheme(sessionStorage.getItem("agentkd-theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
$("ideas").append(...IDEAS.map((idea) => {
  const button = make("button", "quiet", idea);
  button.type = "button";
  button.addEventListener("click", () => { $("question").value = idea; $("composer").requestSubmit(); });
  return button;
}));
loadModels();
