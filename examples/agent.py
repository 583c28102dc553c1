"""An agent with search and Python, on one question, in a few lines.

The model is the offline teacher behind a real endpoint; put your own ``openai_model`` in its place.
"""

from __future__ import annotations

from agentkd import BM25Retriever, build_agent, load_taskset, load_tool, openai_model
from agentkd.pipeline import expert_endpoint
from agentkd.rollout import rollout


def main() -> None:
    taskset = load_taskset("almanac:hops=2", "train", n=1)
    search = load_tool("search", retriever=BM25Retriever(taskset.passages))
    with expert_endpoint(seed=0, error_rate=0.0) as url:
        agent = build_agent(openai_model("offline-expert", url), [search])
        record = rollout(agent, taskset.tasks[0])
        agent.cleanup()
    print(record.task.question)
    for step in record.steps:
        print(f"\n{step.output}\n{step.observation or ''}")
    print(f"\n{record.answer} (gold: {record.task.answer}), ended by {record.stop_reason.value}")
    assert record.correct


if __name__ == "__main__":
    main()
