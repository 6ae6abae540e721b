#!/usr/bin/env bash
# A run under SLURM that saves before its time is up and queues up again until it is complete. docs/launch.md explains it.
# Submit it in the folder where the run shall work: sbatch SCRIPT. Written by:
# nemohybrid launch slurm --nodes 2 --time 24:00:00 --container-image /images/nemohybrid.sqsh --mount /datasets:/datasets:ro -- model=nemotron_h_8b data.train=corpus/train data.sequence_length=4096 train.global_batch=256 train.microbatch=1 train.recompute=layer train.steps=20000 optim.lr=3e-4 checkpoint.every=500 run.name=mine
#SBATCH --job-name=mine
#SBATCH --nodes=2
# One task is one rank and has one GPU. Each must see all GPUs of its node, so no --gpus-per-task.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# So many seconds before the time is up SLURM sends SIGUSR1 to every rank. They finish a step, save, and end with status 75.
# Without "B:" the signal goes to the tasks of srun and not to this script.
#SBATCH --signal=USR1@300
# The same job, with the same number, starts again after `scontrol requeue`, and after the failure of a node.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# shellcheck disable=SC2016 # a dollar sign in '...' is meant as it stands, in the whole script
set -euo pipefail

max_requeues=20 # starts after the first, whatever the reason
attempt=${SLURM_RESTART_COUNT:-0}
logs=logs
mkdir -p "$logs"
log="$logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-attempt$attempt.log"

# Libraries. What is set already when the script starts stays as it is.
# Threads of a rank on the CPU. Without a number each of the ranks would start one for every core of the node.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# NCCL says which connection failed, and why; by default it says nothing. INFO also tells which network it chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A crash inside of a kernel or a driver shows the lines of Python that led there.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
# Left alone, because the libraries choose well by themselves unless a cluster is unusual:
# export NCCL_SOCKET_IFNAME==eno1   # network interface where ranks meet, and for data without InfiniBand; for a wrong choice
# export GLOO_SOCKET_IFNAME=eno1    # the same for gloo, which ranks on CPUs use, and which takes names as they are
# export NCCL_IB_HCA==mlx5_0,mlx5_1 # InfiniBand adapters that carry data; where others of the node are for storage
# NCCL takes every name that begins so: without the second = also eno10, or mlx5_10.
# export PYTORCH_ALLOC_CONF=expandable_segments:True   # where memory runs out though much of it is reserved and free
# export TRITON_CACHE_DIR=...       # compiled kernels, by default in ~/.triton; where the home folder is a slow network disk
# CUDA_DEVICE_MAX_CONNECTIONS stays too: Megatron-LM sets it to 1, and refuses that with FSDP, which cuts weights here.

# Rank 0 lives on the first node; jobs that share it must not share the port.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

overrides=(
    model=nemotron_h_8b
    data.train=corpus/train
    data.sequence_length=4096
    train.global_batch=256
    train.microbatch=1
    train.recompute=layer
    train.steps=20000
    optim.lr=3e-4
    checkpoint.every=500
    run.name=mine
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
# The container, by pyxis. The folder of the job has the same path inside, so that the run folder is found again.
mounts="$PWD:$PWD"
mounts+=,/datasets:/datasets:ro
# What the image sets would win over what is set here, except for variables that pyxis is told by name.
names=(MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHONFAULTHANDLER "${!NCCL_@}" "${!GLOO_@}")
for name in PYTORCH_ALLOC_CONF TRITON_CACHE_DIR CUDA_DEVICE_MAX_CONNECTIONS; do
    if [ -n "${!name:-}" ]; then names+=("$name"); fi
done
options+=(
    --container-image=/images/nemohybrid.sqsh
    --container-mounts="$mounts"
    --container-workdir="$PWD"
    --container-env="$(IFS=,; echo "${names[*]}")"
    --no-container-mount-home # packages of ~/.local would get in front of those of the image
)

# SIGTERM reaches this script when somebody cancels the job or SLURM takes the nodes away: neither asks for another attempt.
cancelled=no
trap 'cancelled=yes' TERM

echo "attempt $attempt of at most $max_requeues after the first, on $SLURM_JOB_NODELIST: $log"
status=0
# exec: SLURM signals its own children only, so Python must be one, and not the child of a shell.
# In '...' each task reads its own variables.
srun "${options[@]}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec "$@"' rank python -m nemohybrid train "${overrides[@]}" || status=$?

if [ "$status" -eq 0 ]; then
    echo "done"
elif [ "$status" -ne 75 ]; then
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
