#!/bin/sh
# Four students of one base model. A stopped training goes on from its checkpoint.
. "$(dirname "$0")/env.sh"

distill() {
    what=$1
    shift
    # shellcheck disable=SC2086  # TRAIN_FOR is an option and its value
    agentkd distill "$OUT/$what/kept/kept.jsonl" --base "$BASE" --rank "$LORA_RANK" --lr "$LR" --batch-size "$BATCH" \
        --set "lora_dropout=$LORA_DROPOUT" $TRAIN_FOR --out "$STUDENTS/$what" "$@"
}
distill agent --max-length "$AGENT_LENGTH"
distill agent-ftp --max-length "$AGENT_LENGTH"
distill cot --kind cot --max-length "$COT_LENGTH"
distill cot-rag --kind cot --max-length "$COT_LENGTH"
