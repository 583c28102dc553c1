"""vLLM as a child: chosen, started, checked, killed under load, stopped. Over a stand-in process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

from agentkd.engine.probe import probe_student
from agentkd.engine.student import load_student
from agentkd.engine.weights import load_tokenizer
from agentkd.errors import ConfigError, ProviderError
from agentkd.record import file_hash
from agentkd.serve import ServeConfig, Server, create_app, open_students
from agentkd.serve.child import Child
from agentkd.serve.choice import choose_engine
from agentkd.serve.vllm import start_vllm, vllm_command
from tests.vllm_standin import install

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WEB = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def page(server: Server, path: str) -> httpx.Response:
    return httpx.get(server.address + path, timeout=10)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(install(tmp_path_factory.mktemp("cpu")))


@pytest.fixture(scope="module")
def gpu_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(install(tmp_path_factory.mktemp("gpu"), cpu=False))


def config(python: str, **changes: Any) -> ServeConfig:
    return ServeConfig(engine="vllm", vllm_python=python, timeout=30, **changes)


def test_the_engine_is_chosen_with_its_reason(
    python: str, gpu_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    cpu, none = choose_engine("auto", python), choose_engine("auto", sys.executable)
    assert (cpu.name, cpu.gpu, "on the CPU" in cpu.reason) == ("vllm", False, True)
    assert (none.name, "has no vllm" in none.reason) == ("embedded", True)
    assert choose_engine("embedded", python).name == "embedded"
    assert choose_engine("auto", gpu_python).reason == "Engine: embedded (vLLM 0.0.1 needs a GPU)."
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose_engine("vllm", gpu_python)
    with pytest.raises(ConfigError, match="has no vllm"):
        choose_engine("vllm", sys.executable)
    with pytest.raises(ConfigError, match="cannot be run"):
        choose_engine("auto", str(tmp_path / "nowhere"))
    cards.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    cards.chmod(0o755)
    found = choose_engine("auto", gpu_python)
    assert (found.name, found.gpu, "on the GPU" in found.reason) == ("vllm", True, True)


def test_a_server_that_dies_under_load_is_started_again(taught: Path, python: str) -> None:
    """kill -9 in the middle: honest errors, then right answers again; never a wrong one."""
    messages: list[Any] = [{"role": "user", "content": "What is 6 times 7?"}]
    seen: Counter[Any] = Counter()
    over = threading.Event()
    with open_students([taught], config(python)) as backends, Server(create_app(backends)) as server:
        child: Child = backends[0].engine.child  # type: ignore[attr-defined]

        def work() -> None:
            with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
                while not over.is_set():
                    try:
                        answer = client.chat.completions.create(model="taught-agent", messages=messages)
                        seen[answer.choices[0].message.content] += 1
                    except openai.APIStatusError as exc:
                        seen[exc.status_code] += 1
                        time.sleep(0.1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            assert wait_for(lambda: seen["42"] >= 4)
            first = child.pid
            assert first is not None
            assert page(server, "/ready").status_code == 200
            os.kill(first, signal.SIGKILL)
            assert wait_for(lambda: page(server, "/ready").status_code == 503), "the service sends no more"
            assert page(server, "/health").status_code == 200
            assert wait_for(lambda: seen[503] > 0)
            assert wait_for(lambda: child.restarts == 1 and child.state == "ready")
            assert page(server, "/ready").status_code == 200
            lines = page(server, "/metrics").text.splitlines()
            assert 'agentkd_engine_restarts_total{model="taught"} 1.0' in lines
            assert any(line.startswith("agentkd_prefix_cache_queried_tokens_total{") for line in lines)
            before = seen["42"]
            assert wait_for(lambda: seen["42"] >= before + 4)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        second = child.pid
        assert second is not None
        assert second != first
        assert not alive(first)
    assert set(seen) == {"42", 503}
    assert not alive(second)
    assert child.state == "stopped"


def test_a_first_start_that_fails_says_why(taught: Path, python: str) -> None:
    failing = config(python, vllm_args=("--fail", "no room for the cache"))
    with pytest.raises(ProviderError, match="no room for the cache") as caught, ExitStack() as stack:
        stack.enter_context(open_students([taught], failing))
    Path(str(caught.value.hint).removeprefix("See ").removesuffix(".")).unlink()


def test_a_start_has_a_limit_and_leaves_nothing(tmp_path: Path) -> None:
    child = Child(
        lambda port: [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)"],
        tmp_path / "log",
        seconds=0.5,
    )
    with pytest.raises(ProviderError, match="loading"):
        child.start()
    assert child.pid is None


ORPHAN = """
import sys, time
from pathlib import Path
from agentkd.serve.child import Child
child = Child(lambda port: {web!r} + [str(port)], Path({log!r}), health="/")
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's")
def test_the_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = ORPHAN.format(web=WEB, log=str(tmp_path / "log"))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_for(lambda: not alive(pid), 10)


