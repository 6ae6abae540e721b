#!/usr/bin/env bash
# Score a checkpoint with lm-evaluation-harness, offline, on local text; and with our own evaluator, which must agree.
#   bash scripts/eval_lm_harness.sh RUN [--data FILE.jsonl]... [--output DIR]     RUN: a run folder or a checkpoint
# Needs: pip install 'nemohybrid[eval]'. Python of another place: PYTHON=/path/to/python bash scripts/eval_lm_harness.sh ...
# DIR (default: RUN-lm-eval) gets the exported model, the task, and results.json. Exits 0 when both agree to 1e-6 bits per byte.
set -euo pipefail
root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TQDM_DISABLE=${TQDM_DISABLE:-1}
exec "${PYTHON:-python}" "$root/scripts/eval_lm_harness.py" "$@"
