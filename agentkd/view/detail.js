// One trajectory as elements. Text is only ever set as text.
const LONG = 6000; // characters of a text that are shown before it is asked for

// Characters that are not seen, or turn the direction of others, are shown by their number.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;
const visible = (text) => String(text ?? "").replace(/\r\n/g, "\n").replace(HIDDEN, (char) => `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`);

function el(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) made.append(child instanceof Node ? child : visible(child));
  }
  return made;
}

const list = (value) => (Array.isArray(value) ? value : []);
const seconds = (value) => (typeof value === "number" ? (value < 10 ? value.toFixed(2) : value.toFixed(1)) + " s" : "");
const whole = (value) => Number(value ?? 0).toLocaleString("en-US");
const words = (value) => String(value ?? "").replaceAll("_", " ");
const badge = (text, kind) => el("span", `badge ${kind ?? ""}`, text);
const RESULT_KINDS = { correct: "good", partial: "warn", wrong: "bad", "not graded": "warn", "no gold": "", errored: "warn" };

// A text, cut when it is long, with a button for the rest; `paint` turns text into nodes.
function longText(text, className, paint = (part) => [visible(part)]) {
  const whole = String(text ?? "");
  const box = el("pre", className, paint(whole.slice(0, LONG)));
  box.tabIndex = 0;
  if (whole.length > LONG) {
    const more = el("button", "more", `Show all ${whole.length.toLocaleString("en-US")} characters`);
    more.type = "button";
    more.addEventListener("click", () => { box.replaceChildren(...paint(whole)); more.remove(); });
    return el("div", "cut", box, more);
  }
  return box;
}

const painted = (code) => pythonSpans(code).map(([kind, text]) => (kind ? el("span", `py-${kind}`, text) : document.createTextNode(visible(text))));
const codeBlock = (code) => longText(code, "code", painted);

function failureLine(failure) {
  return failure ? el("p", "failure", el("b", "", `${words(failure.kind)} failure`), " ", String(failure.message ?? "").slice(0, LONG)) : null;
}

function candidates(given) {
  const all = list(given);
  if (!all.length) return null;
  const most = Math.max(1, ...all.map((item) => item.votes ?? 0));
  const rows = all.map((item, at) => {
    const meter = el("meter", "votes");
    meter.max = most; meter.value = item.votes ?? 0;
    const outcome = item.failure ? `${words(item.failure.kind)} failure: ${item.failure.message}` : item.outcome ?? "no outcome";
    return el("details", item.chosen ? "candidate chosen" : "candidate",
      el("summary", "", el("span", "number", `${at + 1}`), meter, el("span", "count", `${item.votes ?? 0} vote${item.votes === 1 ? "" : "s"}`),
        item.chosen ? badge("chosen", "good") : item.failure ? badge("out", "bad") : null,
        list(item.repairs).length ? badge(`mended: ${list(item.repairs).join(", ")}`, "warn") : null,
        el("code", "outcome", String(outcome).slice(0, 160)),
        typeof item.mean_logprob === "number" ? el("span", "muted", ` log-prob. ${item.mean_logprob.toFixed(2)}`) : null),
      item.code ? codeBlock(item.code) : longText(item.raw, "plain"));
  });
  return el("details", "candidates", el("summary", "", `${all.length} candidates`), rows);
}

function route(given) {
  if (!given || typeof given !== "object") return null;
  const decision = given.direct === true ? "answered directly" : given.direct === false ? "used tools" : "undecided";
  const facts = [`router ${words(given.router)}`, given.mode && `prompt: ${given.mode}`,
    typeof given.p_tool === "number" && `p(tool) ${given.p_tool.toFixed(2)}`,
    typeof given.agreement === "number" && `agreement ${(100 * given.agreement).toFixed(0)}%`].filter(Boolean);
  return el("div", "route", badge(decision, given.direct ? "good" : ""), " ", facts.join(" \u00b7 "), candidates(given.drafts));
}

function toolUses(uses) {
  return list(uses).map((use) => {
    const given = JSON.stringify(use.arguments ?? {});
    return el("details", "tool", el("summary", "", badge(use.name ?? "tool"), " ", el("code", "", given.length > 120 ? given.slice(0, 120) + "\u2026" : given),
      el("span", "muted", ` ${seconds(use.seconds)}`), use.error ? badge("failed", "bad") : null),
      given.length > 120 ? longText(given, "plain") : null, longText(use.error ?? use.result ?? "", "plain"));
  });
}

