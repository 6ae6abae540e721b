#!/usr/bin/env bash
# A run on the GPUs of one machine. docs/launch.md explains it. Written by:
# {{command}}

# shellcheck disable=SC2016 # a dollar sign in '...' is meant as it stands, in the whole script
set -euo pipefail

{{setup}}
{{environment}}
# torchrun kills ranks that take longer to end after a signal than this many seconds, which must do for a step and a save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{{save_seconds}}}"
# A new store for every start. In the one that torchrun would keep, ranks that start again read where dead ones listened.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

overrides=(
{{overrides}}
)
options=(
    --standalone # meets on a free port of this machine
    --nproc-per-node={{gpus_per_node}}
    --max-restarts={{max_restarts}} # after a crash; each goes on from the newest checkpoint
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" # passed on to the ranks; without it SIGUSR1 kills torchrun alone
)
# This is torchrun, by the Python that has nemohybrid.
exec {{python}} -m torch.distributed.run "${options[@]}" -m nemohybrid train "${overrides[@]}"
