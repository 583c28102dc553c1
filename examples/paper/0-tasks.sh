#!/bin/sh
# The training questions, from the Hugging Face hub; a file that is there already is kept. PYTHON is the
# interpreter that agentkd is installed in.
. "$(dirname "$0")/env.sh"

[ -f "$TRAIN_TASKS" ] || "${PYTHON:-python3}" "$(dirname "$0")/tasks.py" "$TRAIN_TASKS"
