"""Every rank must run the same: configuration, code, libraries. Nodes that differ train something nobody asked for, or hang."""

import hashlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.cuda.nccl

import nemohybrid
import nemohybrid_kernels
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.parallel.collectives import gather_bytes, gather_json, wait_for_all
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.watch import wording

SOURCES = (nemohybrid, nemohybrid_kernels)
SUFFIXES = (".py", ".json", ".cpp", ".h")
"""Python, the tables of kernel configurations, and kernels for CPUs."""
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "megatron-core",
    "safetensors",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "apex",
    "deep-ep",
)
"""What computes, or decides what is computed. Those that no rank has are not mentioned."""
ABSENT = "none"
SHOWN = 12
"""Characters of a digest in a message."""


def check_agreement(config: RunConfig, context: ParallelContext) -> None:
    """Raises ConfigError on all ranks where one differs: what, on which ranks and hosts, and both values. Collective.

    Ranks that agree exchange 32 bytes each.
    """
    facts = facts_of(config, context.device)
    digest = hashlib.sha256(json.dumps(facts).encode()).digest()
    if len(set(gather_bytes(digest, context.world, context.device))) == 1:
        return
    everyone = gather_json({"host": socket.gethostname(), "facts": facts}, context.world, context.device)
    wait_for_all(context)  # a rank that leaves early makes its peers fail, with less to say
    raise ConfigError(disagreement([rank["host"] for rank in everyone], [rank["facts"] for rank in everyone]))


def facts_of(config: RunConfig, device: torch.device) -> dict[str, str]:
    """What must be the same everywhere, by the name that a message gives it."""
    return {
        "the configuration": config.digest()[:SHOWN],
        "the code of nemohybrid": source_digest()[:SHOWN],
        "Python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        **_of_cuda(device),
    }


def source_digest() -> str:
    """SHA-256 over the names and contents of our own files."""
    total = hashlib.sha256()
    for package in SOURCES:
        root = Path(package.__file__ or "").parent
        for path in sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES):
            total.update(f"{package.__name__}/{path.relative_to(root).as_posix()}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _version(package: str) -> str:
    """torch also says for which device it was built, which its version on the disk may not."""
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def _of_cuda(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ABSENT
    return {"CUDA": torch.version.cuda or ABSENT, "cuDNN": _cudnn(), "NCCL": nccl}


def _cudnn() -> str:
    try:
        return str(torch.backends.cudnn.version() or ABSENT)
    except RuntimeError:  # the peers would wait for a rank that ends here
        return "one that torch refuses"


def disagreement(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str:
    """The message: a line for each fact that is not the same everywhere, with who has which value."""
    names = list(dict.fromkeys(name for mine in facts for name in mine))
    lines = [line for name in names if (line := _line(name, hosts, [mine.get(name, ABSENT) for mine in facts]))]
    return "\n".join(["ranks are not alike, so nothing was started:", *lines, *_advice(facts)])


def _line(name: str, hosts: Sequence[str], values: Sequence[str]) -> str:
    if len(set(values)) == 1:
        return ""
    return f"  {name}: " + "; ".join(f"{value} on {_who(ranks, hosts)}" for value, ranks in _by_value(values).items())


def _by_value(values: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found


def _who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`ranks 0-7, 9 (node1, node2)`, with the first hosts where there are many."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{wording.ranks(ranks)} ({', '.join(names[:4])}{more})"


def _advice(facts: Sequence[Mapping[str, str]]) -> list[str]:
    configuration = len({mine["the configuration"] for mine in facts}) > 1
    others = len({json.dumps({k: v for k, v in mine.items() if k != "the configuration"}) for mine in facts}) > 1
    return [
        *(["All must be started with the same command and the same configs/ folder."] * configuration),
        *(["All must run the same checkout, environment or container image."] * others),
    ]
