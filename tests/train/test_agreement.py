"""Ranks that do not run the same start nothing, and say what differs, where, and both values."""

import os
import platform
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import fork, wait_for_all

from nemohybrid.train import agreement
from nemohybrid.train.agreement import check_agreement, disagreement, facts_of, source_digest
from nemohybrid.train.run import join, run

HOST = socket.gethostname()


def test_ranks_with_different_configurations_all_fail_with_a_config_error(configure, run_ranks, tmp_path):
    same, other = configure(world_size=2), configure("optim.lr=0.5", world_size=2)
    failures = run_ranks(lambda context: run(other if context.rank else same, context))
    values = f"{same.digest()[:12]} on rank 0 ({HOST}); {other.digest()[:12]} on rank 1 ({HOST})"
    for rank, failure in enumerate(failures):
        assert "ConfigError: ranks are not alike" in failure, f"rank {rank}: {failure}"
        assert f"  the configuration: {values}\n" in failure
        assert "the same command and the same configs/ folder" in failure
        assert "container image" not in failure, "advice for what does not differ"
    assert not (tmp_path / "run").exists(), "a file was written before the ranks agreed"


def of_another_node(name: str, value: str, monkeypatch) -> None:
    """Rank 1 finds `value` where the others find what is there."""
    real = agreement.facts_of

    def facts(config, device):
        return real(config, device) | ({name: value} if dist.get_rank() == 1 else {})

    monkeypatch.setattr(agreement, "facts_of", facts)


@pytest.mark.parametrize("name", ["the code of nemohybrid", "Python", "torch", "triton", "flash-attn", "NCCL"])
def test_other_code_or_libraries_on_a_rank_are_named_with_both_values(configure, run_ranks, monkeypatch, name):
    config = configure("train.global_batch=3", world_size=3)
    here = facts_of(config, torch.device("cpu")).get(name, "none")
    of_another_node(name, "9.9.9", monkeypatch)
    for failure in run_ranks(lambda context: check_agreement(config, context), 3):
        assert f"  {name}: {here} on ranks 0, 2 ({HOST}); 9.9.9 on rank 1 ({HOST})\n" in failure
        assert "the same checkout, environment or container image" in failure
        assert "the same command" not in failure, "advice for what does not differ"


def test_ranks_that_are_alike_agree_and_say_nothing(configure, run_ranks):
    assert run_ranks(lambda context: check_agreement(configure(world_size=2), context)) == ["", ""]


def test_ranks_that_would_divide_themselves_differently_are_told_and_do_not_wait(configure, tmp_path):
    """They would make other groups, each waiting for ranks that never come."""
    four = ["train.global_batch=8", "cluster.timeout_minutes=0.2"]
    configs = [configure(*four, "parallel.tensor=2", world_size=4)] * 3 + [configure(*four, world_size=4)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def member(rank: int) -> None:
        mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in mine.items()})
        join(configs[rank])

    children = {rank: fork(lambda rank=rank: member(rank), tmp_path / f"failure{rank}") for rank in range(4)}
    codes = wait_for_all(children, 30)
    assert codes == dict.fromkeys(range(4), 1), "a rank hung"
    for rank in range(4):
        failure = (tmp_path / f"failure{rank}").read_text()
        assert re.search(r"the configuration: \w+ on ranks 0-2 \(.*\); \w+ on rank 3 ", failure), failure


def test_the_message_counts_ranks_and_hosts_and_leaves_out_what_is_the_same():
    facts = [{"the configuration": "c", "torch": "2.13.0", "Python": "3.12.1"} for _ in range(64)]
    for rank in range(40, 64):
        facts[rank]["torch"] = "2.12.0"
    del facts[7]["torch"]
    message = disagreement([f"node{rank // 8}" for rank in range(64)], facts)
    assert (
        "  torch: 2.13.0 on ranks 0-6, 8-39 (node0, node1, node2, node3 and 1 more); none on rank 7 (node0); "
        "2.12.0 on ranks 40-63 (node5, node6, node7)\n"
    ) in message
    assert "Python" not in message
    assert "the configuration" not in message


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package in place of ours."""
    folder = tmp_path / "package"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/tables.json", "inner/kernel.cpp", "inner/notes.txt"):
        (folder / name).write_text("1\n")
    monkeypatch.setattr(
        agreement, "SOURCES", [SimpleNamespace(__name__="package", __file__=str(folder / "__init__.py"))]
    )
    return folder


@pytest.mark.parametrize("name", ["__init__.py", "inner/tables.json", "inner/kernel.cpp"])
def test_the_digest_of_the_code_follows_every_file_that_computes(package, name):
    before = source_digest()
    assert source_digest() == before
    (package / name).write_text("2\n")
    edited = source_digest()
    (package / name).write_text("1\n")
    (package / name).rename(package / f"other{Path(name).suffix}")
    assert len({before, edited, source_digest()}) == 3


def test_what_does_not_compute_may_differ(package):
    before = source_digest()
    (package / "inner" / "notes.txt").write_text("2\n")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "inner.cpython-311.pyc").write_bytes(b"x")
    assert source_digest() == before


def test_our_own_code_is_in_the_digest(monkeypatch):
    names = {package.__name__ for package in agreement.SOURCES}
    assert names == {"nemohybrid", "nemohybrid_kernels"}
    whole = source_digest()
    for package in agreement.SOURCES:
        monkeypatch.setattr(agreement, "SOURCES", [package])
        assert source_digest() != whole


def test_configuration_code_and_versions_are_what_ranks_compare(configure, monkeypatch):
    config = configure()
    facts = facts_of(config, torch.device("cpu"))
    assert facts["the configuration"] == config.digest()[:12]
    assert facts["the code of nemohybrid"] == source_digest()[:12]
    assert (facts["torch"], facts["numpy"]) == (torch.__version__, np.__version__)
    assert facts["Python"] == platform.python_version()
    assert {"triton", "transformer-engine", "mamba-ssm", "causal-conv1d", "flash-attn", "apex"} <= facts.keys()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91701)
    on_gpu = facts_of(config, torch.device("cuda"))
    theirs = {"CUDA": "13.0", "cuDNN": "91701", "NCCL": "2.28.9"}
    assert {name: on_gpu[name] for name in on_gpu.keys() - facts.keys()} == theirs
