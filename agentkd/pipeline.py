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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.collect import CollectConfig, collect
from agentkd.errors import ConfigError
from agentkd.evaluate import SystemResult, comparison_table, contamination, paired_difference, run_evaluation
from agentkd.filter import Filtered, filter_run
from agentkd.first_thought import FirstThoughtConfig
from agentkd.recipe import Recipe, StudentRecipe, TaskMix, load_recipe, quickstart_recipe
from agentkd.record import (
    iter_jsonl,
    load_tasks,
    provenance,
    read_json,
    read_trajectories,
    write_json,
    write_jsonl,
)
from agentkd.retrieval import Passage, Retriever
from agentkd.retrieval.source import open_corpus, open_retriever
from agentkd.rollout import rollout
from agentkd.rollouts import Progress
from agentkd.sampler import SamplerConfig
from agentkd.task import Task
from agentkd.taskset import load_taskset
from agentkd.trajectory import Trajectory

if TYPE_CHECKING:
    from agentkd.display import Display
    from agentkd.distill import DistillConfig

__all__ = ["evaluate_command", "expert_endpoint", "load_recipe", "quickstart", "run_recipe", "serve_expert"]

BASE = "base"


class _Data(NamedTuple):
    tasks: list[Task]
    folder: Path
    corpus: Path | None
    """Index that the search tool searches, where the tasks come with passages."""

    @property
    def retriever(self) -> Retriever | None:
        return open_retriever(self.corpus) if self.corpus else None


def quickstart(
    out: Path, *, size: Literal["tiny", "demo", "full"], sandbox: str, fresh: bool, quiet: bool
) -> dict[str, Any]:
    """The quick start, see :func:`agentkd.recipe.quickstart_recipe`."""
    if fresh and out.exists():
        if not (out / "recipe.json").is_file():
            raise ConfigError(f"{out} is not a folder of the quick start, so --fresh does not delete it.")
        shutil.rmtree(out)
    recipe = quickstart_recipe(size).model_copy(update={"sandbox": sandbox})
    return run_recipe(recipe, out, quiet=quiet)


