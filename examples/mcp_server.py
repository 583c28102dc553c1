"""A small MCP server to try ``mcp_tools`` with: ``python examples/mcp_server.py`` speaks over stdio."""

from __future__ import annotations

from mcp.server.fastmcp import FastMCP

server = FastMCP("temperatures")


@server.tool()
def celsius(fahrenheit: float) -> float:
    """Converts degrees Fahrenheit to degrees Celsius."""
    return (fahrenheit - 32) / 1.8


if __name__ == "__main__":
    server.run()
