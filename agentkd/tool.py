"""Tools: what an agent can be given.

A tool is a folder with a ``tool.py`` that holds exactly one subclass of ``smolagents.Tool``.
agentkd ships some under ``tools/``; a path to a folder of one's own works the same.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkd.errors import ConfigError, boundary

if TYPE_CHECKING:
    from smolagents import Tool

__all__ = ["declared_schema", "load_tool", "mcp_tools", "tool_names", "tool_schema", "tools_folder"]


def tools_folder() -> Path:
    """Where the shipped tools are: in the wheel, or in the checkout."""
    packaged = Path(__file__).parent / "_tools"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "tools"


def tool_names() -> list[str]:
    """Names of the shipped tools."""
    return sorted(path.parent.name for path in tools_folder().glob("*/tool.py"))


def load_tool(name_or_path: str | Path, **arguments: Any) -> Tool:
    """Load a tool by the name of a shipped one, or by the path of a folder or ``tool.py``.

    Args:
        name_or_path: "search", or "path/to/folder".
        arguments: passed to the tool's constructor, for instance ``retriever=``.

    Raises:
        ConfigError: no such tool, not exactly one Tool class in the file, or the constructor
            refuses the arguments.
    """
    path = _tool_file(name_or_path)
    tool = _only_class(path)
    with boundary(ConfigError, f"creating the tool in {path}"):
        return tool(**arguments)


def _only_class(path: Path) -> type[Tool]:
    found = _tool_classes(path)
    if len(found) != 1:
        raise ConfigError(
            f"{path} defines {len(found)} Tool classes.", "A tool file must define exactly one."
        )
    return found[0]


def _tool_file(name_or_path: str | Path) -> Path:
    shipped = tools_folder() / str(name_or_path) / "tool.py"
    given = Path(name_or_path)
    for path in (shipped, given / "tool.py", given):
        if path.is_file():
            return path
    raise ConfigError(
        f"There is no tool {str(name_or_path)!r}.",
        f"Shipped tools: {', '.join(tool_names()) or 'none'}; or give the path of a folder with a tool.py.",
    )


def _tool_classes(path: Path) -> list[type[Tool]]:
    from smolagents import Tool

    module_name = f"agentkd_tool_{path.parent.name}_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with boundary(ConfigError, f"loading {path}"):
        spec.loader.exec_module(module)
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Tool) and value.__module__ == module_name
    ]


def tool_schema(tool: Any) -> str:
    """A tool's signature as a JSON string, as trajectories and student folders keep it."""
    return json.dumps(
        {
            "name": tool.name,
            "description": tool.description,
            "inputs": tool.inputs,
            "output_type": tool.output_type,
        },
        ensure_ascii=False,
    )


def declared_schema(name_or_path: str | Path) -> str:
    """The schema of a tool that is not loaded, as :func:`tool_schema` gives it.

    Raises:
        ConfigError: see :func:`load_tool`.
    """
    return tool_schema(_only_class(_tool_file(name_or_path)))


@contextmanager
def mcp_tools(server: Any, timeout: float = 30.0) -> Iterator[list[Tool]]:
    """The tools of an MCP server, for as long as the block lasts.

    Args:
        server: ``mcp.StdioServerParameters`` or ``{"url": ..., "transport": "streamable-http"}``.
        timeout: seconds to wait for the server at the start.

    Raises:
        ConfigError: the ``mcp`` extra is missing or the server cannot be reached.
    """
    with boundary(ConfigError, "connecting to the MCP server", "Install it by: pip install 'agentkd[mcp]'."):
        from smolagents import MCPClient

        options = {"connect_timeout": timeout}
        client = MCPClient(server, adapter_kwargs=options, structured_output=False)
    try:
        yield list(client.get_tools())
    finally:
        client.disconnect()
