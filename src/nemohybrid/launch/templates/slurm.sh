#!/usr/bin/env bash
# A run under SLURM that saves before its time is up and queues up again until it is complete. docs/launch.md explains it.
# Submit it in the folder where the run shall work: sbatch SCRIPT. Written by:
# {{command}}
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
# One task is one rank and has one GPU. Each must see all GPUs of its node, so no --gpus-per-task.
#SBATCH --ntasks-per-node={{gpus_per_node}}
{{gpus}}
#SBATCH --cpus-per-task={{cpus_per_task}}
{{whole_nodes}}
#SBATCH --time={{time}}
{{directives}}
# So many seconds before the time is up SLURM sends SIGUSR1 to every rank. They finish a step, save, and end with status 75.
# Without "B:" the signal goes to the tasks of srun and not to this script.
#SBATCH --signal=USR1@{{save_seconds}}
# The same job, with the same number, starts again after `scontrol requeue`, and after the failure of a node.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# shellcheck disable=SC2016 # a dollar sign in '...' is meant as it stands, in the whole script
set -euo pipefail

max_requeues={{max_requeues}} # starts after the first, whatever the reason
attempt=${SLURM_RESTART_COUNT:-0}
logs={{logs}}
mkdir -p "$logs"
log="$logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-attempt$attempt.log"

{{setup}}
{{environment}}

# Rank 0 lives on the first node; jobs that share it must not share the port.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

overrides=(
{{overrides}}
)
options=(
    --export=ALL           # also where the job was submitted without the environment
    --mpi=none             # the ranks need no MPI, and one that is set up wrongly would stop them
    --distribution=block   # neighbours in rank are neighbours on a node: tensor ranks talk most
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch
    --kill-on-bad-exit=0   # who ends with 75 first must not have the others killed: their status would hide the 75
    --wait=60              # who has not ended a minute after the first will not any more
    --label                # every line begins with its rank
    --output="$log"
)
{{container}}

# SIGTERM reaches this script when somebody cancels the job or SLURM takes the nodes away: neither asks for another attempt.
cancelled=no
trap 'cancelled=yes' TERM

echo "attempt $attempt of at most $max_requeues after the first, on $SLURM_JOB_NODELIST: $log"
status=0
# exec: SLURM signals its own children only, so Python must be one, and not the child of a shell.
# In '...' each task reads its own variables.
srun "${options[@]}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec "$@"' rank {{python}} -m nemohybrid train "${overrides[@]}" || status=$?

if [ "$status" -eq 0 ]; then
    echo "done"
elif [ "$status" -ne {{requeue}} ]; then
    echo "failed with status $status and is not started again; $log says why"
elif [ "$cancelled" = yes ]; then
    echo "SLURM ended this attempt itself (cancelled, preempted or out of time), so it is not queued again from here"
elif [ "$attempt" -ge "$max_requeues" ]; then
    echo "saved, but has been started $max_requeues times again: not once more. sbatch of the same script goes on from there"
elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "saved; queued again as attempt $((attempt + 1))"
else
    echo "saved, but cannot be queued again. sbatch of the same script goes on from there"
fi
exit "$status"
