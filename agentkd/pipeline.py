"""All stages in order, with files in between: what ``agentkd run`` and ``agentkd quickstart`` do.

::

    OUT/recipe.json
    OUT/train/tasks.jsonl, passages.jsonl, index/    OUT/test/tasks.jsonl, passages.jsonl, index/
    OUT/collect-agent, OUT/collect-cot         trajectories of the teacher
    OUT/kept-agent, OUT/kept-cot               what was kept, and why the rest was not
    OUT/students/NAME                          adapters
    OUT/evaluate/NAME                          trajectories of each system on the test tasks
    OUT/report/index.html                      the report

Every stage goes on where it stopped, so a run that was killed is simply started again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.collect import CollectConfig, collect
from agentkd.errors import ConfigError, first_problem
from agentkd.evaluate import SystemResult, comparison_table, run_evaluation
from agentkd.filter import Filtered, filter_run
from agentkd.first_thought import FirstThoughtConfig
from agentkd.recipe import Recipe, StudentRecipe, TaskMix, load_recipe, quickstart_recipe
from agentkd.recipe_report import BASE, next_steps, report_recipe, student_folder
from agentkd.record import (
    iter_jsonl,
    load_tasks,
    read_json,
    write_json,
    write_jsonl,
)
from agentkd.retrieval import Passage, Retriever
from agentkd.retrieval.source import open_retriever
from agentkd.rollout import rollout
from agentkd.task import Task
from agentkd.taskset import load_taskset
from agentkd.trajectory import Trajectory
from agentkd.transform import Means, make_transform, transform_run

if TYPE_CHECKING:
    from agentkd.display import Display
    from agentkd.distill import DistillConfig

__all__ = ["expert_endpoint", "load_recipe", "quickstart", "run_recipe", "serve_expert"]


class _Data(NamedTuple):
    tasks: list[Task]
    folder: Path
    corpus: Path | None
    """Index that the search tool searches, where the tasks come with passages."""

    @property
    def retriever(self) -> Retriever | None:
        return open_retriever(self.corpus) if self.corpus else None


def quickstart(
    out: Path | str, *, size: Literal["tiny", "demo", "full"], sandbox: str, fresh: bool, quiet: bool
) -> dict[str, Any]:
    """The quick start, see :func:`agentkd.recipe.quickstart_recipe`."""
    out = Path(out)
    if fresh and out.exists():
        if not (out / "recipe.json").is_file():
            raise ConfigError(f"{out} is not a folder of the quick start, so --fresh does not delete it.")
        shutil.rmtree(out)
    recipe = quickstart_recipe(size).model_copy(update={"sandbox": sandbox})
    return run_recipe(recipe, out, quiet=quiet)


def run_recipe(recipe: Recipe, out: Path | str, *, quiet: bool = False) -> dict[str, Any]:
    """Run all stages of a recipe into ``out``.

    Returns:
        The report's figures and where it lies.

    Raises:
        ConfigError: ``out`` holds a run of another recipe.
        AgentkdError: whatever a stage raises; what is finished stays.
    """
    out = Path(out)
    from agentkd.display import Display

    began = time.monotonic()
    for name, student in recipe.students.items():
        _distill_config(name, student, recipe)  # a wrong setting is noticed before anything is run
    _claim(recipe, out)
    with Display(quiet) as show:
        show.stage("tasks")
        train, test = _data(recipe, out, "train"), _data(recipe, out, "test")
        show.done(f"{len(train.tasks)} to learn from, {len(test.tasks)} held out")
        kept = _teach(recipe, out, train, show)
        for name, student in recipe.students.items():
            _distill(name, student, recipe, out, train, show)
        runs = _evaluate_all(recipe, out, test, show)
        show.stage("serve and ask")
        served = _ask(recipe, out, test)
        show.done(f"{served['question']} -> {served['answer']}" if served else "nothing to ask")
        show.stage("report")
        page = report_recipe(recipe, out, train.tasks, test.tasks, kept, runs, served)
        show.done(str(page))
    results = [result for result, _ in runs.values()]
    if not quiet:
        show.finish(comparison_table(results), recipe.notes, page, next_steps(recipe, out), began)
    return {
        "report": str(page),
        "seconds": time.monotonic() - began,
        **read_json(page.parent / "report.json"),
    }


def _claim(recipe: Recipe, out: Path) -> None:
    path, content = out / "recipe.json", recipe.model_dump(mode="json")
    if path.is_file() and read_json(path) != content:
        raise ConfigError(
            f"{out} holds a run of another recipe.", "Choose another --out, or delete that folder (--fresh)."
        )
    write_json(path, content)


def _data(recipe: Recipe, out: Path, split: str) -> _Data:
    """The tasks and passages of one split, written once."""
    folder = out / split
    if not (folder / "tasks.jsonl").is_file():
        tasks, passages = _mix(recipe.train if split == "train" else recipe.test, split, recipe.seed)
        if passages:
            write_jsonl(folder / "passages.jsonl", passages)
        write_jsonl(folder / "tasks.jsonl", tasks)
    return _Data(load_tasks(folder / "tasks.jsonl"), folder, _index(recipe, folder))


def _index(recipe: Recipe, folder: Path) -> Path | None:
    """The index of a split's passages, built once."""
    from agentkd.retrieval.index import Index

    passages, index = folder / "passages.jsonl", folder / "index"
    if not passages.is_file():
        return None
    if not (index / "manifest.json").is_file():
        Index.build(
            index, iter_jsonl(passages, Passage), kind=recipe.retrieval, encoder=recipe.retrieval_encoder
        )
    return index


