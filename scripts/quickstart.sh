#!/usr/bin/env bash
# Installs nemohybrid into .venv and trains a small hybrid on the bundled text; arguments are configuration overrides:
#   bash scripts/quickstart.sh train.steps=50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment base

# Threads that wait spin only briefly. Measured on two cores: as fast as long spinning where the cores are free (a fifth
# faster than sleeping at once), and three times faster than long spinning where other programs want them too.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
# The cores this process may use, but no more than a model this small can keep busy; and bf16 only where something
# multiplies in it: a CPU without such instructions emulates it.
read -r cores dtype device < <(
  python - <<'PYTHON'
import os

import torch

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
device = "cuda" if torch.cuda.is_available() else "cpu"
fast = device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(cores, "bfloat16" if fast else "float32", device)
PYTHON
)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}"

# Kernels for CPUs in C++: seconds to build, once, and steps are faster with them (docs/benchmarks/cpu_peer.md).
if [ "$device" = cpu ]; then
  python -m nemohybrid_kernels.cpp 2>/dev/null ||
    echo "training without C++ kernels; python -m nemohybrid_kernels.cpp says why they cannot be built here"
fi

exec python -m nemohybrid train experiment=quickstart "model.dtype=$dtype" "$@"
