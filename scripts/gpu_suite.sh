#!/usr/bin/env bash
# What only a GPU can show: its tests, a bf16 quickstart, NCCL, speed. Needs a CUDA machine with torch, and no internet:
#   bash scripts/gpu_suite.sh [--out DIR] [--only STAGE]...     DIR: a new one in runs/; less than 9 minutes on an H100
#   bash scripts/gpu_suite.sh --rehearse                        the same stages, small and on the CPU
#   NEMOHYBRID_WHEELHOUSE=FOLDER     what scripts/wheelhouse.sh collected (default: wheelhouse in the clone; empty: the
#                                    Python here has everything)
# DIR gets machine.json, a log a stage, what they measured, and summary.txt. Exits 0 when all stages passed, 1 when one
# failed, 2 when the set-up failed, 3 when torch sees no GPU, 130 after Ctrl-C.
set -euo pipefail
root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheels=${NEMOHYBRID_WHEELHOUSE-$root/wheelhouse}

# Not a new venv: the Python that has torch may itself be that of a venv, which a second one cannot look into.
find_python() {
  local candidate
  for candidate in python3 python python3.12 python3.11; do
    "$candidate" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2>/dev/null || continue
    echo "$candidate" && return
  done
  echo "gpu_suite: no Python with torch was found here" >&2
  return 1
}

# Into a folder of its own that comes first in the path. pip looks nowhere else and resolves nothing, so it replaces nothing.
install_wheels() {
  "$python" -m pip install -qq --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$wheels"/*.whl && return
  echo "gpu_suite: these wheels do not install with $("$python" --version); collect those for it with" \
    "scripts/wheelhouse.sh FOLDER --python VERSION" >&2
  return 1
}

python=$(find_python) || exit 2
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
  compgen -G "$wheels/*.whl" >/dev/null || {
    echo "gpu_suite: no wheels in $wheels; make them with scripts/wheelhouse.sh where there is internet" >&2
    exit 2
  }
  install_wheels || exit 2
fi

PYTHONPATH=$root/src:$root/kernels:$site PYTHONUNBUFFERED=1 "$python" "$root/scripts/gpu_suite.py" "$@"
