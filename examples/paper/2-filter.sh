#!/bin/sh
# Right answers without a parsing error are kept; errors of execution stay, they teach recovery. The control
# with retrieval has the same chains of thought, with passages before each question.
. "$(dirname "$0")/env.sh"

for what in agent agent-ftp cot; do
    agentkd filter "$OUT/$what" --out "$OUT/$what/kept"
done
agentkd transform passages "$OUT/cot/kept/kept.jsonl" --corpus "$CORPUS" --set "k=$K" --out "$OUT/cot-rag/kept"
