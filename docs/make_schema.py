"""Writes docs/trajectory.schema.json from the record's definition."""

from __future__ import annotations

import json
from pathlib import Path

from agentkd.trajectory import Trajectory


def main() -> None:
    path = Path(__file__).with_name("trajectory.schema.json")
    path.write_text(json.dumps(Trajectory.model_json_schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
