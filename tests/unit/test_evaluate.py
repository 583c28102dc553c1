"""The figures of an evaluation: intervals, what counts, pooling, paired differences, the table."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from agentkd.errors import ConfigError
from agentkd.evaluate import (
    SystemResult,
    comparison_table,
    contamination,
    latest_runs,
    paired_difference,
    summarise,
    wilson,
)
from agentkd.task import Task
from agentkd.trajectory import Failure, Score, Step, StopReason, ToolUse, Trajectory, Usage


def make_run(
    task_id: str,
    value: float | None = 1.0,
    *,
    family: str = "products",
    level: str = "easy",
    sample: int = 0,
    stop: StopReason = StopReason.FINAL_ANSWER,
    tokens: tuple[int, int] = (80, 20),
    seconds: float = 1.0,
    steps: tuple[Step, ...] = (),
    failure: Failure | None = None,
) -> Trajectory:
    return Trajectory(
        id=f"{task_id}#{sample}",
        task=Task(id=task_id, question=f"What is {task_id}?", answer="1", family=family, level=level),
        sample=sample,
        model="m",
        system_prompt="s",
        steps=steps,
        answer="1" if stop is StopReason.FINAL_ANSWER else None,
        stop_reason=stop,
        failure=failure,
        score=Score(value=value, scorer="exact"),
        usage=Usage(input_tokens=tokens[0], output_tokens=tokens[1]),
        seconds=seconds,
    )


def make_runs(outcomes: list[bool], **options: object) -> list[Trajectory]:
    return [make_run(f"t{i:03}", float(right), **options) for i, right in enumerate(outcomes)]  # type: ignore[arg-type]


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        [  # from the closed formula by hand and from published tables (z = 1.96)
            (10, 20, 0.29930, 0.70070),
            (0, 10, 0.0, 0.27754),
            (10, 10, 0.72246, 1.0),
            (94, 100, 0.87523, 0.97221),
            (1, 1, 0.20654, 1.0),
        ],
    )
    def test_known_intervals(self, successes: int, n: int, low: float, high: float) -> None:
        assert wilson(successes, n) == pytest.approx((low, high), abs=2e-5)

    def test_the_ends_are_exact(self) -> None:
        for n in range(1, 200):
            assert wilson(0, n)[0] == 0.0
            assert wilson(n, n)[1] == 1.0

    def test_nothing_run_says_nothing(self) -> None:
        assert wilson(0, 0) == (0.0, 1.0)

    def test_other_confidence(self) -> None:
        narrow, wide = wilson(30, 60, z=1.0), wilson(30, 60, z=2.576)
        assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]

    @pytest.mark.parametrize(("successes", "n", "z"), [(3, 2, 1.96), (-1, 2, 1.96), (1, 2, -1.0)])
    def test_impossible_input(self, successes: int, n: int, z: float) -> None:
        with pytest.raises(ConfigError):
            wilson(successes, n, z)

    def test_covers_the_truth_about_95_times_in_100(self) -> None:
        rng = random.Random(7)
        inside = 0
        for _ in range(2000):
            low, high = wilson(sum(rng.random() < 0.9 for _ in range(50)), 50)
            inside += low <= 0.9 <= high
        assert 0.93 <= inside / 2000 <= 0.98


class TestWhatCounts:
    def test_errored_runs_are_listed_and_not_counted(self) -> None:
        died = make_run("t9", None, stop=StopReason.PROVIDER_ERROR, tokens=(10**6, 0), seconds=999.0)
        cell = summarise("s", [*make_runs([True, True, False]), died]).overall
        assert (cell.n, cell.correct, cell.errors, cell.accuracy) == (3, 2, 1, 2 / 3)
        assert (cell.tokens_per_task, cell.seconds_per_task) == (100, 1.0)
        assert cell.stop_reasons == {"final_answer": 3, "provider_error": 1}
        assert (cell.low, cell.high) == wilson(2, 3)

    @pytest.mark.parametrize(
        "stop", [s for s in StopReason if not s.is_error and s != StopReason.FINAL_ANSWER]
    )
    def test_no_answer_counts_as_wrong(self, stop: StopReason) -> None:
        cell = summarise("s", [make_run("a"), make_run("b", 0.0, stop=stop)]).overall
        assert (cell.n, cell.correct, cell.unscored) == (2, 1, 0)

    def test_an_answer_that_cannot_be_graded_is_wrong_and_listed(self) -> None:
        cell = summarise("s", [make_run("a"), make_run("b", None)]).overall
        assert (cell.n, cell.correct, cell.unscored) == (2, 1, 1)

    def test_partial_credit_is_not_correct(self) -> None:
        assert summarise("s", [make_run("a", 0.99)]).overall.correct == 0

    def test_only_errors(self) -> None:
        cell = summarise("s", [make_run("a", None, stop=StopReason.SANDBOX_ERROR)]).overall
        assert (cell.n, cell.accuracy, cell.low, cell.high, cell.tokens_per_task) == (0, None, 0.0, 1.0, None)
        assert str(cell) == "- n=0 (1 errored)"

    def test_nothing(self) -> None:
        result = summarise("s", [])
        assert (result.overall.n, result.families, result.groups) == (0, {}, {})

    def test_a_retry_replaces_its_error_wherever_it_stands(self) -> None:
        died = make_run("a", None, stop=StopReason.PROVIDER_ERROR)
        good = make_run("a")
        for file in ([died, good], [good, died], [died, good, died]):
            assert latest_runs(file) == [good]
        again = make_run("a", 0.0)
        assert latest_runs([good, again]) == [again]
        late = make_run("a", None, stop=StopReason.SANDBOX_ERROR)
        assert latest_runs([died, late]) == [late]

    def test_samples_of_a_task_do_not_narrow_the_interval(self) -> None:
        once = make_runs([True] * 6 + [False] * 4)
        eight = [
            make_run(run.task.id, run.score.value if run.score else 0, sample=s)
            for run in once
            for s in range(8)
        ]
        one, many = summarise("s", once).overall, summarise("s", eight).overall
        assert (many.n, many.tasks, many.accuracy) == (80, 10, one.accuracy)
        assert (many.low, many.high) == pytest.approx((one.low, one.high))

    def test_cost_figures(self) -> None:
        use = ToolUse(name="search", arguments={})
        steps = tuple(
            Step(number=i, actor="m", raw="", output="", tool_uses=(use,) * uses, failure=failure)
            for i, (uses, failure) in enumerate(
                [
                    (2, None),
                    (1, Failure(kind="parse", message="x")),
                    (0, Failure(kind="execution", message="y")),
                ],
                1,
            )
        )
        runs = [
            make_run("a", tokens=(100, 10), seconds=1.0, steps=steps),
            make_run("b", tokens=(200, 20), seconds=2.0),
            make_run("c", tokens=(300, 60), seconds=90.0, steps=steps[:1]),
        ]
        cell = summarise("s", runs).overall
        assert cell.tokens_per_task == 230
        assert cell.output_tokens_per_task == 30
        assert cell.seconds_per_task == 2.0
        assert cell.steps_per_task == pytest.approx(4 / 3)
        assert cell.tool_uses_per_task == pytest.approx(5 / 3)
        assert cell.failures == {"execution": 1, "parse": 1}

    def test_what_ended_a_run_is_counted_once(self) -> None:
        dead = Failure(kind="provider", message="no answer")
        last = Step(number=1, actor="m", raw="", output="", failure=dead)
        stop = StopReason.PROVIDER_ERROR
        at_step = make_run("a", None, stop=stop, steps=(last,), failure=dead)
        before_any_step = make_run("b", None, stop=stop, failure=dead)
        assert summarise("s", [at_step]).overall.failures == {"provider": 1}
        assert summarise("s", [at_step, before_any_step]).overall.failures == {"provider": 2}


class TestPooling:
    def test_families_levels_and_groups(self) -> None:
        runs = [
            make_run("a", 1.0, family="products", level="easy"),
            make_run("b", 0.0, family="products", level="hard"),
            make_run("c", 1.0, family="lcm", level="hard"),
            make_run("d", 0.0, family="words"),
        ]
        result = summarise("s", runs, {"arithmetic": ["products", "lcm", "not run"], "none": ["absent"]})
        assert list(result.families) == ["products", "lcm", "words"]
        assert result.families["products"].accuracy == 0.5
        assert {level: cell.correct for level, cell in result.levels["products"].items()} == {
            "easy": 1,
            "hard": 0,
        }
        assert list(result.groups) == ["arithmetic"]
        assert (result.groups["arithmetic"].n, result.groups["arithmetic"].correct) == (3, 2)
        assert result.overall.n == sum(cell.n for cell in result.families.values()) == 4

    def test_survives_json(self) -> None:
        result = summarise("s", make_runs([True, False]), {"g": ["products"]})
        assert SystemResult.model_validate_json(result.model_dump_json()) == result


class TestPairedDifference:
    def test_sign_and_shared_tasks_only(self) -> None:
        a, b = make_runs([True] * 30 + [False] * 10), make_runs([False] * 20 + [True] * 10)
        difference = paired_difference(a, b)
        assert difference.n_pairs == 30
        assert difference.mean == pytest.approx(20 / 30)
        assert 0 < difference.low < difference.mean < difference.high <= 1
        turned = paired_difference(b, a)
        assert turned.mean == pytest.approx(-difference.mean)
        assert turned.low < turned.high < 0

    def test_same_seed_same_interval_in_any_order(self) -> None:
        rng = random.Random(0)
        a = make_runs([rng.random() < 0.8 for _ in range(60)])
        b = make_runs([rng.random() < 0.5 for _ in range(60)])
        first = paired_difference(a, b, seed=3)
        assert paired_difference(a[::-1], rng.sample(b, len(b)), seed=3) == first
        assert paired_difference(a, b, seed=4) != first

    def test_an_errored_run_is_no_pair(self) -> None:
        a = make_runs([True, True])
        b = [make_run("t000", 0.0), make_run("t001", None, stop=StopReason.PROVIDER_ERROR)]
        assert paired_difference(a, b).n_pairs == 1

    def test_nothing_shared_says_nothing(self) -> None:
        assert paired_difference(make_runs([True]), [make_run("other")]) == (0.0, -1.0, 1.0, 0)

    @pytest.mark.parametrize("outcomes", [([True] * 20, [True] * 20), ([True] * 20, [False] * 20)])
    def test_agreement_of_few_tasks_is_not_certainty(self, outcomes: tuple[list[bool], list[bool]]) -> None:
        difference = paired_difference(*map(make_runs, outcomes))
        assert difference.high - difference.low > 0.05
        assert difference.low <= difference.mean <= difference.high
        assert difference.low >= -1 and difference.high <= 1

    def test_samples_are_averaged(self) -> None:
        a = [make_run("x", 1.0, sample=0), make_run("x", 0.0, sample=1), make_run("y", 1.0)]
        b = [make_run("x", 0.0), make_run("y", 1.0)]
        difference = paired_difference(a, b)
        assert (difference.mean, difference.n_pairs) == (0.25, 2)

    def test_covers_the_truth(self) -> None:
        rng = random.Random(11)
        inside = 0
        for seed in range(150):
            pairs = [(rng.random() < 0.8, rng.random() < 0.6) for _ in range(60)]
            a, b = make_runs([x for x, _ in pairs]), make_runs([y for _, y in pairs])
            difference = paired_difference(a, b, seed=seed, resamples=300)
            inside += difference.low <= 0.2 <= difference.high
        assert inside / 150 >= 0.88

    def test_no_resamples(self) -> None:
        with pytest.raises(ConfigError):
            paired_difference([], [], resamples=0)


class TestContamination:
    @staticmethod
    def tasks(*questions: str) -> list[Task]:
        return [Task(id=str(i), question=question) for i, question in enumerate(questions)]

    def test_white_space_case_and_width_do_not_hide_a_copy(self) -> None:
        train = self.tasks("How many  moons\nhas Mars?", "What is 3 + 4?")
        test = self.tasks("how many moons has mars?", "What is \uff13 + 4?", "What is 5 + 4?")
        assert contamination(train, test) == 2

    def test_signs_matter(self) -> None:
        assert contamination(self.tasks("What is 3 - 4?"), self.tasks("What is 3 + 4?", "What is 34?")) == 0

    def test_every_copy_counts(self) -> None:
        assert contamination(self.tasks("Q?"), self.tasks("Q?", "q?")) == 2
        assert contamination([], self.tasks("Q?")) == 0


class TestTable:
    @staticmethod
    def rendered(*results: SystemResult, width: int = 120) -> str:
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(comparison_table(results, title="Held out"))
        return console.export_text()

    def test_cells_and_rows(self) -> None:
        base = summarise("base", make_runs([False] * 10))
        runs = [*make_runs([True] * 94 + [False] * 6), make_run("z", None, stop=StopReason.PROVIDER_ERROR)]
        agent = summarise("agent", [*runs, make_run("w", family="words")], {"pooled": ["products"]})
        text = self.rendered(base, agent)
        assert "94% [88, 97] n=100" in text
        assert "0% [0, 28] n=10" in text
        lines = {line.strip().split("  ")[0]: line for line in text.splitlines() if line.strip()}
        assert {"products", "words", "pooled", "all", "tokens/task", "median seconds/task"} <= lines.keys()
        assert lines["words"].split()[1] == "-"
        assert lines["errored runs (not in n)"].split()[-2:] == ["0", "1"]
        assert "different numbers of tasks" in text

    def test_a_share_is_rounded_to_100_only_when_it_is(self) -> None:
        assert str(summarise("s", make_runs([True] * 399 + [False])).overall).startswith("99% ")
        assert str(summarise("s", make_runs([False] * 399 + [True])).overall).startswith("1% ")
        assert str(summarise("s", make_runs([True] * 3)).overall) == "100% [44, 100] n=3"

    def test_fits_a_narrow_terminal_without_losing_figures(self) -> None:
        results = [
            summarise(label, make_runs([True] * 94 + [False] * 6)) for label in ("base", "cot", "agent")
        ]
        text = self.rendered(*results, width=60)
        assert text.count("n=100") == 6
        assert text.count("94%") == 6

    def test_names_are_text(self) -> None:
        name = "[bold]x[/bold]\x1b[31m"
        text = self.rendered(summarise(name, [make_run("a", family="\x1b]0;title\x07" + "y" * 500)]))
        assert "\x1b" not in text and "\x07" not in text
        assert "[bold]x[/bold]" in text
        assert "yyy" in text