def run_recipe(recipe: Recipe, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run all stages of a recipe into ``out``.

    Returns:
        The report's figures and where it lies.

    Raises:
        ConfigError: ``out`` holds a run of another recipe.
        AgentkdError: whatever a stage raises; what is finished stays.
    """
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
            _distill(name, student, recipe, out, show)
        runs = _evaluate_all(recipe, out, test, show)
        show.stage("serve and ask")
        served = _ask(recipe, out, test)
        show.done(f"{served['question']} -> {served['answer']}" if served else "nothing to ask")
        show.stage("report")
        page = _report(recipe, out, train, test, kept, runs, served)
        show.done(str(page))
    results = [result for result, _ in runs.values()]
    if not quiet:
        show.finish(comparison_table(results), recipe.notes, page, _next_steps(recipe, out), began)
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


def serve_expert(host: str, port: int, *, seed: int, error_rate: float) -> None:
    """Serve the offline expert until it is stopped."""
    from agentkd.serve import serve_forever

    serve_forever([_expert_backend(seed, error_rate)], host=host, port=port)


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


def _distill(name: str, student: StudentRecipe, recipe: Recipe, out: Path, show: Display) -> None:
    from agentkd.distill import distill

    show.stage(f"distil {name}")
    config = _distill_config(name, student, recipe)
    trained = distill(out / f"kept-{student.kind}" / "kept.jsonl", _folder(out, name), config, show.training)
    show.done(f"{trained.training.get('n_examples', '?')} examples")


def _distill_config(name: str, student: StudentRecipe, recipe: Recipe) -> DistillConfig:
    from agentkd.distill import DistillConfig

    settings = {"seed": recipe.seed, **student.settings, "kind": student.kind, "base": student.base}
    try:
        return DistillConfig.model_validate(settings)
    except ValidationError as exc:
        problem = exc.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"students.{name}.settings.{where}: {problem['msg']}.", "See agentkd.distill.DistillConfig."
        ) from exc


def _folder(out: Path, name: str) -> Path:
    return out / "students" / name.replace(" ", "-")


def _evaluate_all(
    recipe: Recipe, out: Path, test: _Data, show: Display
) -> dict[str, tuple[SystemResult, list[Trajectory]]]:
    base = next(iter(recipe.students.values())).base
    runs: dict[str, tuple[SystemResult, list[Trajectory]]] = {}
    if recipe.base_n:
        runs[BASE] = _evaluate(BASE, base, "cot", recipe.base_n, recipe, out, test, show)
    for name, student in recipe.students.items():
        where = str(_folder(out, name))
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

    student = load_student(_folder(out, name))
    backend = student_backend(_folder(out, name))
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


def _report(
    recipe: Recipe,
    out: Path,
    train: _Data,
    test: _Data,
    kept: dict[str, Filtered],
    runs: dict[str, tuple[SystemResult, list[Trajectory]]],
    served: dict[str, str] | None,
) -> Path:
    from agentkd.report import write_report

    labels = list(runs)
    best = labels[-1] if labels[-1] != BASE else labels[0]
    differences = {
        f"agent-distilled minus {other}": paired_difference(runs["agent-distilled"][1], runs[other][1])
        for other in labels
        if other != "agent-distilled" and "agent-distilled" in runs
    }
    return write_report(
        out / "report",
        title=recipe.title,
        results=[result for result, _ in runs.values()],
        differences=differences,
        collection={kind: _collection(out, kind, filtered) for kind, filtered in kept.items()},
        losses={name: _losses(_folder(out, name)) for name in recipe.students},
        config=recipe.model_dump(mode="json"),
        versions=provenance()["versions"],
        notes=[*recipe.notes, _overlap(train.tasks, test.tasks)],
        served=served,
        next_steps=_next_steps(recipe, out),
        examples=_examples(runs[best][1]),
    )


def _overlap(train: Sequence[Task], test: Sequence[Task]) -> str:
    return f"Questions that stand in both the training and the test tasks: {contamination(train, test)}."


def _collection(out: Path, kind: str, filtered: Filtered) -> dict[str, Any]:
    collected = read_trajectories(out / f"collect-{kind}" / "trajectories.jsonl")
    return {
        "collected": len(collected),
        "correct": sum(item.correct for item in collected),
        "kept": len(filtered.kept),
        "dropped": dict(filtered.reasons),
    }


def _losses(folder: Path) -> list[tuple[int, float]]:
    import json

    path = folder / "loss.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(row["step"], row["loss"]) for row in rows]


def _examples(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """A right and a wrong one of every family, so that a reader sees both."""
    chosen: dict[tuple[str, bool], Trajectory] = {}
    for item in trajectories:
        chosen.setdefault((item.task.family, item.correct), item)
    return list(chosen.values())[:12]


def _next_steps(recipe: Recipe, out: Path) -> list[str]:
    name = next((name for name, student in recipe.students.items() if student.kind == "agent"), None)
    served = _folder(out, name) if name else out / "students"
    return [
        f"agentkd serve {served} --port 8000",
        "# a real teacher (any OpenAI-compatible endpoint, for instance vLLM on a GPU machine):",
        "vllm serve Qwen/Qwen2.5-32B-Instruct --port 8001",
        "agentkd collect --api-base http://127.0.0.1:8001/v1 --model Qwen/Qwen2.5-32B-Instruct "
        "--tasks tasks.jsonl --corpus passages.jsonl --out runs/mine",
        "agentkd filter runs/mine --out runs/mine/kept",
        "# a larger student; a GPU is used when there is one:",
        "agentkd distill runs/mine/kept/kept.jsonl --base Qwen/Qwen2.5-0.5B-Instruct --lr 2e-4 --rank 64 "
        "--max-length 4096 --out student",
    ]


def evaluate_command(
    *,
    student: str | None,
    tasks: str,
    out: Path,
    n: int | None,
    split: str,
    seed: int,
    endpoint: tuple[str | None, str | None, str | None],
    kind: str | None,
    sandbox: str,
    corpus: str | None,
    temperature: float,
    max_tokens: int,
    workers: int,
    actions: int,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[SystemResult, Any]:
    """What ``agentkd evaluate`` does; returns the figures and a table of them."""
    api_base, model, api_key = endpoint
    if (student is None) == (api_base is None):
        raise ConfigError("Evaluate what?", "Give either a student folder or --api-base and --model.")
    if api_base is not None and model is None:
        raise ConfigError("No model was named.", "Pass --model as the endpoint lists it.")
    taskset = load_taskset(tasks, split, n, seed)
    retriever = open_corpus(corpus, taskset.passages).retriever
    chosen: Any = kind
    sampling = {"sampler": SamplerConfig(n=actions, seed=seed) if actions > 1 else None}

    @contextmanager
    def source() -> Iterator[tuple[AgentConfig, Any]]:
        if student is None:
            config = _endpoint_config(api_base, model, api_key, chosen, sandbox, temperature, max_tokens)
            yield config.model_copy(update=sampling), None
            return
        from agentkd.system import open_system

        with open_system(
            student, kind=chosen, sandbox=sandbox, temperature=temperature, max_tokens=max_tokens
        ) as system:
            yield system.config.model_copy(update=sampling), system.model

    label = Path(student).name if student else str(model)
    result, _ = run_evaluation(
        label, taskset.tasks, source, out, retriever=retriever, workers=workers, on_progress=on_progress
    )
    return result, comparison_table([result])


def _endpoint_config(
    api_base: str | None,
    model: str | None,
    api_key: str | None,
    kind: Literal["agent", "cot"] | None,
    sandbox: str,
    temperature: float,
    max_tokens: int,
) -> AgentConfig:
    from agentkd.model import check_endpoint

    assert api_base is not None
    assert model is not None
    check_endpoint(api_base, model, api_key)
    return AgentConfig(
        model=model,
        api_base=api_base,
        api_key=api_key,
        kind=kind or "agent",
        sandbox=sandbox,
        temperature=temperature,
        max_tokens=max_tokens,
    )
