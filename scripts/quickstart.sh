#!/usr/bin/env bash
# Installs nemohybrid into .venv and trains a small hybrid on the bundled text; arguments are configuration overrides:
#   bash scripts/quickstart.sh train.steps=50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment base

# Threads that wait spin only briefly. Measured on two cores: as fast as long spinning where the cores are free (a fifth
# faster than sleeping at once), and three times faster than long spinning where other programs want them too.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
# The cores this process may use, but no more than a model this small can keep busy.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}"

exec python -m nemohybrid train experiment=quickstart "$@"
