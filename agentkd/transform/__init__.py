"""Transforms: from trajectories to trajectories, between the filter and the training.

A :class:`Transform` takes all trajectories of a file and returns those of the next; what it changed, it
says in each one's ``changes``. Those that ask a model get it through :class:`Means`, whose answers are kept,
so that a run which is stopped goes on without asking anything twice.

=================  ========  ====================================================================
name               needs     what it does
=================  ========  ====================================================================
shorten            endpoint  thoughts rewritten to a length that fits the difficulty (DAP)
plan-first         endpoint  a plan without calculations before the first thought
retro-search       endpoint  cut where the agent changes course, go on without changing (Retro-Search)
skip-chunks        student   sentences of thought that the student's next action does not need, left out
student-friendly   student   of several right trajectories of a task the likeliest (SmartAD)
success-gap        two runs  more of the families in which the student is behind (DDK)
temperature        -         low temperatures first (DASD)
passages           corpus    passages for the question before a chain of thought (CoT + retrieval)
=================  ========  ====================================================================
"""

from __future__ import annotations

from agentkd.transform.means import Means, Transform
from agentkd.transform.run import TRANSFORMS, make_transform, transform_run

__all__ = ["TRANSFORMS", "Means", "Transform", "make_transform", "transform_run"]
