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
