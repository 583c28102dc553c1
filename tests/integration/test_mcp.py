"""Tools of a real MCP server, spoken to over stdio."""

from __future__ import annotations

import sys

import pytest

from agentkd.agent import build_agent
from agentkd.errors import ConfigError
from agentkd.rollout import rollout
from agentkd.task import Task
from agentkd.testing import ScriptedModel
from agentkd.tool import mcp_tools
from tests.conftest import action

mcp = pytest.importorskip("mcp")


@pytest.mark.filterwarnings("ignore")
def test_an_agent_calls_a_tool_of_an_mcp_server(request: pytest.FixtureRequest) -> None:
    script = str(request.config.rootpath / "examples" / "mcp_server.py")
    with mcp_tools(mcp.StdioServerParameters(command=sys.executable, args=[script])) as tools:
        model = ScriptedModel([action("convert", "final_answer(celsius(fahrenheit=212))")])
        agent = build_agent(model, tools)
        record = rollout(agent, Task(id="1", question="212 F in C?", answer="100", scorer="numeric"))
        agent.cleanup()
    assert record.correct
    assert record.steps[0].tool_uses[0].name == "celsius"


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_does_not_start_is_named() -> None:
    missing = mcp.StdioServerParameters(command="/nonexistent/server", args=[])
    with pytest.raises(ConfigError, match="MCP server"), mcp_tools(missing, timeout=2):
        pass
