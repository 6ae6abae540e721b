#!/usr/bin/env bash
# Everything a change must pass, in one command. Arguments go to pytest: bash scripts/test.sh tests/test_pattern.py -k caret
# All stages run even when one fails; the last line counts the tests, the exit status covers everything.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup_environment dev

cores=$(env -u OMP_NUM_THREADS nproc)  # which would take the number of threads for that of cores
# Tests are small: a second thread costs more than it gives, and one thread keeps sums in the same order everywhere.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE

failed=()
stage() {
  local name=$1 began=$SECONDS verdict=ok
  shift
  echo "== $name"
  "$@" || { verdict=FAILED && failed+=("$name"); }
  echo "== $name: $verdict after $((SECONDS - began)) s"
}
# What only reads the code runs beside the tests; its output waits until they are done.
begin() {
  local name=$1
  shift
  "$@" >"$logs/$name" 2>&1 &
  beside+=("$name=$!")
}
finish() {
  local entry
  for entry in "${beside[@]}"; do stage "${entry%%=*}" report_of "${entry%%=*}" "${entry##*=}"; done
}
report_of() {
  local status=0
  wait "$2" || status=$?
  cat "$logs/$1"
  return "$status"
}
check_shell_syntax() {
  local script
  for script in scripts/*.sh scripts/launch/*.sh; do bash -n "$script" || return 1; done
}

stage "ruff check" ruff check
stage "ruff format" ruff format --check
stage "import contract" lint-imports
stage "shell syntax" check_shell_syntax

report=$(mktemp) logs=$(mktemp -d) beside=()
trap 'rm -rf "$report" "$logs"' EXIT
begin "types" pyright
begin "docs" sphinx-build -W -q -b html docs docs/_build/html
# A file is one worker's, which computes what its tests share once. xunit1 is the form of the report that names the file of each test.
stage "tests" python -m pytest -n $((cores < 8 ? cores : 8)) --dist loadfile --no-loadscope-reorder --junit-xml="$report" -o junit_family=xunit1 "$@"
finish

for name in ${failed[@]+"${failed[@]}"}; do echo "FAILED: $name"; done
python scripts/check_skips.py "$report" tests/allowed_skips.txt || failed+=("skips")
[ ${#failed[@]} -eq 0 ]
