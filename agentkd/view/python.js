"use strict";
// Python cut into spans for colouring. It never fails: what it does not know is plain text.
const PYTHON = new RegExp([
  "(?<comment>#[^\\n]*)",
  "(?<string>[rbfuRBFU]{0,2}(?:\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?))",
  "(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d*)?(?:[eE][+-]?\\d+)?j?)\\b)",
  "(?<keyword>\\b(?:and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|match|nonlocal|not|or|pass|raise|return|try|while|with|yield|None|True|False)\\b)",
  "(?<final>\\bfinal_answer(?=\\s*\\())",
  "(?<call>\\b[A-Za-z_]\\w*(?=\\s*\\())",
  "(?<word>\\b[A-Za-z_]\\w*)",
].join("|"), "g");

function pythonSpans(code) {
  const spans = [];
  let at = 0;
  for (const found of code.matchAll(PYTHON)) {
    if (found.index > at) spans.push(["", code.slice(at, found.index)]);
    const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
    spans.push([kind === "word" ? "" : kind, found[0]]);
    at = found.index + found[0].length;
  }
  if (at < code.length) spans.push(["", code.slice(at)]);
  return spans;
}
