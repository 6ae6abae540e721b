# The file of --setup. Commands in it may fail, and use variables that are not set.
setup={{file}}
if [ ! -r "$setup" ]; then
    echo "cannot read $setup, the file of --setup" >&2
    exit 1
fi
set +eu +o pipefail
# shellcheck source=/dev/null
source "$setup"
set -euo pipefail
