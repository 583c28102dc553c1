"""What is a direct answer, what is the use of a tool, and tool-usage accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

import pytest

from agentkd.errors import ConfigError
from agentkd.prompt import DIRECT, STUDENT, TOOL_PROMPTS, TOOLS_ALLOWED, TOOLS_REQUIRED, system_prompt
from agentkd.task import Task
from agentkd.tool_use import ToolUsage, is_direct, tool_usage_accuracy, used_tool, without_tools
from agentkd.trajectory import Failure, Step, StopReason, ToolUse, Trajectory


def step(code: str | None, *calls: str, final: bool = False) -> Step:
    uses = tuple(ToolUse(name=name, arguments={}) for name in calls)
    failure = None if code is not None else Failure(kind="parse", message="no code")
    return Step(
        number=1, actor="m", raw="", output="", code=code, tool_uses=uses, is_final=final, failure=failure
    )


def trajectory(*steps: Step) -> Trajectory:
    return Trajectory(
        id="t#0",
        task=Task(id="t", question="q", answer="1"),
        model="m",
        system_prompt="s",
        steps=steps,
        stop_reason=StopReason.FINAL_ANSWER,
    )


@pytest.mark.parametrize(
    "code",
    [
        "final_answer(7)",
        'final_answer("Rose Fox")',
        "final_answer(-3.5)",
        "final_answer(answer=7)",
        "# I know it\nfinal_answer(7)  # really",
        "final_answer([1, 'a', (2, None)])",
        "final_answer(\n    'a'\n    'b'\n)",
    ],
)
def test_a_lone_final_answer_of_a_literal_is_direct(code: str) -> None:
    assert is_direct(code)


@pytest.mark.parametrize(
    "code",
    [
        None,
        "",
        "final_answer(",
        "final_answer()",
        "final_answer(3 * 4)",
        "final_answer(x)",
        "final_answer(f'{1}')",
        "final_answer(str(7))",
        "final_answer(search('x'))",
        "final_answer(1, 2)",
        "final_answer(*[1])",
        "final_answer(value=7)",
        "x = 1\nfinal_answer(1)",
        "final_answer(1)\nfinal_answer(2)",
        "answer = final_answer(7)",
        "tools.final_answer(7)",
        "print('final_answer(7)')",
        "if True:\n    final_answer(7)",
        "final_answer(7) or search('x')",
        "final_answer(" + "(" * 5000 + ")" * 5000 + ")",
    ],
)
def test_anything_else_is_not(code: str | None) -> None:
    assert not is_direct(code)


@pytest.mark.parametrize(
    ("code", "search", "otherwise"),
    [
        ("final_answer(7)", True, True),
        ("final_answer(6 * 7)", True, False),
        ("import math\nprint(math.prod([6, 7]))", True, False),
        ("final_answer(search('x'))", False, False),
        ("find = search\nfinal_answer(find('x'))", False, False),
        ("def f():\n    return [search(q) for q in 'ab']\nfinal_answer(f())", False, False),
        ("final_answer('search')", True, True),
        ("final_answer(", False, False),
        ("", False, False),
        (None, False, False),
    ],
)
def test_what_may_be_done_without_tools(code: str | None, search: bool, otherwise: bool) -> None:
    tools = {"search": object(), "final_answer": object()}
    assert without_tools(code, "search", tools) is search
    assert without_tools(code, "both", tools) is without_tools(code, "code", tools) is otherwise


def test_a_trajectory_is_direct_when_nothing_ran_before_its_lone_answer() -> None:
    answer = step("final_answer(7)", final=True)
    assert is_direct(trajectory(answer))
    assert is_direct(trajectory(step(None), answer))
    assert not is_direct(trajectory(step("print(search('x'))", "search"), answer))
    assert not is_direct(trajectory(step("final_answer(7)")))
    assert not is_direct(trajectory())


@pytest.mark.parametrize(
    ("steps", "search", "code"),
    [
        ([step("final_answer(7)")], False, False),
        ([step("print('thinking')"), step("final_answer(7)")], False, False),
        ([step("print(search('x'))", "search"), step("final_answer('y')")], True, False),
        ([step("x = search('x')\nprint(x)", "search")], True, False),
        ([step("final_answer(3 * 4)")], False, True),
        ([step("print(len(search('x')))", "search")], True, True),
        ([step("import math"), step("final_answer(7)")], False, True),
        ([step("for i in [1]:\n    print(i)")], False, True),
        ([step("print(search('x'", "final_answer")], False, False),
        ([step(None)], False, False),
        ([], False, False),
    ],
)
def test_what_counts_as_a_tool_is_a_setting(steps: list[Step], search: bool, code: bool) -> None:
    item = trajectory(*steps)
    assert used_tool(item, "search") == search
    assert used_tool(item, "code") == code
    assert used_tool(item, "both") == (search or code)


def test_an_unknown_kind_of_tool_is_refused() -> None:
    with pytest.raises(ConfigError, match="hammer"):
        used_tool(trajectory(), "hammer")  # type: ignore[arg-type]


def all_tables() -> Iterator[tuple[tuple[bool, bool], ...]]:
    """Every table of up to six questions."""
    for n in range(7):
        yield from combinations_with_replacement(tuple(product((True, False), repeat=2)), n)


def test_tool_usage_accuracy_is_the_mean_of_both_shares_and_says_nothing_of_one_class() -> None:
    for rows in all_tables():
        usage = tool_usage_accuracy(rows)
        assert usage.n == len(rows)
        easy = [used for is_easy, used in rows if is_easy]
        hard = [used for is_easy, used in rows if not is_easy]
        if not easy or not hard:
            assert usage.accuracy is None
            continue
        expected = 0.5 * easy.count(False) / len(easy) + 0.5 * hard.count(True) / len(hard)
        assert usage.accuracy == pytest.approx(expected)
        assert usage.tool_rate == pytest.approx(sum(used for _, used in rows) / len(rows))


@pytest.mark.parametrize("always", [True, False])
def test_always_and_never_are_half_right(always: bool) -> None:
    for easy, hard in product(range(1, 6), repeat=2):
        rows = [(True, always)] * easy + [(False, always)] * hard
        assert tool_usage_accuracy(rows).accuracy == 0.5


def test_empty_classes_have_no_share() -> None:
    assert ToolUsage(0, 0, 0, 0).tool_rate is None
    assert ToolUsage(2, 0, 0, 0) == tool_usage_accuracy([(True, False)] * 2)
    assert ToolUsage(2, 0, 0, 0).on_easy == 1.0
    assert ToolUsage(2, 0, 0, 0).on_hard is None


def test_an_adapted_student_is_asked_as_any_other() -> None:
    assert TOOLS_ALLOWED == STUDENT
    assert len(set(TOOL_PROMPTS.values())) == 3
    assert "{tools}" not in DIRECT
    assert system_prompt(TOOLS_REQUIRED).endswith("Tools: none")
