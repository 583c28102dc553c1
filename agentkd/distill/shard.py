"""A model that is shared out among the processes: weights, gradients and optimiser, by torch's FSDP2.

Each process keeps a part of every tensor. Whole weights are there only while they are used: those of a
layer from just before it to just behind it, forward and backward, the others (embeddings, head) for a pack.
Every forward and backward pass is a meeting of all processes, so all of them have to make the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from agentkd.distill.ranks import rank, world
from agentkd.errors import ConfigError

__all__ = [
    "Compute",
    "check_values",
    "gathered",
    "part_of",
    "plain_value",
    "read_state",
    "shard",
    "take_over_state",
]

Compute = Callable[[Callable[[], Tensor]], Tensor]
"""Calls a function that uses a model's weights, and returns what it returns."""


class _Root(nn.Module):
    """Calls functions of a model as its own forward pass, around which FSDP gathers what no layer holds.

    The loss reads the head's weight and never calls the head or the model that has it: no hook of
    theirs would run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function()


def shard(model: nn.Module, device: torch.device, low: torch.dtype | None = None) -> Compute:
    """Share a model out among all processes, in place; its parameters are DTensors from here on.

    The gradient of a parameter becomes the sum over all processes by ``backward()`` alone, and is added
    to the one that is there; ``torch.autograd.grad`` gives none.

    Args:
        model: of transformers, with its adapters. It may lie on the CPU: one layer at a time goes to the
            device before it is cut.
        device: where the parts lie.
        low: dtype of a layer's weights while they are whole, for trained weights of a wider one. Autocast
            would make such a copy itself, and keep it whole for the backward pass.

    Returns:
        What every use of the weights has to go through.

    Raises:
        ConfigError: transformers does not say what the model's layers are, or torch is too old.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(
            f"torch {torch.__version__} cannot add up shards as --shard needs it.", "Update it."
        )
    layers = list(_layers(model))
    if not layers:
        raise ConfigError("This model does not say what its layers are.", "Leave --shard out.")
    mesh = init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy()
    if low is not None:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = _Root(model)
    parts = [fully_shard(layer, mesh=mesh, mp_policy=policy) for layer in layers]
    for part in (*parts, fully_shard(root, mesh=mesh)):
        # Losses are parts of one mean: their gradients are added. Gloo knows no other sum than the plain one.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return root


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """What is computed one after another: of every list of modules, those that must not be torn apart."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for several in model.modules():
        if isinstance(several, nn.ModuleList):
            yield from (each for each in several if type(each).__name__ in names)


def gathered(value: Any) -> Any:
    """Dicts and lists with whole tensors in the place of shared-out ones; all processes have to call it.

    Only the first process gets these tensors, on the CPU; in the others there is None.
    """
    if isinstance(value, dict):
        return {key: gathered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [gathered(each) for each in value]
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return None if rank() else whole.cpu()


def plain_value(value: Tensor) -> float:
    """Of a tensor with one number; all processes have to call it when it is the result of shared-out ones."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a tensor of the same shape as another: all, where that is not shared out."""
    if not isinstance(like, DTensor):
        return whole
    # All processes have the same tensor, so nothing is sent. Cloned: it may be a view of a mapped file.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).clone()


def read_state(path: Path, like: Tensor) -> dict[str, Any]:
    """What ``torch.save`` wrote, for parameters as ``like``.

    For shared-out ones the file is mapped instead of read: each process touches little more than its parts.
    """
    shared = isinstance(like, DTensor)
    device = "cpu" if shared else like.device
    state: dict[str, Any] = torch.load(path, map_location=device, mmap=shared, weights_only=True)
    return state


def check_values(saved: Any, parameters: Sequence[Tensor]) -> None:
    """Hold what a file has of the parameters against them.

    Raises:
        ValueError: they are those of another model.
    """
    shapes = [getattr(value, "shape", None) for value in saved] if isinstance(saved, list) else None
    if shapes != [value.shape for value in parameters]:
        raise ValueError("it does not hold the parameters that are trained here")


def take_over_state(
    state: Mapping[str, Any], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Give parameters and optimiser the values of a checkpoint, which holds whole tensors.

    Args:
        state: ``parameters``, in order, and ``optimizer``, the optimiser's ``state_dict()``.
        parameters: shared out or not, among as many processes as there are now.
        optimizer: of these parameters.
    """
    with torch.no_grad():
        for value, saved in zip(parameters, state["parameters"], strict=True):
            value.copy_(part_of(saved, value))
    moments = {
        place: {
            name: part_of(saved, parameters[place]) if saved.shape == parameters[place].shape else saved
            for name, saved in of_one.items()
        }
        for place, of_one in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": moments})
