// Where the trajectories come from: blocks in this page, or its server. Both answer the same questions.
const embedded = (id) => {
  const block = document.getElementById(id);
  return block ? JSON.parse(block.textContent) : null;
};

async function ask(path) {
  const answer = await fetch(path);
  const value = await answer.json();
  if (!answer.ok) throw new Error(`${value.error} ${value.hint}`.trim());
  return value;
}

const store = document.getElementById("runs")
  ? {
      live: false,
      runs: async () => embedded("runs"),
      trajectory: async (run, n) => embedded(`t-${run}-${n}`),
      mask: async (run, n) => embedded(`t-${run}-${n}`).mask,
      search: async (run, text, count) => {
        const wanted = text.toLowerCase(), found = [];
        for (let n = 0; n < count; n++) {
          const block = document.getElementById(`t-${run}-${n}`);
          if (block && textsOf(JSON.parse(block.textContent)).some((part) => String(part ?? "").toLowerCase().includes(wanted))) found.push(n);
        }
        return found;
      },
    }
  : {
      live: true,
      runs: () => ask("/api/runs"),
      state: () => ask("/api/state"),
      trajectory: (run, n) => ask(`/api/trajectory?run=${run}&n=${n}`),
      mask: (run, n) => ask(`/api/mask?run=${run}&n=${n}`),
      search: (run, text) => ask(`/api/search?run=${run}&q=${encodeURIComponent(text)}`),
    };

function textsOf(record) {
  const task = record.task ?? {};
  const steps = (record.steps ?? []).flatMap((step) => [step.output, step.observation, step.failure?.message]);
  return [record.id, task.question, task.answer, record.answer, ...steps];
}