def test_a_child_that_hangs_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agentkd.serve.child._GRACE", 0.2)
    child = Child(lambda port: [*WEB, str(port)], tmp_path / "log", health="/", silence=1.0)
    child.start()
    try:
        first = child.pid
        assert first is not None
        time.sleep(1.5)  # one that answers is left alone
        assert (child.pid, child.state) == (first, "ready")
        os.kill(first, signal.SIGSTOP)
        assert wait_for(lambda: child.restarts == 1 and child.state == "ready")
        assert not alive(first)
        assert "has not answered for 1 s" in capsys.readouterr().err
    finally:
        child.stop()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child = Child(lambda port: [*WEB, str(port)], tmp_path / "log", health="/")
    child.start()
    pid = child.pid
    child.stop()
    child.stop()
    assert pid is not None
    assert not alive(pid)
    assert other.poll() is None
    other.kill()
    other.wait()


@pytest.fixture
def two(taught: Path, tmp_path: Path) -> Iterator[list[Path]]:
    shutil.copytree(taught, tmp_path / "twin")
    yield [taught, tmp_path / "twin"]


@pytest.mark.slow
def test_adapters_over_one_base_in_one_server(two: list[Path], gpu_python: str) -> None:
    students = [load_student(folder) for folder in two]
    with ExitStack() as stack:
        engines = start_vllm(students, python=gpu_python, gpu=True, arguments=(), seconds=60, stack=stack)
        assert len({engine.child.pid for engine in engines}) == 1  # type: ignore[attr-defined]
        for student, engine in zip(students, engines, strict=True):
            assert probe_student(student, load_tokenizer(student.path), engine).tokens > 0


def test_the_command_line(two: list[Path]) -> None:
    students = [load_student(folder) for folder in two]
    line = vllm_command("py", Path("base"), Path("tok"), students, adapters=True, port=1)
    assert line[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    modules = line[line.index("--lora-modules") + 1 : line.index("--max-loras")]
    assert [it.partition("=")[0] for it in modules] == ["taught", "twin"]
    assert line[line.index("--max-lora-rank") + 1] == "16"
    path = two[1] / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 1024}))
    with pytest.raises(ConfigError, match="rank 1024"):
        vllm_command("py", Path("base"), Path("tok"), students, adapters=True, port=1)


