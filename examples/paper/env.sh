# Settings of the paper's recipe (arXiv 2505.17612). Sourced by the stages; any of them can be set from outside:
# BASE=Qwen/Qwen2.5-0.5B-Instruct sh examples/paper/3-distill.sh
set -eu

: "${OUT:=runs/paper}"                     # everything is written under it
: "${TEACHER:=Qwen/Qwen2.5-32B-Instruct}"
: "${API_BASE:=http://127.0.0.1:8001/v1}"  # the teacher's endpoint, see README.md
: "${BASE:=Qwen/Qwen2.5-1.5B-Instruct}"    # of the student: 0.5B, 1.5B, 3B or 7B
: "${CORPUS:=http://127.0.0.1:8100}"       # a retriever over wiki-18; or passages.jsonl, or an index
: "${TRAIN_TASKS:=tasks.jsonl}"            # written by 0-tasks.sh; or a file of yours
: "${TRAIN_SPLIT:=all}"
: "${TRAIN_N:=3000}"
: "${TEST_SETS:=set:hotpotqa set:musique set:2wiki set:bamboogle set:math_500 set:gsm_hard set:aime set:olymmath}"
: "${SYSTEMS:=cot cot-rag agent agent-sag agent-ftp agent-ftp-sag}"
: "${TEST_N:=500}"                         # of each; smaller sets are taken whole
: "${SANDBOX:=fork}"
: "${WORKERS:=64}"
: "${K:=3}"                                # passages before the question of CoT + retrieval

# LoRA on all linear layers: r 64, alpha 128 (twice the rank), dropout 0.05, lr 2e-4, 2 epochs, batch 8.
: "${LORA_RANK:=64}"
: "${LORA_DROPOUT:=0.05}"
: "${LR:=2e-4}"
: "${BATCH:=8}"
: "${TRAIN_FOR:=--epochs 2}"               # or: --steps N
: "${AGENT_LENGTH:=10240}"                 # longest example in tokens
: "${COT_LENGTH:=4096}"
: "${ACTIONS:=8}"                          # actions sampled at a step, for self-consistent action generation
: "${STEP_TOKENS:=1024}"                   # sampled tokens of one step

STUDENTS="$OUT/students/$(basename "$BASE")"
RESULTS="$OUT/evaluate/$(basename "$BASE")"
