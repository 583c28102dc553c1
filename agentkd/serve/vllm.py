"""vLLM as an engine: a child process that is asked with token ids.

The conversation is rendered here, by the function that training uses, and vLLM gets the ids; so a
prompt cannot differ from the trained one, and everything above an :class:`agentkd.engine.Engine`
(bare student, agent, sampler) is the same as over the embedded engine.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from agentkd.engine import GREEDY_BELOW, Cancellation, Completion, Engine
from agentkd.engine.student import Student
from agentkd.errors import ConfigError, ContextOverflowError, ProviderError
from agentkd.record import read_json
from agentkd.serve.child import Child
from agentkd.serve.request import EngineRefusal
from agentkd.serve.wire import Wire, lines

__all__ = ["RANKS", "CacheCounts", "VLLMEngine", "start_vllm", "vllm_command"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM can be started with."""
_PATIENCE = 120.0
"""Seconds without a single token after which a request is given up."""
_ASIDE_SECONDS = 5.0
"""For what is asked beside the answers: the list of models, the metrics."""
_CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"


class CacheCounts(NamedTuple):
    """What a vLLM server has looked up in its prefix cache since it started; tokens."""

    queried_tokens: int
    hit_tokens: int


class VLLMEngine:
    """One model of a vLLM server. See :class:`agentkd.engine.Engine`.

    Args:
        child: the server.
        model: the name it serves the student by.
    """

    def __init__(self, child: Child, model: str) -> None:
        self.child, self.model = child, model
        self._wire = Wire(_PATIENCE)
        self.context = self._context()

    def _context(self) -> int:
        listed = json.loads(self._get("/v1/models"))["data"]
        found = [it.get("max_model_len") for it in listed if it["id"] == self.model]
        if not found:
            raise ConfigError(
                f"vLLM does not serve {self.model}.", "Is --served-model-name among its options?"
            )
        longest = next((it["max_model_len"] for it in listed if it.get("max_model_len")), None)
        return int(found[0] or longest or 2**31)

    def _get(self, path: str) -> bytes:
        with (
            self._answering(),
            self._wire.call(self.child.require() + path, patience=_ASIDE_SECONDS) as answer,
        ):
            return answer.read()

    @property
    def prefix_cache(self) -> CacheCounts | None:
        """As the server counts now, for all its models; None where it does not say."""
        try:
            text = self._get("/metrics").decode("utf-8", "replace")
        except ProviderError:
            return None
        queried, hits = (_counted(text, f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits"))
        return None if queried is None or hits is None else CacheCounts(queried, hits)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[int, int], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> list[Completion]:
        """See :meth:`agentkd.engine.Engine.generate`.

        Raises:
            EngineRefusal: vLLM does not take such a request.
            ProviderError: the server is down, or answered with an error.
        """
        if len(prompt_ids) >= self.context:
            raise ContextOverflowError(
                f"The prompt has {len(prompt_ids)} tokens; the model's context holds {self.context}.",
                "Shorten the conversation.",
            )
        greedy = temperature < GREEDY_BELOW
        several = 1 if greedy else n  # vLLM refuses equal greedy answers
        body = {
            "model": self.model,
            "prompt": [int(token) for token in prompt_ids],
            "n": several,
            "max_tokens": min(max_new_tokens, self.context - len(prompt_ids)),
            "temperature": 0.0 if greedy else temperature,
            "top_p": top_p or 1e-6,  # vLLM refuses 0, by which the likeliest token is meant
            "seed": None if seed is None else seed % 2**63,
            "stop": [text for text in stop if text],
            "logprobs": 1,
            "return_token_ids": True,
            "stream": True,
        }
        answers = [_Answer() for _ in range(several)]
        with closing(self._stream(body, cancellation)) as chunks:
            for choice in (choice for chunk in chunks for choice in chunk["choices"]):
                index = choice["index"]
                for token in answers[index].add(choice):
                    for twin in range(n) if several < n else (index,):
                        if on_token is not None:
                            on_token(twin, token)
        done = [answer.completion() for answer in answers]
        return done if several == n else done * n

    def _stream(self, body: dict[str, Any], cancellation: Cancellation | None) -> Generator[dict[str, Any]]:
        """The events of one request; leaving it early hangs up, and vLLM drops the request."""
        url = self.child.require() + "/v1/completions"
        with self._answering(), self._wire.call(url, body, cancellation=cancellation) as answer:
            if answer.status != 200:
                raise _refusal(answer.status, answer.read())
            for line in lines(answer, b"data: [DONE]"):
                if not line.startswith(b"data: "):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise ProviderError(f"vLLM failed: {_words(chunk)}")
                yield chunk

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Name what can happen to a connection."""
        try:
            yield
        except (OSError, HTTPException, ValueError) as exc:
            raise ProviderError(
                f"{self.child.name} broke off ({type(exc).__name__}).", "Try again in some seconds."
            ) from exc

    def close(self) -> None:
        """Close the connections; the server belongs to who started it."""
        self._wire.close()


class _Answer:
    """One continuation as it comes."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.reason: str | None = None

    def add(self, choice: dict[str, Any]) -> list[int]:
        """Take a piece; returns its tokens."""
        fresh = [int(token) for token in choice.get("token_ids") or ()]
        self.ids += fresh
        self.logprobs += [float(it) for it in (choice.get("logprobs") or {}).get("token_logprobs") or ()]
        self.text += choice["text"]
        self.reason = choice.get("finish_reason") or self.reason
        return fresh

    def completion(self) -> Completion:
        """The whole of it.

        Raises:
            ProviderError: it has no end, or no token ids.
        """
        if self.reason not in ("stop", "length"):
            raise ProviderError(f"vLLM ended a request by {self.reason!r}.")
        if not self.ids:
            raise ProviderError("vLLM returned no token ids.", "vLLM 0.10.2 or later does.")
        reason: Any = self.reason
        return Completion(tuple(self.ids), self.text, tuple(self.logprobs), reason)


def _words(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]


def _refusal(status: int, content: bytes) -> ProviderError:
    try:
        words = _words(json.loads(content))
    except (ValueError, AttributeError):
        words = content.decode("utf-8", "replace")[:300]
    if status == 400 and "context length" in words:
        return ContextOverflowError("The conversation no longer fits the model's context.")
    if status in (400, 422):
        return EngineRefusal(f"vLLM does not take this request: {words}")
    return ProviderError(f"vLLM answered with status {status}: {words}")


def _counted(text: str, name: str) -> int | None:
    """The sum of a counter over its labels, on a page for Prometheus; None where it is not there."""
    values = [
        line.rpartition(" ")[2] for line in text.splitlines() if line.startswith((name + "{", name + " "))
    ]
    return int(sum(map(float, values))) if values else None


def vllm_command(
    python: str, model: Path, tokenizer: Path, students: Sequence[Student], *, adapters: bool, port: int
) -> list[str]:
    """The command line of vLLM's server, without what the user adds.

    Args:
        python: the interpreter.
        model: folder of the base model, or of merged weights.
        tokenizer: folder of the tokenizer.
        students: served as adapters of the base, or the one that has the weights in ``model``.
        adapters: which of the two.
        port: on loopback.

    Raises:
        ConfigError: an adapter's rank is beyond vLLM's limit.
    """
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--tokenizer", str(tokenizer), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-prefix-caching"]
    if not adapters:
        return [*command, "--served-model-name", *(_name(student) for student in students)]
    ranks = [_rank(student) for student in students]
    modules = [f"{_name(student)}={student.adapter.resolve()}" for student in students]
    command += ["--served-model-name", "agentkd-base", "--enable-lora", "--lora-modules", *modules]
    return [*command, "--max-loras", str(len(students)), "--max-lora-rank", str(max(ranks))]


def _name(student: Student) -> str:
    return student.path.resolve().name


def _lora(student: Student) -> dict[str, Any] | None:
    """Settings of an adapter that vLLM can add to its base; None for DoRA or a whole model."""
    if student.weights == "model":
        return None
    settings: dict[str, Any] = read_json(student.adapter / "adapter_config.json")
    return None if settings.get("use_dora") else settings


def _rank(student: Student) -> int:
    """The limit that vLLM must be started with for this adapter."""
    rank = int((_lora(student) or {})["r"])
    limit = next((limit for limit in RANKS if limit >= rank), None)
    if limit is None:
        raise ConfigError(
            f"The adapter of {_name(student)} has rank {rank}; vLLM takes {RANKS[-1]} at most.",
            "Serve it by --engine embedded, or distil with a lower rank.",
        )
    return limit


def start_vllm(
    students: Sequence[Student],
    *,
    python: str,
    gpu: bool,
    arguments: Sequence[str],
    seconds: float,
    stack: ExitStack,
) -> list[Engine]:
    """Start what serves the students: one server with adapters on a GPU, one each on a CPU.

    On a CPU a LoRA makes the first token of a long prompt an order of magnitude slower, so there the
    adapter is merged into the base model, in a folder that is removed at the end. DoRA, which vLLM does
    not know, is merged on a GPU as well; such a student, or a whole model, is served by itself.

    Args:
        students: checked already.
        python: the interpreter that has vllm.
        gpu: whether there is one.
        arguments: passed on as they are.
        seconds: what a start may take.
        stack: ends what was started.

    Raises:
        ConfigError: students that need several servers on a GPU, or a rank that is too high.
        ProviderError: a server did not start.
    """
    from agentkd.engine.weights import resolve_model

    if gpu:
        _refuse_several_servers(students)
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentkd-vllm-")))
    adapters = gpu and all(_lora(student) for student in students)
    groups = [list(students)] if adapters else [[student] for student in students]
    engines: list[Engine] = []
    for number, group in enumerate(groups):
        model = resolve_model(group[0].base) if adapters else _merged(group[0], scratch / f"merged-{number}")
        descriptor, log = tempfile.mkstemp(prefix="agentkd-vllm-", suffix=".log")
        os.close(descriptor)
        environment = dict(os.environ)
        if not gpu:
            environment.setdefault(_CPU_CACHE, "2")  # GiB; the default takes a large share of the memory
        command = partial(_command, python, model, group, adapters, arguments)
        command(0)  # raises what is wrong before anything is started
        child = Child(command, Path(log), environment=environment, seconds=seconds, name="vLLM")
        stack.callback(child.stop)
        child.start()
        stack.callback(Path(log).unlink, missing_ok=True)  # it stays where the start failed
        for student in group:
            engine = VLLMEngine(child, _name(student))
            stack.callback(engine.close)
            engines.append(engine)
    return engines


def _refuse_several_servers(students: Sequence[Student]) -> None:
    """One server takes the GPU's memory, and has one base model."""
    if len({student.base_hash for student in students}) > 1:
        raise ConfigError(
            "The students are of several base models.", "Start one agentkd serve for each base on a GPU."
        )
    alone = next((student for student in students if _lora(student) is None), None)
    if alone is not None and len(students) > 1:
        raise ConfigError(
            f"{_name(alone)} is no LoRA of its base model, and needs a vLLM of its own.",
            "Start one agentkd serve for it on a GPU, and another for the others.",
        )


def _command(
    python: str,
    model: Path,
    students: Sequence[Student],
    adapters: bool,
    arguments: Sequence[str],
    port: int,
) -> list[str]:
    tokenizer = students[0].path.resolve()
    return [*vllm_command(python, model, tokenizer, students, adapters=adapters, port=port), *arguments]


def _merged(student: Student, folder: Path) -> Path:
    """The student as a model folder in bf16."""
    import torch

    from agentkd.engine.torch_engine import load_student_model
    from agentkd.engine.weights import load_tokenizer

    load_student_model(student).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(student.path).save_pretrained(folder)
    return folder
