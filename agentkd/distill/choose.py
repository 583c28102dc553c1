"""The objective that the settings name: one of ours, or yours as ``module:Name``."""

from __future__ import annotations

from agentkd.distill.config import OBJECTIVES, DistillConfig
from agentkd.distill.objectives import DIVERGENCES, READ, MaskedThought, Objective, TeacherObjective
from agentkd.distill.preference import Aft, Dpo, Preference
from agentkd.errors import ConfigError
from agentkd.plugin import make_plugin

__all__ = ["check_teacher", "make_objective", "make_preference", "top_read"]


def make_objective(config: DistillConfig, mask_id: int = 0) -> Objective | None:
    """The objective that the settings name.

    Args:
        config: the settings.
        mask_id: the token that "masked" puts in the place of others.

    Returns:
        None for "sft", which needs no logits, and for a preference.

    Raises:
        ConfigError: one of yours that cannot be loaded, or is neither an objective nor a preference.
    """
    name = config.objective
    if name in DIVERGENCES:
        return TeacherObjective(DIVERGENCES[name], config.teacher_share, READ.get(name))
    if name == "masked":
        return MaskedThought(config.mask_rate, mask_id)
    made = None if name in OBJECTIVES else _own(config)
    return made if isinstance(made, Objective) else None


def make_preference(config: DistillConfig) -> Preference | None:
    """The preference that the settings name; None for any other objective.

    Raises:
        ConfigError: as :func:`make_objective`.
    """
    if config.objective == "aft":
        return Aft(config.aft_bound, 1.0 if config.sft_weight is None else config.sft_weight)
    if config.objective == "dpo":
        return Dpo(config.dpo_beta, config.sft_weight or 0.0)
    made = None if config.objective in OBJECTIVES else _own(config)
    return made if isinstance(made, Preference) else None


def _own(config: DistillConfig) -> Objective | Preference:
    made = make_plugin(config.objective, config, "objective")
    if isinstance(made, (Objective, Preference)):
        return made
    raise ConfigError(
        f"{config.objective} is neither an Objective nor a Preference.",
        "An Objective has needs_teacher, inputs and losses; a Preference has needs_reference, sft_weight and "
        "loss. See docs/objectives.md.",
    )


def top_read(objective: Objective | None) -> int | None:
    """How many of the teacher's likeliest tokens an objective reads; None: all, or it needs no teacher."""
    if objective is None or not objective.needs_teacher:
        return None
    top: int | None = getattr(objective, "top", None)
    return top


def check_teacher(config: DistillConfig) -> None:
    """Hold the teacher that was named against what the objective needs.

    Raises:
        ConfigError: none, two, one that the objective has no use for, or a record of a few tokens where it
            reads the whole distribution.
    """
    objective = make_objective(config)
    if objective is None or not objective.needs_teacher:
        if config.teacher is not None or config.teacher_logprobs is not None:
            option = "--teacher-model" if config.teacher is not None else "--teacher-logprobs"
            raise ConfigError(
                f"The objective {config.objective} has no use for a teacher model.",
                f"Leave {option} out, or choose another --objective.",
            )
        return
    if config.teacher is not None and config.teacher_logprobs is not None:
        raise ConfigError("Two teachers were given.", "Leave --teacher-model out, or --teacher-logprobs.")
    if config.teacher_logprobs is not None and top_read(objective) is None:
        raise ConfigError(
            f"The objective {config.objective} reads the teacher's whole distribution, and "
            f"{config.teacher_logprobs} has only the likeliest tokens.",
            f"Name the model with --teacher-model, or choose --objective {' or '.join(READ)}.",
        )
    if config.teacher is None and config.teacher_logprobs is None:
        record = "" if top_read(objective) is None else ", or --teacher-logprobs FILE"
        raise ConfigError(
            f"The objective {config.objective} needs a teacher model.",
            f"Add --teacher-model FOLDER_OR_ID{record}.",
        )