def _mix(parts: Sequence[TaskMix], split: str, seed: int) -> tuple[list[Task], list[Passage]]:
    tasks: dict[str, Task] = {}
    passages: dict[str, Passage] = {}
    for part in parts:
        taskset = load_taskset(part.tasks, split, part.n, seed)
        tasks.update((task.id, task) for task in taskset.tasks)
        passages.update((passage.id, passage) for passage in taskset.passages)
    return list(tasks.values()), list(passages.values())


@contextmanager
def expert_endpoint(*, seed: int, error_rate: float) -> Iterator[str]:
    """The offline expert behind a real HTTP endpoint on a free loopback port; yields its URL."""
    from agentkd.serve import Server, create_app

    with Server(create_app([_expert_backend(seed, error_rate)])) as server:
        yield server.url


def expert_labels(*, seed: int, error_rate: float) -> dict[str, str]:
    """Who the offline expert was, for the records; a run goes on with the same one only."""
    from agentkd.expert import EXPERT_LABEL

    return {"teacher": EXPERT_LABEL, "teacher_seed": str(seed), "teacher_error_rate": f"{error_rate:g}"}


def serve_expert(host: str, port: int, *, seed: int, error_rate: float, **operations: Any) -> None:
    """Serve the offline expert until it is stopped; ``operations`` as of ``serve_forever``."""
    from agentkd.serve import serve_forever

    serve_forever([_expert_backend(seed, error_rate)], host=host, port=port, **operations)


def _expert_backend(seed: int, error_rate: float) -> Any:
    from agentkd.expert import Expert
    from agentkd.serve import ExpertBackend
    from agentkd.taskset import build_world

    world = build_world(seed, "train")  # closed-book questions about it are answered from memory
    return ExpertBackend(Expert(seed=seed, error_rate=error_rate, worlds=[world]))


@contextmanager
def _teacher(recipe: Recipe) -> Iterator[tuple[str, str, dict[str, str]]]:
    teacher = recipe.teacher
    if teacher.expert:
        with expert_endpoint(seed=recipe.seed, error_rate=teacher.error_rate) as url:
            yield url, "offline-expert", expert_labels(seed=recipe.seed, error_rate=teacher.error_rate)
    elif teacher.api_base and teacher.model:
        yield teacher.api_base, teacher.model, {}
    else:
        raise ConfigError("The recipe names no teacher.", "Set teacher.expert = true, or api_base and model.")


def _teach(recipe: Recipe, out: Path, train: _Data, show: Display) -> dict[str, Filtered]:
    """Collect and filter for each kind of student."""
    kept: dict[str, Filtered] = {}
    kinds = sorted({student.kind for student in recipe.students.values()})
    with _teacher(recipe) as (url, model, labels):
        for kind in kinds:
            show.stage(f"collect ({kind})")
            config = _collect_config(recipe, train, kind, url, model, labels)
            done = collect(config, out / f"collect-{kind}", show.rollouts, show.rollouts)
            show.done(
                f"{len(done.trajectories)} trajectories, {sum(t.correct for t in done.trajectories)} correct"
            )
            show.stage(f"filter ({kind})")
            kept[kind] = filter_run(done.folder, out / f"kept-{kind}", recipe.filter)
            show.done(f"{len(kept[kind].kept)} kept, {len(kept[kind].dropped)} dropped")
    return kept


def _collect_config(
    recipe: Recipe, train: _Data, kind: Literal["agent", "cot"], url: str, model: str, labels: dict[str, str]
) -> CollectConfig:
    teacher = recipe.teacher
    return CollectConfig(
        tasks=str(train.folder / "tasks.jsonl"),
        corpus=train.corpus,
        seed=recipe.seed,
        agent=AgentConfig(
            model=model,
            api_base=url,
            api_key=teacher.api_key,
            kind=kind,
            temperature=teacher.temperature,
            max_tokens=teacher.max_tokens,
            sandbox=recipe.sandbox,
            search_k=recipe.search_k,
        ),
        first_thought=FirstThoughtConfig() if teacher.first_thought and kind == "agent" else None,
        workers=teacher.workers,
        labels=labels,
    )


