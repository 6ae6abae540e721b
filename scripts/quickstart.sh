#!/usr/bin/env bash
# Installs nemohybrid into .venv and trains a small hybrid on the bundled text; arguments are configuration overrides:
#   bash scripts/quickstart.sh train.steps=50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment base

# Waiting threads must sleep: on cores that are shared, spinning barriers made training several times slower.
export OMP_WAIT_POLICY=PASSIVE
# The cores this process may use, but no more than a model this small can keep busy.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}"

exec python -m nemohybrid train experiment=quickstart "$@"
