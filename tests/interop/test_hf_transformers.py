"""Stock transformers reads what we export: no key missing or unexpected, the same logits, gradients and token ids.

One fresh interpreter reads all folders: importing transformers takes seconds, and warns.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nemohybrid.config.model import RouterConfig
from nemohybrid.data.tokenizer import ByteTokenizer, train_bpe
from nemohybrid.interop.hf import load_hf, save_hf
from nemohybrid.interop.hf.names import disk_tensors
from nemohybrid.parallel.layout import logical_parameters

pytest.importorskip("transformers")

READER = Path(__file__).parent / "fixtures" / "read_with_transformers.py"
CASES = ["dense", "dense_nob", "moe", "moe_grouped", "latent_moe", "mtp"]
ALIGNED = {"moe_ffn_hidden_size": 16}  # transformers' grouped products want rows of a multiple of 16 bytes
OURS = {
    "tied": {"pattern": "M-*", "tie_embeddings": True},
    "padded": {"pattern": "*-", "vocab_multiple": 16},
    "bare": {
        "pattern": "ME*",
        **ALIGNED,
        "shared_expert_ffn_hidden_size": 0,
        "router": RouterConfig(expert_bias=False),
    },
    "two_depths": {"pattern": "M-|*E/*E/*E", **ALIGNED, "moe_latent_size": 12},
}
TEXTS = ["", "a", " a  b\n\n", "Hello, world! It's 12.5", "é😀\tnaïve \x00", "To be, or not to be"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model):
    """Folder of folders, with what each must give: `<name>/` and `<name>.safetensors`."""
    root = tmp_path_factory.mktemp("exported")
    tokenizers = {"dense": ByteTokenizer(), "moe": train_bpe(TEXTS * 3, 300)}
    for name in CASES:
        model = load_hf(Path(__file__).parent / "fixtures" / name)
        save_hf(model, root / name, tokenizer=tokenizers.get(name), max_shard_bytes=60_000)
        save_file({"input_ids": torch.arange(3, 40).view(1, 37)}, root / f"{name}.safetensors")
    for name, changes in OURS.items():
        save_hf(tiny_model(**changes), root / name)
        save_file({"input_ids": torch.arange(3, 40).view(1, 37)}, root / f"{name}.safetensors")
    (root / "texts.json").write_text(json.dumps(TEXTS))
    done = subprocess.run(
        [sys.executable, str(READER), str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"transformers did not read the exports:\n{done.stderr[-3000:]}"
    return root, json.loads((root / "report.json").read_text()), tokenizers


@pytest.mark.parametrize("name", [*CASES, *OURS])
def test_no_key_is_missing_or_unexpected(name, exported):
    assert exported[1][name]["issues"] == {}


@pytest.mark.parametrize("name", [*CASES, *OURS])
def test_logits_and_gradients_are_ours(name, exported):
    """Logits to 1e-4, gradients to 1e-4 of the largest entry of each. Found: 6e-6 and 2e-5."""
    theirs = load_file(exported[0] / f"{name}.out.safetensors")
    model = load_hf(exported[0] / name, mtp_depth=0)
    ids = torch.arange(3, 40).view(1, 37)
    logits = model(ids)
    torch.testing.assert_close(logits, theirs.pop("logits"), rtol=0, atol=1e-4)
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    gradients, disk = logical_parameters(model), disk_tensors(model)
    if model.config.tie_embeddings:  # two matrices there: the gradient of one is the sum of theirs
        theirs["backbone.embeddings.weight"] += theirs.pop("lm_head.weight")
    for key, want in theirs.items():
        if disk[key].parts:
            error = (disk[key].gather(gradients.__getitem__) - want).abs().max().item()
            assert error <= 1e-4 * want.abs().max().item(), f"{key}: off by {error:.1e}"


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_tokenizers_give_the_same_ids_and_text(name, exported):
    _, report, tokenizers = exported
    tokenizer = tokenizers[name]
    assert report[name]["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert report[name]["decoded"] == TEXTS
    assert report[name]["eos"] == [tokenizer.eod, tokenizer.eod]


def test_a_draft_head_does_not_disturb_readers_that_have_none(exported):
    assert json.loads((exported[0] / "mtp" / "config.json").read_text())["num_nextn_predict_layers"] == 1
