"""The report as one HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any
from urllib.parse import quote

from agentkd.report.content import Content, clean, name, number, percent, plain, signed_points
from agentkd.report.plots import INSTALL_HINT, Plot, draw_plots, series_colours
from agentkd.trajectory import Step, Trajectory

__all__ = ["render_page"]

CONFIG_LIMIT = 20_000
"""Characters of the configuration that the page shows."""


def render_page(content: Content) -> str:
    """The page: nothing is loaded from anywhere, and only its own copy button is a script.

    A content security policy with the hash of that script is the second lock behind escaping.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(clean=clean, name=name, percent=percent, number=number, points=signed_points)
    template, style, script = (_part(part) for part in ("template.html.j2", "style.css", "copy.js"))
    plots, problem = _plots(content)
    return environment.from_string(template).render(
        content=content,
        colours=series_colours(len(content.results)),
        plots=plots,
        plot_problem=problem,
        headline=_headline(content),
        examples=[
            {**_example(trajectory), "link": content.viewer and f"{content.viewer}&id={quote(trajectory.id)}"}
            for trajectory in content.examples
        ],
        config=clean(json.dumps(plain(content.config), indent=2, ensure_ascii=False), CONFIG_LIMIT),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _part(file: str) -> str:
    return resources.files("agentkd.report").joinpath(file).read_text(encoding="utf-8")


def _plots(content: Content) -> tuple[list[Plot], str]:
    try:
        return draw_plots(content), ""
    except ImportError:
        return [], INSTALL_HINT
    except Exception as exc:
        # The plots are the last thing of a long run, and the figures are in the tables: say it, go on.
        return [], f"The plots could not be drawn ({type(exc).__name__}: {clean(str(exc), 300)})."


def _headline(content: Content) -> tuple[str, list[dict[str, Any]]]:
    """The figure to read first: the first pooled row, which is all tasks when nothing is pooled."""
    row = content.pooled_rows()[0]
    colours = series_colours(len(content.results))
    cards = [
        {"label": label, "colour": colour, "cell": cell}
        for label, colour, cell in zip(content.labels, colours, row.cells, strict=True)
    ]
    return row.name, cards


def _example(run: Trajectory) -> dict[str, Any]:
    return {
        "question": run.task.question,
        "family": run.task.family,
        "level": "" if run.task.level == "any" else run.task.level,
        "model": run.model,
        "gold": run.task.answer,
        "answer": run.answer,
        "correct": run.correct,
        "graded": run.score is not None and run.score.value is not None,
        "ended": run.stop_reason.value.replace("_", " "),
        "tokens": run.usage.input_tokens + run.usage.output_tokens,
        "seconds": run.seconds,
        "labels": run.labels,
        "steps": [_step(step) for step in run.steps],
    }


def _step(step: Step) -> dict[str, Any]:
    # A step without code (a chain of thought, or an unreadable action) is shown as it was said.
    thought = step.thought if step.code is not None else step.output
    observation = (step.observation or "").removeprefix("Observation:").strip()
    return {
        "number": step.number,
        "thought": thought.strip(),
        "code": (step.code or "").strip(),
        "observation": observation,
        "failure": step.failure,
        "tools": [use.name for use in step.tool_uses],
    }