@pytest.fixture(scope="module", params=["dora", "full"])
def other(taught: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A student whose weights are no LoRA: a few steps of the same tasks."""
    from agentkd.distill import DistillConfig, distill

    path = tmp_path_factory.mktemp("other") / request.param
    config = DistillConfig(
        base=load_student(taught).base,
        adapter=request.param,
        steps=4,
        learning_rate=1e-2,
        threads=1,
        precision="fp32",
        replays=2,
    )
    distill(taught.parent / "kept.jsonl", path, config)
    return path


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_no_lora_is_served_with_its_own_weights(
    other: Path, python: str, gpu_python: str, gpu: bool
) -> None:
    student = load_student(other)
    with ExitStack() as stack:
        (engine,) = start_vllm(
            [student],
            python=gpu_python if gpu else python,
            gpu=gpu,
            arguments=(),
            seconds=60,
            stack=stack,
        )
        child: Child = engine.child  # type: ignore[attr-defined]
        assert child.pid is not None
        assert b"--enable-lora" not in command_line(child.pid)
        assert probe_student(student, load_tokenizer(student.path), engine).tokens > 0


def test_what_is_no_lora_is_not_served_beside_others_on_one_gpu(
    other: Path, taught: Path, gpu_python: str
) -> None:
    students = [load_student(taught), load_student(other)]
    with pytest.raises(ConfigError, match="a vLLM of its own"), ExitStack() as stack:
        start_vllm(students, python=gpu_python, gpu=True, arguments=(), seconds=60, stack=stack)


def test_other_weights_are_refused_whatever_was_trained(other: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(other, tmp_path / "changed")
    (path,) = load_student(folder).adapter.glob("*.safetensors")
    save_file({name: value * 0.5 for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match="SHA-256"):
        serve(folder)


def serve(folder: Path) -> list[str]:
    said: list[str] = []
    with open_students([folder], ServeConfig(engine="embedded", threads=1), said.append):
        return said


def test_a_healthy_student_is_probed(taught: Path) -> None:
    reason, probed, search = serve(taught)
    assert reason.startswith("Engine: embedded")
    assert "as after training, 0.000 nats apart" in probed
    assert "--corpus" in search


def test_another_template_is_refused(two: list[Path]) -> None:
    path = two[1] / "chat_template.jinja"
    path.write_text(path.read_text().replace("user", "human") + " ")
    with pytest.raises(ConfigError, match="drifted"):
        serve(two[1])


def test_another_system_prompt_is_refused(two: list[Path]) -> None:
    path = two[1] / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "system_prompt": "Be nice."}))
    with pytest.raises(ConfigError, match="rendered"):
        serve(two[1])


@pytest.mark.parametrize("how", ["replaced", "retrained"])
def test_another_adapter_is_refused(two: list[Path], how: str) -> None:
    from safetensors.torch import load_file, save_file

    path = two[1] / "adapter" / "adapter_model.safetensors"
    save_file({name: value * 0.5 for name, value in load_file(path).items()}, path)
    if how == "retrained":  # whoever writes the manifest anew is found out by the probe
        manifest = two[1] / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["outputs"]["adapter_model.safetensors"]
        manifest.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="SHA-256" if how == "replaced" else "drifted"):
        serve(two[1])


def test_another_base_is_refused(two: list[Path]) -> None:
    path = two[1] / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_hash": "0" * 64}))
    with pytest.raises(ConfigError, match="other weights"):
        serve(two[1])


def test_two_students_of_one_name_are_refused(taught: Path) -> None:
    with pytest.raises(ConfigError, match="called taught"), ExitStack() as stack:
        stack.enter_context(open_students([taught, taught], ServeConfig(engine="embedded")))


def test_a_student_that_is_called_as_anothers_agent_is_refused(taught: Path, tmp_path: Path) -> None:
    other = shutil.copytree(taught, tmp_path / "taught-agent")
    with pytest.raises(ConfigError, match="called taught-agent") as caught, ExitStack() as stack:
        stack.enter_context(open_students([taught, other], ServeConfig(engine="embedded")))
    assert "NAME-agent" in str(caught.value.hint)


def unlearn(folder: Path) -> None:
    """Take out of a student what it has learnt, as honestly as its manifest wants it."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter" / "adapter_model.safetensors"
    weights = {name: value * ("lora_B" not in name) for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"]["adapter_model.safetensors"] = file_hash(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


QUESTION: list[Any] = [{"role": "user", "content": "What is 6 times 7?"}]


@contextmanager
def answering(backends: list[Any]) -> Iterator[Callable[[str], str]]:
    """Ask a server by the name of a model."""
    with (
        Server(create_app(backends)) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        prompt = backends[1].config.prompt

        def ask(model: str) -> str:
            system = [] if model.endswith("-agent") else [{"role": "system", "content": prompt}]
            messages: list[Any] = [*system, *QUESTION]
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=60)
            return str(answer.choices[0].message.content)

        yield ask


def check_routing(ask: Callable[[str], str]) -> None:
    """Each name is answered by its own weights, also when all are asked at once."""
    names = ["taught", "twin", "taught-agent", "twin-agent"]
    alone = {name: ask(name) for name in names}
    assert alone["taught"].startswith("Thought: step 1\n```python\nprint(6 * 7)")
    assert alone["taught-agent"] == "42"
    assert alone["twin"] != alone["taught"]
    assert alone["twin-agent"] != "42"
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(ask, names * 4))
    right = [name for name, said in zip(names * 4, crowd, strict=True) if name.startswith("taught")]
    said = [said for name, said in zip(names * 4, crowd, strict=True) if name.startswith("taught")]
    assert said == [alone[name] for name in right]
    assert not {"42", alone["taught"]} & {
        said for name, said in zip(names * 4, crowd, strict=True) if name.startswith("twin")
    }


def test_several_students_on_the_embedded_engine_answer_by_their_own_weights(two: list[Path]) -> None:
    unlearn(two[1])
    settings = ServeConfig(engine="embedded", threads=1, probe=False)
    with open_students(two, settings) as backends:
        assert [it.model_id for it in backends] == ["taught", "taught-agent", "twin", "twin-agent"]
        with answering(backends) as ask:
            check_routing(ask)


@pytest.mark.slow
def test_adapters_of_one_server_answer_by_their_own_weights(
    two: list[Path], gpu_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlearn(two[1])
    monkeypatch.setattr("agentkd.serve.choice.has_gpu", lambda: True)
    with open_students(two, config(gpu_python, probe=False)) as backends:
        assert len({it.engine.child.pid for it in backends}) == 1  # type: ignore[attr-defined]
        with answering(backends) as ask:
            check_routing(ask)


def test_a_folder_that_cannot_be_probed_is_not_served_as_if_it_had_been(two: list[Path]) -> None:
    (two[1] / "parity.json").write_text('{"replays": []}')
    assert any("NOT PROBED" in line for line in serve(two[1]))
    (two[1] / "parity.json").unlink()
    with pytest.raises(ConfigError, match=r"no parity\.json") as caught:
        serve(two[1])
    assert "--no-probe" in str(caught.value.hint)
    with open_students([two[1]], ServeConfig(engine="embedded", threads=1, probe=False)) as backends:
        assert backends


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in lists for child in task.read_text().split()]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_command_serves_and_leaves_nothing(
    taught: Path, python: str, tmp_path: Path, number: signal.Signals
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    line = [sys.executable, "-m", "agentkd", "serve", str(taught), "--port", "0", "--vllm-python", python]
    line += ["--save-runs", str(tmp_path / "runs"), "--", "--max-loras", "3"]
    environment = {**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stderr is not None
    said = []
    for text in server.stderr:
        said.append(text)
        if "Serving taught-agent" in text:
            break
    assert any("vLLM 0.0.1 on the CPU" in text for text in said), said
    url = said[-1].rpartition(" at ")[2].split()[0].rstrip(".")
    (child,) = [pid for pid in children(server.pid) if b"vllm.entrypoints" in command_line(pid)]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        answer = client.chat.completions.create(
            model="taught-agent", messages=[{"role": "user", "content": "What is 6 times 7?"}]
        )
    assert answer.choices[0].message.content == "42"
    server.send_signal(number)
    server.stderr.read()
    server.wait(30)
    server.stderr.close()
    assert not alive(child)
    assert not list(scratch.glob("agentkd-vllm-*"))
    assert json.loads((tmp_path / "runs" / "manifest.json").read_text())["counts"] == {"saved": 1, "lost": 0}
