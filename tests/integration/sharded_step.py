"""Loss and gradients of one step, by one process or by several that share the model out.

``python -m tests.integration.sharded_step CASES RESULT`` is one process; the first writes the results.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from agentkd.distill.choose import make_objective
from agentkd.distill.config import DistillConfig
from agentkd.distill.learner import Learner
from agentkd.distill.loop import _accumulate
from agentkd.distill.ranks import group, mine, rank, sum_over_ranks
from agentkd.distill.shard import gathered, part_of, plain_value
from agentkd.distill.workers import Goal, side_by_side


def one_step(base: str, settings: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """Of adapters that do something: fresh ones are zero, and then half of the gradients are, too."""
    from tests.integration.test_distill_learner import examples

    config = DistillConfig(**settings)
    made = Learner(Path(base), config)
    parameters = made.parameters()
    torch.manual_seed(2)
    with torch.no_grad():
        for value in parameters if not made.whole else ():
            if value.ndim == 2:
                value.copy_(part_of(torch.randn(value.shape) / 10, value))
    made.refresh()
    batch = examples(*lengths)
    objective = make_objective(config)
    loss = 0.0
    with side_by_side(made, config, Goal(objective)) as workers:
        units = mine(workers.lay_out(batch, 0))
        for part, grads in workers.map(units, sum(it.weight for it in batch), 0, 1):
            loss += part
            _accumulate(parameters, grads)
    loss = sum_over_ranks(() if made.sharded else parameters, loss, made.device)
    grads = gathered([value.grad.clone() for value in parameters])  # clipping works in place
    norm = plain_value(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    return {
        "loss": loss,
        "grads": grads,
        "norm": norm,
        "clipped": gathered([value.grad for value in parameters]),
        "units": len(units),
        "counting": sum_over_ranks((), sum(unit.counts for unit in units), made.device),
        "held": sum((it.to_local() if made.sharded else it).numel() for it in made.peft.parameters()),
    }


def main() -> None:
    """See the module."""
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
    warnings.simplefilter("ignore", DeprecationWarning)
    cases, result = sys.argv[1:]
    with group(Path(result)):
        found = [one_step(**case) for case in json.loads(cases)]
        if not rank():
            torch.save(found, result)


if __name__ == "__main__":
    main()
