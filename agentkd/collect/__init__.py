"""Collection: a teacher solves tasks and leaves trajectories.

A run is a folder:

====================  =====================================================================
``tasks.jsonl``       the questions, and ``passages.jsonl`` where there is a corpus
``config.json``       the settings that may not change when the run goes on
``calls-N.jsonl``     every finished model and tool call, one file for each process
``faults-N.jsonl``    every failed call of an endpoint, and what was done about it
``trajectories.jsonl``  finished rollouts, append-only
``errors.jsonl``      rollouts whose last try ended by an error
``manifest.json``     closes the run
====================  =====================================================================

A run that was stopped goes on where it stopped, inside a trajectory if need be.
"""

from agentkd.collect.config import CollectConfig, TeacherConfig, default_processes, load_teachers
from agentkd.collect.estimate import Estimate, estimate
from agentkd.collect.replay import replay
from agentkd.collect.run import Collected, collect, count_faults, expect, price_table

__all__ = [
    "CollectConfig",
    "Collected",
    "Estimate",
    "TeacherConfig",
    "collect",
    "count_faults",
    "default_processes",
    "estimate",
    "expect",
    "load_teachers",
    "price_table",
    "replay",
]
