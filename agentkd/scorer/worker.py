"""The process behind :mod:`agentkd.scorer.workers`: compares two mathematical answers a line."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any


def main() -> None:
    """Serve until the input ends. Arguments: CPU seconds of one comparison, bytes of memory."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no verdict
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)

    from agentkd.scorer.equivalence import equivalent

    equivalent(r"\frac{1}{2}", "x")  # the first use builds the parser, at nobody's cost
    for line in sys.stdin.buffer:
        request = json.loads(line)
        reply: dict[str, Any]
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles it: the kernel ends the process
        try:
            reply = {"value": equivalent(request["gold"], request["answer"])}
        except MemoryError:
            reply = {"problem": f"more than {memory >> 20} MiB of memory"}
        except Exception as exc:
            reply = {"problem": f"{type(exc).__name__}: {exc}"[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
