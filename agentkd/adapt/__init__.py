"""Tool-usage adaptation: the data from which a student learns to use tools only where it needs them.

The stage writes data sets, and training is left to ``agentkd distill --from STUDENT``:

1. :mod:`.knowledge`: solutions without tools, made of trajectories with tools (world-knowledge distillation);
2. :mod:`.partition`: which training questions the student so taught answers directly (easy), and which it
   does not (hard);
3. :mod:`.mix`: easy questions with a direct answer, hard ones with the tools' trajectory, in balance.

Source: *Adapting While Learning: Grounding LLMs for Scientific Problems with Intelligent Tool Usage
Adaptation* (arXiv 2411.00412).
"""

from agentkd.adapt.config import AdaptConfig
from agentkd.adapt.knowledge import Rejected, Rewriter, Solution, literal_rewriter, model_rewriter
from agentkd.adapt.mix import balanced_copies
from agentkd.adapt.partition import Answer, Decision, Respondent, partition
from agentkd.adapt.run import Adapted, adapt

__all__ = [
    "AdaptConfig",
    "Adapted",
    "Answer",
    "Decision",
    "Rejected",
    "Respondent",
    "Rewriter",
    "Solution",
    "adapt",
    "balanced_copies",
    "literal_rewriter",
    "model_rewriter",
    "partition",
]
