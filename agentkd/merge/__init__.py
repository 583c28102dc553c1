"""Merging: several runs, or the shards of one, become one run without duplicates.

The result is an ordinary run folder: ``filter`` and ``distill`` read it, ``collect`` with the
settings of the run goes on in it with what is missing, and ``collect --replay`` rebuilds it.
"""

from agentkd.merge.run import Merged, merge_runs

__all__ = ["Merged", "merge_runs"]
