"""Training a student on kept trajectories by LoRA."""

from __future__ import annotations

from agentkd.distill.config import DistillConfig
from agentkd.distill.train import distill

__all__ = ["DistillConfig", "distill"]
