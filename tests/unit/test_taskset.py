"""Tasksets: gym families, files, datasets, specs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentkd.errors import ConfigError, DataError
from agentkd.scorer import score
from agentkd.taskset import FAMILIES, KINDS, load_taskset
from agentkd.taskset.gym import levels_of


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_deterministic_and_a_prefix(family: str) -> None:
    first, again = load_taskset(f"gym:{family}", n=30, seed=3), load_taskset(f"gym:{family}", n=30, seed=3)
    assert first.tasks == again.tasks
    assert load_taskset(f"gym:{family}", n=11, seed=3).tasks == first.tasks[:11]
    assert load_taskset(f"gym:{family}", n=30, seed=4).tasks != first.tasks
    assert len({task.id for task in first}) == len({task.question for task in first}) == 30
    assert {task.level for task in first} == set(levels_of(family))
    assert {task.family for task in first} == {family}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_seed_of_train_shares_a_key_with_a_seed_of_test(family: str) -> None:
    sides = {
        split: [task for seed in range(4) for task in load_taskset(f"gym:{family}", split, 100, seed)]
        for split in ("train", "test")
    }
    keys = {split: {key for task in tasks for key in task.meta["keys"]} for split, tasks in sides.items()}
    assert keys["train"] and keys["test"] and not keys["train"] & keys["test"]
    assert not {t.question for t in sides["train"]} & {t.question for t in sides["test"]}
    assert not {t.id for t in sides["train"]} & {t.id for t in sides["test"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_answers_score_and_others_do_not(family: str) -> None:
    for task in load_taskset(f"gym:{family}", "test", 20):
        assert score(task, task.answer).correct
        assert not score(task, "no such answer").correct


def test_levels_differ_in_difficulty() -> None:
    easy = load_taskset("gym:products@easy", n=20)
    hard = load_taskset("gym:products@hard", n=20)
    assert max(len(task.answer or "") for task in easy) < min(len(task.answer or "") for task in hard)
    assert {task.level for task in easy} == {"easy"}


def test_calendar_keys_hold_every_date_of_the_question() -> None:
    for task in load_taskset("gym:calendar_arithmetic", n=40):
        assert len(task.meta["keys"]) == (2 if "days" in task.question or "-day" in task.question else 1)
        assert task.answer is not None and task.answer.endswith("day")


def test_five_hundred_tasks_take_under_two_seconds() -> None:
    load_taskset("gym:" + ",".join(FAMILIES), n=9)  # the import of reasoning-gym does not count
    began = time.process_time()
    assert len(load_taskset("gym:" + ",".join(FAMILIES), n=500)) == 500
    assert time.process_time() - began < 2.0


def test_families_share_the_number_evenly() -> None:
    tasks = load_taskset("gym:products,lcm,chain_sum", n=10).tasks
    assert [task.family for task in tasks[:3]] == ["products", "lcm", "chain_sum"]
    assert sorted(sum(task.family == f for task in tasks) for f in ("products", "lcm", "chain_sum")) == [
        3,
        3,
        4,
    ]


def test_joined_specs_share_the_number_and_bring_the_passages() -> None:
    both = load_taskset("gym:products@hard+almanac:hops=1+2", "test", n=20)
    families = [task.family for task in both]
    assert families.count("products") == 10
    assert families.count("almanac_1hop") == families.count("almanac_2hop") == 5
    assert len(both.passages) > 100
    alone = load_taskset("almanac:hops=1+2", "test", n=10)
    assert [task for task in both if task.family != "products"] == list(alone)
    assert load_taskset("gym:products", n=2).passages == ()


def test_default_number() -> None:
    assert len(load_taskset("gym:products,lcm")) == 100
    assert len(load_taskset("almanac")) == 50 * len(KINDS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gym:produts", "products"),
        ("gym:", "family is missing"),
        ("gym:lcm@medium", "no level 'medium'"),
        ("gym:gsm_symbolic@hard", "It has: any"),
        ("almanac:hops=7", "hops=7"),
        ("almanac:size=2", "no option"),
        ("nonsense", "is no taskset"),
        ("tasks.jsonl?colour=red", "unknown option 'colour'"),
    ],
)
def test_wrong_specs_say_what_is_wrong(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_taskset(spec)


def test_wrong_split_and_number() -> None:
    with pytest.raises(ConfigError, match="no split 'all'"):
        load_taskset("gym:products", "all")
    with pytest.raises(ConfigError, match="no split 'dev'"):
        load_taskset("almanac", "dev")
    with pytest.raises(ConfigError, match="at least one"):
        load_taskset("gym:products", n=0)


def test_import_is_light() -> None:
    code = (
        "import sys, agentkd.taskset, agentkd.expert; "
        "heavy = {'reasoning_gym', 'datasets', 'numpy', 'torch'}; "
        "print([name for name in sys.modules if name in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_jsonl_takes_plain_questions_and_full_records(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "mine.jsonl",
        {"question": "What is 2 + 2?", "answer": 4, "source": "me"},
        {
            "id": "capital",
            "question": "Capital of France?",
            "answer": "Paris",
            "scorer": "f1",
            "level": "easy",
        },
    )
    first, second = load_taskset(str(path), "all")
    assert (first.answer, first.scorer, first.family, first.meta) == (
        "4",
        "numeric",
        "mine",
        {"source": "me"},
    )
    assert (second.id, second.scorer, second.level) == ("capital", "f1", "easy")


def test_jsonl_reads_back_what_it_wrote(tmp_path: Path) -> None:
    made = load_taskset("gym:products", "test", 5)
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(task.model_dump_json() + "\n" for task in made), encoding="utf-8")
    assert load_taskset(str(path), "test").tasks == made.tasks
    with pytest.raises(DataError, match="belongs to the split 'train'"):
        load_taskset(str(path), "train")


def test_jsonl_splits_do_not_overlap_and_all_is_all(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *({"question": f"q{i}", "answer": "x"} for i in range(200)))
    train, test = load_taskset(str(path), "train"), load_taskset(str(path), "test")
    assert not {t.question for t in train} & {t.question for t in test}
    assert len(train) + len(test) == 200
    assert 20 <= len(test) <= 60
    assert [t.question for t in load_taskset(f"{path}?split=all")] == [f"q{i}" for i in range(200)]


def test_jsonl_options_number_and_shuffle(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "b.jsonl", *({"ask": f"q{i}", "gold": f"{i}"} for i in range(30)))
    spec = f"{path}?question=ask&answer=gold&scorer=exact"
    assert [t.answer for t in load_taskset(spec, "all", 3)] == ["0", "1", "2"]
    shuffled = load_taskset(spec, "all", 30, seed=1)
    assert [t.answer for t in shuffled] != [str(i) for i in range(30)]
    assert {t.answer for t in shuffled} == {str(i) for i in range(30)}
    assert load_taskset(spec, "all", 7, seed=1).tasks == shuffled.tasks[:7]
    assert {t.scorer for t in shuffled} == {"exact"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"answer": "x"}', "line 2: no column 'question'"),
        ('{"question": "  "}', "line 2: 'question' is not a non-empty text"),
        ('{"question": "q", "level": 3}', "line 2: level"),
        ('{"question": "ok"}', "line 2: the task .* stands there twice"),
    ],
)
def test_jsonl_names_the_bad_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "ok"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_taskset(str(path), "all")


def test_jsonl_missing_empty_and_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task file"):
        load_taskset(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no tasks"):
        load_taskset(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    with pytest.raises(DataError, match="Failed while reading"):
        load_taskset(str(tmp_path / "latin.jsonl"))
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError):
        load_taskset(str(folder))


def test_file_name_with_a_plus(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a+b.jsonl", {"question": "q", "answer": "x"})
    assert len(load_taskset(str(path), "all")) == 1
    assert len(load_taskset(f"{path}?split=all+gym:products", n=4)) == 3


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, offset in (("train", 0), ("test", 100)):
        rows = ({"question": f"{offset + i} + 1?", "answer": f"so\n#### {offset + i + 1}"} for i in range(20))
        write_rows(folder / f"{split}.jsonl", *rows)
    return folder


def test_hf_dataset_by_name(dataset_folder: Path) -> None:
    train, test = load_taskset(f"hf:{dataset_folder}"), load_taskset(f"hf:{dataset_folder}", "test")
    assert [task.answer for task in train] == [str(i + 1) for i in range(20)]
    assert [task.answer for task in test] == [str(i + 101) for i in range(20)]
    assert {task.scorer for task in test} == {"numeric"}
    assert len(load_taskset(f"hf:{dataset_folder}", "all")) == 40
    chosen = load_taskset(f"hf:{dataset_folder}::test?question=answer&answer=question", "train", 2)
    assert [task.answer for task in chosen] == ["100 + 1?", "101 + 1?"]
    with pytest.raises(ConfigError, match="no split 'dev'"):
        load_taskset(f"hf:{dataset_folder}::dev")
    with pytest.raises(DataError, match="row 0: no column 'nope'"):
        load_taskset(f"hf:{dataset_folder}?question=nope")
    with pytest.raises(ConfigError, match="loading the dataset"):
        load_taskset(f"hf:{dataset_folder}/missing")
