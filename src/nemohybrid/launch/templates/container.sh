# The container, by pyxis. The folder of the job has the same path inside, so that the run folder is found again.
mounts="$PWD:$PWD"
{{mounts}}
# What the image sets would win over what is set here, except for variables that pyxis is told by name.
names=(MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHONFAULTHANDLER "${!NCCL_@}" "${!GLOO_@}")
for name in PYTORCH_ALLOC_CONF TRITON_CACHE_DIR CUDA_DEVICE_MAX_CONNECTIONS; do
    if [ -n "${!name:-}" ]; then names+=("$name"); fi
done
options+=(
    --container-image={{image}}
    --container-mounts="$mounts"
    --container-workdir="$PWD"
    --container-env="$(IFS=,; echo "${names[*]}")"
    --no-container-mount-home # packages of ~/.local would get in front of those of the image
)