function stepCard(step, at) {
  const usage = step.usage ?? {};
  const given = step.first_thought?.prefix ?? "";
  const thought = step.code ? step.thought : step.output ?? step.raw;
  const facts = [`${whole(usage.input_tokens)} in`, `${whole(usage.output_tokens)} out`,
    `model ${seconds(step.model_seconds)}`, step.code && `code ${seconds(step.code_seconds)}`,
    step.finish_reason === "length" && "cut by its limit"].filter(Boolean);
  const observation = String(step.observation ?? "").replace(/^Observation:\s*/, "");
  const repaired = list(step.repairs).length > 0 && step.raw !== step.output;
  return el("article", step.is_final ? "step final" : "step",
    el("h3", "", `Step ${step.number ?? at + 1}`, step.is_final ? badge("final answer", "good") : null,
      repaired ? badge(`mended: ${list(step.repairs).join(", ")}`, "warn") : null,
      given ? badge(`first thought, ${step.first_thought.via}`) : null, el("span", "facts", facts.join(" \u00b7 "))),
    route(step.route),
    thought ? longText(String(thought).replace(/^Thought:\s*/, ""), "thought") : null,
    step.code ? codeBlock(step.code) : null,
    candidates(step.candidates),
    toolUses(step.tool_uses),
    failureLine(step.failure),
    observation ? el("div", "observation", el("div", "kind", "Observation"), longText(observation, "plain")) : null,
    repaired ? el("details", "", el("summary", "", "As the model wrote it"), longText(step.raw, "plain")) : null);
}

function maskView(mask) {
  if (!mask) return null;
  if (mask.problem) return el("p", "note", mask.problem);
  const learnt = mask.runs.filter(([, weight]) => weight > 0).length;
  const tokens = mask.runs.map(([text, weight]) => {
    if (!weight) return el("span", "context", text);
    return el("span", weight === 1 ? "learnt" : weight < 1 ? "learnt less" : "learnt more", text);
  });
  return el("section", "mask", el("h3", "", "Tokens in the loss", el("span", "facts", `${whole(learnt)} of ${whole(mask.tokens)} are learnt`)),
    el("p", "legend", el("span", "learnt", "learnt"), " ", el("span", "context", "context, only read")), el("pre", "", tokens));
}

function heading(record, row) {
  const task = record.task ?? {}, usage = record.usage ?? {}, score = record.score;
  const pairs = [["Answer", record.answer ?? "none"], ["Gold answer", task.answer ?? "none: nothing to grade by"],
    ["Scored by", score ? `${score.scorer}${score.value === null ? ", not graded" : ` = ${score.value}`}${score.reason ? `: ${score.reason}` : ""}` : "not scored"],
    ["Model", record.model], ...Object.entries(record.labels ?? {})];
  const facts = [words(record.stop_reason), `${list(record.steps).length} step${list(record.steps).length === 1 ? "" : "s"}`,
    `${whole(usage.input_tokens)} + ${whole(usage.output_tokens)} tokens`, seconds(record.seconds), task.family, task.level === "any" ? null : task.level].filter(Boolean);
  return el("header", "",
    el("div", "badges", badge(row.result, RESULT_KINDS[row.result]), row.verdict ? badge(row.verdict === "kept" ? "kept" : `dropped: ${row.verdict}`, row.verdict === "kept" ? "good" : "warn") : null,
      el("span", "facts", facts.join(" \u00b7 "))),
    longText(task.question ?? "", "question"),
    el("dl", "", pairs.map(([key, value]) => [el("dt", "", words(key)), el("dd", "", longText(value, "plain"))])),
    record.note ? el("p", "note", record.note) : null,
    failureLine(record.failure));
}

function trajectoryView(record, row, title) {
  const config = { config: record.config, versions: record.versions, commit: record.commit, started_at: record.started_at };
  return el("div", "trajectory", el("p", "where", title, " ", el("code", "", row.id)),
    heading(record, row), el("div", "mask-place"), list(record.steps).map(stepCard),
    el("details", "", el("summary", "", "System prompt"), longText(record.system_prompt, "plain")),
    el("details", "", el("summary", "", "Settings and versions"), longText(JSON.stringify(config, null, 2), "plain")));
}
