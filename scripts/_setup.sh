# Sourced by the other scripts, from any folder. Leaves the caller in the root of the clone with the environment's
# `python` first in PATH; exits with a message when this machine has no Python that can run nemohybrid.
# shellcheck shell=bash
#
#   setup_environment base|dev       dev adds linters, types, tests and docs
#   NEMOHYBRID_VENV=FOLDER           where the environment lives (default: .venv in the clone)

[[ ${NEMOHYBRID_VENV:-/} == /* ]] || NEMOHYBRID_VENV=$PWD/$NEMOHYBRID_VENV
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." || return

# What a second run compares: the folder too, because an editable install and a venv's scripts hold absolute paths.
_stamp_line() { printf '%s %s %s\n' "$1" "$(cksum <pyproject.toml)" "$PWD"; }

# The machine's own `python3` comes first: in a container that is the one its torch was built for.
_find_python() {
  local fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
  local candidate found=""
  for candidate in python3 python python3.12 python3.11; do
    command -v "$candidate" >/dev/null || continue
    "$candidate" -c "$fits" 2>/dev/null && echo "$candidate" && return
    found+="  $candidate: $("$candidate" --version 2>&1 | tail -n 1)"$'\n'
  done
  {
    echo "nemohybrid needs Python 3.11 or 3.12 with its venv module. Found here:"
    [ -n "$found" ] && printf '%s' "$found" || echo "  no Python at all"
    echo "On Debian and Ubuntu: apt-get install python3.12 python3.12-venv (or 3.11). Then run this again."
  } >&2
  return 1
}

# The version as pip knows it, local part included ("2.13.0+cpu"), or nothing. Importing torch would take seconds.
_torch_version() {
  "$1" -c 'from importlib import metadata, util; print(metadata.version("torch") if util.find_spec("torch") else "")'
}

_make_venv() {
  local python torch
  python=$(_find_python) || return 1
  torch=$(_torch_version "$python")
  # That of an environment that is active cannot be looked through to: only its base can.
  "$python" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)' || torch=""
  echo "set-up: $("$python" --version) -> $1${torch:+, looking through to the torch $torch installed here}"
  # A torch that came with the machine fits its driver and its other libraries: it is used, never replaced.
  "$python" -m venv ${torch:+--system-site-packages} "$1"
}

_install() {
  local venv=$1 extra=$2 target="." torch
  local pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)
  if [ -z "$(_torch_version "$venv/bin/python")" ]; then
    # By itself and first: this way pip takes the CPU build wherever one is offered to it.
    echo "set-up: installing torch 2.13.0"
    "${pip[@]}" torch==2.13.0 || return 1
  fi
  torch=$(_torch_version "$venv/bin/python")
  echo "torch==$torch" >"$venv/torch-constraint.txt"
  [ "$extra" = base ] || target=".[$extra]"
  echo "set-up: installing nemohybrid ($extra) beside torch $torch"
  "${pip[@]}" -c "$venv/torch-constraint.txt" -e "$target" || {
    echo "set-up failed. The torch $torch found here is never replaced; pyproject.toml says which versions fit." >&2
    return 1
  }
}

setup_environment() {
  local extra=$1 venv=${NEMOHYBRID_VENV:-$PWD/.venv}
  local stamp=$venv/nemohybrid-installed
  if ! grep -qxF "$(_stamp_line "$extra")" "$stamp" 2>/dev/null || ! "$venv/bin/python" -c '' 2>/dev/null; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || _make_venv "$venv" || exit 1
    _install "$venv" "$extra" || exit 1
    _stamp_line "$extra" >>"$stamp"
  fi
  export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
}
