# The container, by pyxis. The folder of the job has the same path inside, so that the run folder is found again.
mounts="$PWD:$PWD"
{{mounts}}
options+=(
    --container-image={{image}}
    --container-mounts="$mounts"
    --container-workdir="$PWD"
    --no-container-mount-home # packages of ~/.local would get in front of those of the image
)
