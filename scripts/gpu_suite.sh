#!/usr/bin/env bash
# What only a GPU can show: its tests, a bf16 quickstart, NCCL, and how fast kernels, layers and models are, beside those of
# others where they are found. Needs a CUDA machine with torch, and no internet:
#   bash scripts/gpu_suite.sh [--out DIR] [--only PART]...     DIR: a new one in runs/; PART: checks, full_size, shipped, kernels,
#                                    roofline, layers, model_4b, model_1b, precision, precision_gemm, or a stage of checks;
#                                    each ends within 9 minutes
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
    has "$candidate" torch 2>/dev/null || continue
    echo "$candidate" && return
  done
  echo "gpu_suite: no Python with torch was found here" >&2
  return 1
}

has() {
  "$1" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec(sys.argv[1]))' "$2"
}

# Into a folder of its own that comes first in the path. pip looks nowhere else and resolves nothing, so it replaces nothing.
install_wheels() {
  "$python" -m pip install -qq --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --target "$1" "${@:2}"
}

# What ours is compared with: a stage says itself what it misses, so nothing ends here.
install_peers() {
  if compgen -G "$wheels/peers/*.whl" >/dev/null; then
    install_wheels "$site/peers" "$wheels"/peers/*.whl || echo "gpu_suite: the wheels in $wheels/peers do not install here" >&2
  fi
  has "$python" mamba_ssm || [ -n "${NEMOHYBRID_MAMBA_SSM-}" ] || unpack_mamba
}

unpack_mamba() {
  local source
  source=$(compgen -G "$wheels/peers/mamba_ssm-*.tar.gz" | tail -n 1) || return 0
  mkdir -p "$site/mamba_ssm"
  tar -xzf "$source" -C "$site/mamba_ssm" --strip-components=1 --no-same-owner || return 0
  export NEMOHYBRID_MAMBA_SSM=$site/mamba_ssm
}

python=$(find_python) || exit 2
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
  compgen -G "$wheels/*.whl" >/dev/null || {
    echo "gpu_suite: no wheels in $wheels; make them with scripts/wheelhouse.sh where there is internet" >&2
    exit 2
  }
  install_wheels "$site/core" "$wheels"/*.whl || {
    echo "gpu_suite: these wheels do not install with $("$python" --version); collect those for it with" \
      "scripts/wheelhouse.sh FOLDER --python VERSION" >&2
    exit 2
  }
  install_peers
fi

PYTHONPATH=$root/src:$root/kernels:$site/core:$site/peers PYTHONUNBUFFERED=1 "$python" "$root/scripts/gpu_suite.py" "$@"
