"""The folder of a run: its lock, its inputs, and what it may be gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agentkd.collect.config import CollectConfig
from agentkd.errors import ConfigError, DataError, StorageError, boundary
from agentkd.record import iter_jsonl, load_tasks, read_json, write_json, write_jsonl
from agentkd.retrieval import Passage, Retriever
from agentkd.retrieval.source import Corpus, open_corpus
from agentkd.task import Task
from agentkd.taskset import load_taskset

__all__ = ["RunLock", "begin", "check_inputs", "has_corpus", "stored_retriever"]


class RunLock:
    """One collector a folder, from before it is read until the run is closed; ends with its process.

    Raises:
        ConfigError: another process holds it.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        path = folder / "run.lock"
        hint = "Choose a folder that can be written."
        with boundary(StorageError, f"opening {path}", hint):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise ConfigError(
                    f"Another process is writing {folder}.", "Wait for it, stop it, or choose another --out."
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def check_inputs(config: CollectConfig, out: Path) -> tuple[Sequence[Task], Corpus]:
    """The run's tasks and corpus, compared with those of the first start.

    Raises:
        ConfigError: ``out`` was begun with other ones, or with other lasting settings.
        DataError: there are no tasks, or a file is malformed.
    """
    taskset = load_taskset(config.tasks, config.split, config.n, config.seed)
    if not taskset.tasks:
        raise DataError(f"The taskset {config.tasks!r} has no tasks.", "Check --tasks, --split and --n.")
    stored = out / "tasks.jsonl"
    if stored.is_file() and (theirs := load_tasks(stored)) != list(taskset.tasks):
        raise ConfigError(
            f"{out} holds a run of other tasks ({_difference(theirs, taskset.tasks)}).",
            "Choose another --out, or give the settings of that run.",
        )
    _same_settings(config, out)
    corpus = open_corpus(config.corpus, taskset.passages)
    if stored.is_file() and _corpus_identity(out) != corpus.identity:
        raise ConfigError(
            f"{out} holds a run with another corpus.", "Choose another --out, or give that corpus."
        )
    return taskset.tasks, corpus


def _difference(theirs: Sequence[Task], ours: Sequence[Task]) -> str:
    if len(theirs) != len(ours):
        return f"{len(theirs)} of them, {len(ours)} asked for"
    changed = [one.id for one, other in zip(theirs, ours, strict=True) if one != other]
    return f"{len(changed)} of {len(theirs)} have changed, the first is {changed[0]!r}"


def _same_settings(config: CollectConfig, out: Path) -> None:
    """A run is made with one set of settings: going on with others would mix two teachers unseen."""
    path, ours = out / "config.json", config.lasting()
    if not path.is_file():
        return
    theirs = read_json(path)
    changed = sorted(_changed(theirs, ours))
    if changed:
        raise ConfigError(
            f"{out} was begun with other settings ({', '.join(changed)}).",
            "Choose another --out, or give the settings of that run.",
        )


def _changed(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Names of the settings that differ; one that an older version did not store is taken as equal."""
    found = []
    for key in ours.keys() & theirs.keys():
        if key == "agent":
            found += _changed(theirs[key], ours[key])
        elif key == "labels":
            names = ours[key].keys() | theirs[key].keys()
            found += [f"label {name}" for name in names if ours[key].get(name) != theirs[key].get(name)]
        elif ours[key] != theirs[key]:
            found.append(key)
    return found


def stored_retriever(out: Path) -> Retriever | None:
    """What the run searches; None when there is nothing.

    Raises:
        RetrievalError: the index or the retriever is not there any more.
    """
    path = out / "corpus.json"
    source = read_json(path)["source"] if path.is_file() else None
    passages = _stored_passages(out)
    return open_corpus(None if passages else source, passages).retriever


def has_corpus(out: Path) -> bool:
    """Whether the run searches something."""
    return bool(_corpus_identity(out))


def _stored_passages(out: Path) -> list[Passage]:
    path = out / "passages.jsonl"
    return list(iter_jsonl(path, Passage)) if path.is_file() else []


def _corpus_identity(out: Path) -> str:
    path = out / "corpus.json"
    if path.is_file():
        return str(read_json(path)["identity"])
    return open_corpus(None, _stored_passages(out)).identity  # of a run that has no corpus.json


def begin(config: CollectConfig, out: Path, tasks: Sequence[Task], corpus: Corpus) -> None:
    """Write what later starts are compared with; the tasks last."""
    if not (out / "config.json").is_file():
        write_json(out / "config.json", config.lasting())
    if corpus.passages:
        write_jsonl(out / "passages.jsonl", corpus.passages)
    source = None if config.corpus is None else str(config.corpus)
    write_json(out / "corpus.json", {"source": source, "identity": corpus.identity})
    write_jsonl(out / "tasks.jsonl", tasks)
