#!/bin/sh
# The teacher solves every training question three times: as an agent, as an agent that begins with a first
# thought, and by chain of thought.
. "$(dirname "$0")/env.sh"

collect() {
    agentkd collect --api-base "$API_BASE" --model "$TEACHER" --tasks "$TRAIN_TASKS" --split "$TRAIN_SPLIT" \
        --n "$TRAIN_N" --step-tokens "$STEP_TOKENS" --workers "$WORKERS" --sandbox "$SANDBOX" "$@"
}
collect --corpus "$CORPUS" --out "$OUT/agent"
collect --corpus "$CORPUS" --first-thought --out "$OUT/agent-ftp"
collect --kind cot --out "$OUT/cot"
