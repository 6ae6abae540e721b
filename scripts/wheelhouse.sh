#!/usr/bin/env bash
# Collects what nemohybrid needs beside torch as wheels, for a GPU machine without internet:
#   bash scripts/wheelhouse.sh [FOLDER] [--python 3.12] [--peers]      FOLDER: wheelhouse
#   --peers      also transformers and the source of mamba-ssm, for comparisons, into FOLDER/peers; the latter needs torch here
# Carry FOLDER there together with the clone; scripts/gpu_suite.sh takes the wheels from it. A second run downloads nothing.
set -euo pipefail
for python in python3 python python3.12 python3.11; do
  if "$python" -c 'import sys, tomllib, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    exec "$python" "$(dirname "${BASH_SOURCE[0]}")/wheelhouse.py" "$@"
  fi
done
echo "wheelhouse: no Python 3.11 or newer with pip was found here" >&2
exit 1
