"""Two real processes at once: preparing the same text, and building the same epoch under torch.distributed."""

import json
import os
import subprocess
import sys

import pytest

from nemohybrid.data.bundled import plays
from nemohybrid.data.tokenizer import train_bpe

RANK = """
import hashlib, json, sys
from datetime import timedelta
import torch.distributed as dist
from nemohybrid.cli import data
from nemohybrid.data import blend, bundled, corpus, mixture, sampler, split, validation

rank, folder = int(sys.argv[1]), sys.argv[2]
eager = sorted(name for name in sys.modules if name.partition(".")[0] == "megatron")
dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=120), rank=rank, world_size=2)
dist.barrier()
prepared = bundled.prepare_bundled(f"{folder}/data", "bpe:300")
dist.barrier()
stream = sampler.SampleStream(corpus.Corpus(prepared.train), 64, 1, f"{folder}/cache")
indices = range(stream.samples_per_epoch - 20, stream.samples_per_epoch + 20)
samples = hashlib.sha256(b"".join(stream[index].tobytes() for index in indices)).hexdigest()
dist.barrier()
dist.destroy_process_group()
print(json.dumps({"eager": eager, "tokenizer": prepared.tokenizer.description, "samples": samples}))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks reported, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return folder, [json.loads(out) for out, _ in outputs]


def test_importing_the_data_layer_imports_no_megatron(ranks):
    _, reports = ranks
    assert reports[0]["eager"] == [], "megatron-core costs seconds at every start"


def test_both_prepare_and_one_result_remains(ranks):
    folder, reports = ranks
    assert {path.name for path in folder.iterdir()} - {"store"} == {"cache", "data"}, "a staging folder was left"
    assert reports[0]["tokenizer"] == reports[1]["tokenizer"]


def test_a_bpe_trained_in_another_process_is_the_same(ranks):
    _, reports = ranks
    assert train_bpe([play.text for play in plays()[:-1]], 300).description == reports[0]["tokenizer"]


def test_every_rank_builds_and_reads_the_same_samples(ranks):
    folder, reports = ranks
    assert reports[0]["samples"] == reports[1]["samples"]
    assert len(list((folder / "cache").glob("*.npy"))) == 6, "two epochs of three arrays"
