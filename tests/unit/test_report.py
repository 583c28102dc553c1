"""The report: complete figures, self-contained page, hostile text as text, atomic files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import DataError, StorageError
from agentkd.evaluate import SystemResult, paired_difference, summarise
from agentkd.report import write_report
from agentkd.task import Task
from agentkd.trajectory import Candidate, Failure, Score, Step, StopReason, ToolUse, Trajectory, Usage

HOSTILE = (
    "</script><script>alert(1)</script><img src=http://x/y onerror=alert(2)> "
    "`a`|b *c* $x_{y$ & \x1b[31m\x07\u202e"
)


def make_run(i: int, right: bool, *, text: str = "I multiply.", family: str = "products") -> Trajectory:
    step = Step(
        number=1,
        actor="m",
        raw=text,
        output=text,
        thought=text,
        code=f"print({text!r})",
        observation=f"Observation:\n{text}",
        failure=None if right else Failure(kind="execution", message=text),
        tool_uses=(ToolUse(name="search", arguments={}),),
    )
    return Trajectory(
        id=f"{family}-{i}#0",
        task=Task(id=f"{family}-{i}", question=f"{i}: {text}", answer=text, family=family, level="easy"),
        model="student",
        system_prompt="s",
        steps=(step,),
        answer=text,
        stop_reason=StopReason.FINAL_ANSWER,
        score=Score(value=float(right), scorer="exact"),
        usage=Usage(input_tokens=90, output_tokens=10),
        labels={"teacher": "offline expert (programmatic)"},
    )


def make_result(label: str, right: int, n: int, **options: Any) -> SystemResult:
    return summarise(label, [make_run(i, i < right, **options) for i in range(n)], {"pooled": ["products"]})


@pytest.fixture
def everything() -> dict[str, Any]:
    a, b = [make_run(i, i < 18) for i in range(20)], [make_run(i, i < 5) for i in range(20)]
    groups = {"pooled": ["products"]}
    return {
        "title": "A report",
        "results": [summarise("base", b, groups), summarise("agent", a, groups)],
        "collection": {
            "agent": {"collected": 30, "correct": 22, "kept": 20, "dropped": {"wrong answer": 10}}
        },
        "losses": {"agent": [(1, 2.0), (2, float("nan")), (3, 0.5)]},
        "config": {"seed": 0, "path": Path("/x"), "nested": {"rate": float("inf")}},
        "versions": {"agentkd": "0.1.0"},
        "notes": ["The teacher is a program."],
        "served": {"question": "What is 2 x 3?", "answer": "6", "url": "http://127.0.0.1:1/v1"},
        "next_steps": ["# Serve it", "agentkd serve run/student"],
        "examples": [a[0], a[-1]],
        "differences": {"agent - base": paired_difference(a, b)},
    }


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def check_page_is_inert(page: Page) -> None:
    """Nothing is loaded, and the one script is our own."""
    assert len(page.scripts) == 1 and "data-copy" in page.scripts[0]
    assert not {"img", "iframe", "link", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")
        ]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_writes_three_files_and_nothing_else(tmp_path: Path, everything: dict[str, Any]) -> None:
    index = write_report(tmp_path / "run" / "report", **everything)
    assert index == tmp_path / "run" / "report" / "index.html"
    assert sorted(path.name for path in index.parent.iterdir()) == ["index.html", "report.json", "report.md"]


def test_json_has_every_figure(tmp_path: Path, everything: dict[str, Any]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    path = write_report(tmp_path, **everything).with_name("report.json")
    document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["schema_version"] == 1
    agent = document["systems"]["agent"]
    expected = everything["results"][1]
    assert agent["overall"] == expected.overall.model_dump()
    assert agent["overall"]["accuracy"] == 0.9
    assert agent["families"]["products"]["n"] == 20
    assert agent["groups"]["pooled"]["correct"] == 18
    assert agent["levels"]["products"]["easy"]["n"] == 20
    assert list(document["systems"]) == ["base", "agent"]
    assert document["collection"] == everything["collection"]
    assert document["losses"] == {"agent": [[1, 2.0], [2, None], [3, 0.5]]}
    assert document["differences"]["agent - base"]["mean"] == pytest.approx(0.65)
    assert document["differences"]["agent - base"]["n_pairs"] == 20
    assert document["config"] == {"seed": 0, "path": "/x", "nested": {"rate": None}}
    assert document["notes"] == ["The teacher is a program."]
    assert document["versions"] == {"agentkd": "0.1.0"}


def test_what_was_mended_is_told_by_kind(tmp_path: Path, everything: dict[str, Any]) -> None:
    assert "texts mended" not in Page(write_report(tmp_path / "none", **everything)).text
    runs = [make_run(i, True) for i in range(2)]
    loser = Candidate(raw="x", repairs=("closed_fence",))
    runs[0] = runs[0].model_copy(
        update={"steps": tuple(step.model_copy(update={"candidates": (loser,)}) for step in runs[0].steps)}
    )
    before = everything["results"][0].model_copy(update={"measures": None})  # as of an older version
    everything["results"] = [before, summarise("agent", runs), make_result("plain", 1, 2)]
    index = write_report(tmp_path / "some", **everything)
    (line,) = [it for it in (index.parent / "report.md").read_text().splitlines() if "texts mended" in it]
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == ["\u2013", "1 closed fence", "none"]
    assert "1 closed fence" in Page(index).text


def test_page_says_it_all(tmp_path: Path, everything: dict[str, Any]) -> None:
    page = Page(write_report(tmp_path, **everything))
    check_page_is_inert(page)
    text = " ".join(page.text.split())
    assert "90% [70, 97] n=20" in text
    assert "25% [11, 47] n=20" in text
    assert "+65[+" in text
    for part in (
        "The teacher is a program.",
        "What is 2 x 3?",
        "agentkd serve run/student",
        "10 wrong answer",
    ):
        assert part in text
    assert "offline expert (programmatic)" in text
    assert "execution failure: I multiply." in text
    assert [tag for tag, _ in page.tags].count("svg") == 6
    assert "could not be drawn" not in text


def test_plots_follow_the_theme_and_do_not_clash(tmp_path: Path, everything: dict[str, Any]) -> None:
    index = write_report(tmp_path, **everything)
    html = index.read_text(encoding="utf-8")
    assert "#0102" not in html
    assert html.count("fill: var(--") + html.count("stroke: var(--") > 20
    ids = [attributes["id"] for _, attributes in Page(index).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in Page(index).tags:
        if tag == "use":
            assert (attributes.get("xlink:href") or "")[1:] in ids
        if "clip-path" in attributes:
            assert (attributes["clip-path"] or "").removeprefix("url(#").removesuffix(")") in ids


def test_markdown_has_the_tables(tmp_path: Path, everything: dict[str, Any]) -> None:
    text = write_report(tmp_path, **everything).with_name("report.md").read_text(encoding="utf-8")
    assert "| products | 25% \\[11, 47\\] n=20 | 90% \\[70, 97\\] n=20 |" in text
    assert "| agent | 30 | 22 | 20 | 10 wrong answer |" in text
    assert "```sh\n# Serve it\nagentkd serve run/student\n```" in text
    assert "- The teacher is a program." in text


def test_hostile_text_is_text_everywhere(tmp_path: Path) -> None:
    result = make_result(HOSTILE, 1, 2, text=HOSTILE, family=HOSTILE)
    index = write_report(
        tmp_path,
        title=HOSTILE,
        results=[result],
        collection={HOSTILE: {"collected": 1, "kept": 0, "dropped": {HOSTILE: 1}}},
        losses={HOSTILE: [(1, 1.0)]},
        config={HOSTILE: HOSTILE, "broken": "\ud800"},
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE, "\ud800 broken"],
        served={"question": HOSTILE, "answer": HOSTILE, "url": HOSTILE},
        next_steps=[HOSTILE, "```", "````"],
        examples=[make_run(0, False, text=HOSTILE), make_run(1, True, text="z" * 50_000)],
        differences={HOSTILE: (0.0, -1.0, 1.0, 0)},
    )
    html = index.read_text(encoding="utf-8")
    page = Page(index)
    check_page_is_inert(page)
    assert "could not be drawn" not in page.text
    assert page.text.count("<script>alert(1)</script>") >= 10
    for character in "\x1b\x07\u202e":
        assert character not in html
    assert "\u241b[31m" in page.text
    assert "z" * 4001 not in html and "characters cut]" in page.text

    markdown = index.with_name("report.md").read_text(encoding="utf-8")
    outside, inside = markdown.split("## Next steps")[0], markdown.split("## Next steps")[1]
    assert "<" not in outside
    assert "\x1b" not in markdown
    assert "\\`a\\`\\|b \\*c\\*" in outside
    assert inside.strip().startswith("`````sh\n")

    document = json.loads(index.with_name("report.json").read_text(encoding="utf-8"))
    assert document["notes"][0] == HOSTILE
    assert document["notes"][1] == "\\ud800 broken"


def test_nothing_to_report(tmp_path: Path) -> None:
    index = write_report(tmp_path, title="Empty", results=[])
    page = Page(index)
    check_page_is_inert(page)
    assert "svg" not in [tag for tag, _ in page.tags]
    assert json.loads(index.with_name("report.json").read_text())["systems"] == {}


def test_a_system_whose_runs_all_errored(tmp_path: Path) -> None:
    errored = make_run(0, True).model_copy(update={"stop_reason": StopReason.PROVIDER_ERROR, "score": None})
    page = Page(
        write_report(tmp_path, title="t", results=[summarise("dead", [errored]), make_result("ok", 2, 3)])
    )
    text = " ".join(page.text.split())
    assert "n=0 +1 errored" in text
    assert "67% [21, 94] n=3" in text
    assert "could not be drawn" not in text


def test_flat_collection_counts(tmp_path: Path) -> None:
    counts = {"collected": 3, "kept": 2, "dropped": {"max steps": 1}}
    path = write_report(tmp_path, title="t", results=[], collection=counts).with_name("report.json")
    assert json.loads(path.read_text())["collection"] == {"trajectories": counts}


def test_wrong_collection_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="collection counts"):
        write_report(tmp_path, title="t", results=[], collection={"collected": "many", "kept": 0})


def test_two_systems_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="same label"):
        write_report(tmp_path, title="t", results=[make_result("x", 1, 2), make_result("x", 2, 2)])


def test_a_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    old = write_report(tmp_path, title="Old", results=[]).read_bytes()
    (tmp_path / "index.html.partial").mkdir()
    with pytest.raises(StorageError):
        write_report(tmp_path, title="New", results=[])
    assert (tmp_path / "index.html").read_bytes() == old


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(StorageError, match="report"):
        write_report(tmp_path / "report", title="t", results=[])


def test_without_matplotlib_the_report_says_how_to_get_plots(tmp_path: Path) -> None:
    shadow = tmp_path / "shadow" / "matplotlib"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'matplotlib'\")")
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.unit.test_report import make_result, write_report\n"
        "write_report(Path(sys.argv[1]), title='t', results=[make_result('agent', 1, 2)])\n"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(shadow.parent), str(root)])
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": paths}, timeout=60)
    page = Page(tmp_path / "out" / "index.html")
    assert "pip install 'agentkd[report]'" in page.text
    assert "svg" not in [tag for tag, _ in page.tags]
    assert "50% [9, 91] n=2" in " ".join(page.text.split())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["systems"]["agent"]["overall"]["n"] == 2


def test_import_stays_light() -> None:
    code = (
        "import sys; before = set(sys.modules); import agentkd.report, agentkd.evaluate\n"
        "new = set(sys.modules) - before\n"
        "print(sorted({'matplotlib', 'jinja2', 'rich', 'numpy', 'torch'} & new))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert done.stdout.strip() == "[]"
