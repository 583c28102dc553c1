"""A tool of your own: a class with a name, a description, typed inputs and ``forward``."""

from __future__ import annotations

from typing import Any

from smolagents import Tool

from agentkd import Task, build_agent
from agentkd.rollout import rollout
from agentkd.testing import ScriptedModel


class Inventory(Tool):
    """How many pieces of an article are in stock."""

    name = "in_stock"
    description = "Returns how many pieces of an article are in stock."
    inputs: dict[str, Any] = {"article": {"type": "string", "description": "Name of the article."}}
    output_type = "integer"

    def forward(self, article: str) -> int:
        return {"lamp": 12, "chair": 3}.get(article, 0)


def main() -> None:
    model = ScriptedModel(
        ["Thought: I add both.\n```python\nfinal_answer(in_stock('lamp') + in_stock('chair'))\n```"]
    )
    agent = build_agent(model, [Inventory()])
    record = rollout(
        agent, Task(id="1", question="How many lamps and chairs?", answer="15", scorer="numeric")
    )
    agent.cleanup()
    print(record.answer, [use.name for use in record.steps[0].tool_uses])
    assert record.correct


if __name__ == "__main__":
    main()
