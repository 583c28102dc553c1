"""One training by several processes, each with a GPU (or a share of the cores) of its own.

Every process has the whole model, or a part of it (:mod:`agentkd.distill.shard`), computes its share of each
step's packs, and gets the sum of all gradients: the step is that of one process, up to the order in which
numbers are added. The first writes the student folder; the others read its checkpoint. The environment
variables are those of torchrun.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["group", "mine", "of_the_first", "rank", "start_ranks", "sum_over_ranks", "world"]

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 for the first; a variable of that name alone means nothing."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    """How many processes train together: torchrun's variables, which come together or not at all."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def mine(items: Sequence[T]) -> Sequence[T]:
    """What of a step this process computes."""
    return items[rank() :: world()]


@contextmanager
def group(out: Path) -> Iterator[Path]:
    """Join the other processes; yields the folder that this one may write."""
    if world() == 1:
        yield out
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if rank():
                for file in out.glob("loss.jsonl"):
                    shutil.copy(file, scratch)
                for file in out.glob("*.pt"):  # they can be large, and stay as they are up to the first step
                    (Path(scratch) / file.name).symlink_to(file.resolve())
            distributed.barrier()  # nobody cuts the log before all have read it
            yield Path(scratch) if rank() else out
    finally:
        distributed.destroy_process_group()


def sum_over_ranks(parameters: Sequence[torch.nn.Parameter], value: float, device: torch.device) -> float:
    """Add up a number of all processes, and the gradients of parameters, in place.

    Args:
        parameters: those whose gradients are not added up yet.
        value: the number.
        device: where this process computes.
    """
    if world() == 1:
        return value
    import torch
    from torch import distributed

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
    total = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item()


def of_the_first(value: float, device: torch.device) -> float:
    """The first process's value: what decides when to end must be one number for all."""
    if world() == 1:
        return value
    import torch
    from torch import distributed

    shared = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.broadcast(shared, 0)
    return shared.item()


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run ``agentkd ARGUMENTS`` in so many processes that train together.

    Returns:
        The exit code: of the first that failed, or 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "agentkd", *arguments],
            env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.DEVNULL if number else None,
        )
        for number in range(count)
    ]
    try:
        while True:
            codes = [it.poll() for it in running]
            failed = next((code for code in codes if code), 0)
            if failed or None not in codes:
                return failed
            time.sleep(0.1)
    finally:
        for it in running:
            if it.poll() is None:
                it.terminate()
        for it in running:
            it.wait()
