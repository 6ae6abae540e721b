#!/usr/bin/env bash
# A run on the GPUs of one machine. docs/launch.md explains it. Written by:
# nemohybrid launch torchrun --gpus-per-node 8 -- model=nemotron_h_8b data.train=corpus/train data.sequence_length=4096 train.global_batch=256 train.microbatch=1 train.recompute=layer train.steps=20000 optim.lr=3e-4 checkpoint.every=500 run.name=mine

# shellcheck disable=SC2016 # a dollar sign in '...' is meant as it stands, in the whole script
set -euo pipefail

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
# torchrun kills ranks that take longer to end after a signal than this many seconds, which must do for a step and a save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
# A new store for every start. In the one that torchrun would keep, ranks that start again read where dead ones listened.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

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
    --standalone # meets on a free port of this machine
    --nproc-per-node=8
    --max-restarts=0 # after a crash; each goes on from the newest checkpoint
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" # passed on to the ranks; without it SIGUSR1 kills torchrun alone
)
# This is torchrun, by the Python that has nemohybrid.
exec python -m torch.distributed.run "${options[@]}" -m nemohybrid train "${overrides[@]}"
