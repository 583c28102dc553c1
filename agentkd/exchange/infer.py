"""Which tools code was given, where a row does not say: those that it calls and does not define."""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Iterable
from functools import cache

from agentkd.tool import declared_schema, tool_names

__all__ = ["tools_called"]


def tools_called(codes: Iterable[str]) -> tuple[str, ...]:
    """Schemas of the functions that the code of one run calls although nothing in it defines them.

    A student is told which tools it may call, so trajectories that search must say that there is a
    search. A shipped tool of that name gives its own schema; of another only the name and the
    arguments are known.

    Args:
        codes: the steps that ran without an error; what failed may have called what does not exist.
    """
    called: dict[str, ast.Call] = {}
    known = {"final_answer", *dir(builtins)}
    for code in codes:
        try:
            nodes = list(ast.walk(ast.parse(code)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.setdefault(node.func.id, node)
            known |= _defined(node)
    return tuple(_schema(name, call) for name, call in called.items() if name not in known)


def _defined(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return set()


@cache
def _shipped() -> dict[str, str]:
    return {name: declared_schema(name) for name in tool_names()}


def _schema(name: str, call: ast.Call) -> str:
    if name in _shipped():
        return _shipped()[name]
    places = [f"input_{number}" for number in range(1, len(call.args) + 1)]
    names = [*places, *(word.arg for word in call.keywords if word.arg)]
    inputs = {argument: {"type": "any", "description": ""} for argument in names}
    return json.dumps({"name": name, "description": "", "inputs": inputs, "output_type": "string"})
