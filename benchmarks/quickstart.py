"""Does the quick start's loop work? Its full size: more than 400 test tasks, and a longer baseline.

Prints the table, and as its last line one JSON object with the accuracies. The peer in the same run is
chain-of-thought distillation from the same teacher on the same questions, at the same number of steps and
at three times as many. About an hour on two cores; ``--quick`` is the demo's size (ten minutes).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from agentkd.pipeline import quickstart
from agentkd.record import provenance, read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the demo's size")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-quickstart"))
    options = parser.parse_args()
    size = "demo" if options.quick else "full"
    summary = quickstart(options.out / size, size=size, sandbox="fork", fresh=False, quiet=False)
    systems = read_json(options.out / size / "report" / "report.json")["systems"]
    metrics: dict[str, float] = {"seconds": round(summary["seconds"], 1)}
    for name, result in systems.items():
        metrics[f"{name}:all"] = result["overall"]["accuracy"]
        for family, cell in {**result["families"], **result["groups"]}.items():
            metrics[f"{name}:{family}"] = cell["accuracy"]
    line = {
        "name": "quickstart",
        "metrics": metrics,
        "n": {name: result["overall"]["n"] for name, result in systems.items()},
        "runs": 1,
        "commit": provenance()["commit"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
