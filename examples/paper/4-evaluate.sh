#!/bin/sh
# Every system on every test set: the students, and the agents with self-consistent action generation ("-sag").
# Finished sets are not run again.
. "$(dirname "$0")/env.sh"

for system in $SYSTEMS; do
    actions=1
    case $system in *-sag) actions=$ACTIONS ;; esac
    for set in $TEST_SETS; do
        agentkd evaluate "$STUDENTS/${system%-sag}" --tasks "$set" --n "$TEST_N" --max-tokens "$STEP_TOKENS" \
            --sandbox "$SANDBOX" --corpus "$CORPUS" --actions "$actions" \
            --out "$RESULTS/$system/$(echo "$set" | tr -c 'a-z0-9_\n' '-')"
    done
done
