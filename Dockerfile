# nemohybrid on NVIDIA's PyTorch image, which brings torch, Transformer Engine, flash-attn and apex built for each other.
#
#   docker build -t nemohybrid .                          add --build-arg MAMBA=1 for mamba-ssm and causal-conv1d
#   docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" nemohybrid nemohybrid train experiment=quickstart

# torch 2.11 is the oldest we support; release 26.02 is the first image that holds it.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

# The image's torch is on no package index: once pip replaces it, it is gone, and everything compiled against it breaks.
# This file makes pip fail instead. It adds to the image's own list in PIP_CONSTRAINT.
RUN python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > /opt/torch-constraint.txt

# No wheel of theirs is built for the image's torch, so both are compiled, and must see that torch while they are: hence no
# build isolation. FORCE_BUILD keeps their setup.py from fetching a wheel for the public torch of the same minor version,
# which fails on import. Before our own files, so that a change of ours does not compile them again.
ARG MAMBA=0
RUN if [ "${MAMBA}" = 1 ]; then \
      MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
      pip install --no-cache-dir --no-build-isolation -c /opt/torch-constraint.txt \
        "causal-conv1d>=1.6,<2" "mamba-ssm>=2.3,<3"; \
    fi

COPY pyproject.toml README.md LICENSE /opt/nemohybrid/
COPY configs /opt/nemohybrid/configs
COPY kernels /opt/nemohybrid/kernels
COPY src /opt/nemohybrid/src
RUN pip install --no-cache-dir -c /opt/torch-constraint.txt /opt/nemohybrid

# Runs are written below the folder one starts in: mount it, or they go with the container.
WORKDIR /workspace
CMD ["nemohybrid", "--help"]