def _distill(
    name: str, student: StudentRecipe, recipe: Recipe, out: Path, train: _Data, show: Display
) -> None:
    from agentkd.distill import distill

    show.stage(f"distil {name}")
    config = _distill_config(name, student, recipe)
    kept = out / f"kept-{student.kind}"
    if student.passages:
        kept = _with_passages(kept, recipe, train)
    trained = distill(kept / "kept.jsonl", student_folder(out, name), config, show.training)
    show.done(f"{trained.training.get('n_examples', '?')} examples")


def _with_passages(kept: Path, recipe: Recipe, train: _Data) -> Path:
    """The same trajectories, each with what is found for its question."""
    folder, retriever = kept.with_name(f"{kept.name}-passages"), train.retriever
    transform_run(
        kept / "kept.jsonl",
        folder,
        make_transform("passages", {"k": recipe.search_k}),
        lambda answers: Means(answers, retriever=retriever),
    )
    return folder


def _distill_config(name: str, student: StudentRecipe, recipe: Recipe) -> DistillConfig:
    from agentkd.distill import DistillConfig

    settings = {"seed": recipe.seed, **student.settings, "kind": student.kind, "base": student.base}
    try:
        return DistillConfig.model_validate(settings)
    except ValidationError as exc:
        raise ConfigError(
            f"students.{name}.settings: {first_problem(exc)}.", "See agentkd.distill.DistillConfig."
        ) from exc


def _evaluate_all(
    recipe: Recipe, out: Path, test: _Data, show: Display
) -> dict[str, tuple[SystemResult, list[Trajectory]]]:
    base = next(iter(recipe.students.values())).base
    runs: dict[str, tuple[SystemResult, list[Trajectory]]] = {}
    if recipe.base_n:
        runs[BASE] = _evaluate(BASE, base, "cot", recipe.base_n, recipe, out, test, show)
    for name, student in recipe.students.items():
        where = str(student_folder(out, name))
        runs[name] = _evaluate(name, where, None, student.evaluate_n, recipe, out, test, show)
    return runs


def _evaluate(
    label: str,
    what: str,
    kind: Literal["agent", "cot"] | None,
    n: int | None,
    recipe: Recipe,
    out: Path,
    test: _Data,
    show: Display,
) -> tuple[SystemResult, list[Trajectory]]:
    show.stage(f"evaluate {label}")
    tasks = test.tasks if n is None else _share(test.tasks, n)
    folder = out / "evaluate" / label.replace(" ", "-")

    @contextmanager
    def source() -> Iterator[tuple[AgentConfig, Any]]:
        from agentkd.system import open_system

        with open_system(what, kind=kind, sandbox=recipe.sandbox, max_tokens=recipe.max_tokens) as system:
            yield system._replace(config=system.config.model_copy(update={"search_k": recipe.search_k}))

    result, trajectories = run_evaluation(
        label,
        tasks,
        source,
        folder,
        retriever=test.retriever,
        workers=32,
        groups=recipe.groups,
        on_progress=show.rollouts,
    )
    cell = result.overall
    show.done(f"{cell.accuracy:.0%} of {cell.n} [{cell.low:.0%}, {cell.high:.0%}]")
    return result, trajectories


def _share(tasks: Sequence[Task], n: int) -> list[Task]:
    """About ``n`` of the tasks, every family and level in proportion, at least one of each."""
    cells: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        cells.setdefault((task.family, task.level), []).append(task)
    share = min(1.0, n / max(1, len(tasks)))
    chosen = {task.id for cell in cells.values() for task in cell[: max(1, round(share * len(cell)))]}
    return [task for task in tasks if task.id in chosen]


def _ask(recipe: Recipe, out: Path, test: _Data) -> dict[str, str] | None:
    """Put one question to the served agent student over HTTP."""
    name = next((name for name, student in recipe.students.items() if student.kind == "agent"), None)
    if name is None or recipe.ask is None:
        return None
    from agentkd.engine.student import load_student
    from agentkd.serve import Server, create_app, student_backend

    student = load_student(student_folder(out, name))
    backend = student_backend(student_folder(out, name))
    try:
        with Server(create_app([backend])) as server:
            config = AgentConfig(
                model=backend.model_id,
                api_base=server.url,
                prompt=student.system_prompt,
                sandbox=recipe.sandbox,
                search_k=recipe.search_k,
                max_tokens=recipe.max_tokens,
            )
            agent = agent_factory(config, search_tools(test.retriever, config))
            task = Task(id="ask", question=recipe.ask)
            worker = agent(task, 0)
            try:
                record = rollout(worker, task)
            finally:
                worker.cleanup()
    finally:
        backend.close()
    return {"question": recipe.ask, "answer": str(record.answer), "stop_reason": record.stop_reason.value}
