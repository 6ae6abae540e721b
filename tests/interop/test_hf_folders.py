"""Folders in other forms, and folders that are none: every fault is named."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf import load_hf, read_config

IDS = torch.arange(12).view(1, 12)


def into_shards(folder):
    """Rewrite a folder as transformers does above its shard size."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_shards_give_the_same_model_as_one_file(changed_folder):
    folder = changed_folder("dense")
    whole = load_hf(folder)(IDS)
    into_shards(folder)
    assert torch.equal(load_hf(folder)(IDS), whole)


@pytest.mark.parametrize(
    "config",
    [
        {"hybrid_override_pattern": "M-M*-M-", "layers_block_type": None},
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "mlp"]},
        {"head_dim": None, "attention_head_dim": 12},
        {"time_step_limit": [0.0, math.inf]},
        {"time_step_limit": None},
    ],
    ids=lambda config: next(iter(config)),
)
def test_older_ways_to_write_a_config_mean_the_same(config, changed_folder, untouched_folder):
    folder = changed_folder("dense", config)
    assert torch.equal(load_hf(folder)(IDS), load_hf(untouched_folder("dense"))(IDS))
    assert read_config(folder).dt_limit is None


def test_a_time_step_limit_is_kept(changed_folder):
    assert read_config(changed_folder("dense", {"time_step_limit": [0.01, 0.2]})).dt_limit == (0.01, 0.2)


def test_mtp_blocks_are_passed_over(changed_folder, untouched_folder):
    extra = {"mtp.layers.0.eh_proj.weight": torch.zeros(32, 64), "mtp.layers.1.mixer.gate.weight": torch.zeros(8, 32)}
    folder = changed_folder("moe", {"num_nextn_predict_layers": 1}, lambda weights: weights.update(extra))
    assert torch.equal(load_hf(folder)(IDS), load_hf(untouched_folder("moe"))(IDS))


def test_latent_experts_are_refused(changed_folder):
    with pytest.raises(CheckpointError, match=r"config\.json: moe_latent_size=16, LatentMoE layers cannot be read yet"):
        load_hf(changed_folder("moe", {"moe_latent_size": 16}))


SPOILT_WEIGHTS = {
    "missing": (lambda w: w.pop("backbone.norm_f.weight"), "missing tensor backbone.norm_f.weight"),
    "unexpected": (lambda w: w.update(extra=torch.zeros(2)), "unexpected tensor extra"),
    "too short": (
        lambda w: w.update({"lm_head.weight": torch.zeros(63, 32)}),
        r"lm_head.weight is \[63, 32\], the model needs \[64, 32\]",
    ),
    "transposed": (
        lambda w: w.update({"backbone.layers.1.mixer.up_proj.weight": torch.zeros(32, 56)}),
        r"up_proj.weight is \[32, 56\], the model needs \[56, 32\]",
    ),
    "as many numbers": (
        lambda w: w.update({"lm_head.weight": torch.zeros(64, 4, 8)}),
        r"lm_head.weight is \[64, 4, 8\], the model needs \[64, 32\]",
    ),
    "a scalar": (lambda w: w.update({"lm_head.weight": torch.tensor(1.0)}), r"lm_head.weight is \[\], the model"),
    "empty": (lambda w: w.update({"lm_head.weight": torch.zeros(0, 32)}), r"lm_head.weight is \[0, 32\], the model"),
    "convolution": (
        lambda w: w.update({"backbone.layers.0.mixer.conv1d.weight": torch.zeros(92, 4)}),
        r"conv1d.weight is \[92, 4\], the model needs \[92, 1, 4\]",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT_WEIGHTS.values(), ids=list(SPOILT_WEIGHTS))
def test_tensors_that_do_not_fit_are_named(spoil, message, changed_folder):
    with pytest.raises(CheckpointError, match=message):
        load_hf(changed_folder("dense", tensors=spoil))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "describes a 'llama' model; only nemotron_h"),
        (
            {"layers_block_type": ["mamba", "conv"]},
            r"unknown layers \['conv'\]. Legal in layers_block_type: linear_att",
        ),
        ({"layers_block_type": None}, "names no layers"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act=silu, only relu2 can be read"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act=gelu, only silu"),
        ({"use_bias": True}, "use_bias=True, only False"),
        ({"mlp_bias": True}, "mlp_bias=True, only False"),
        ({"attention_bias": True}, "attention_bias=True, only False"),
        ({"num_attention_heads": 6}, "does not fit its own config.json"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(config, message, changed_folder):
    with pytest.raises(CheckpointError, match=message):
        load_hf(changed_folder("dense", config))


def test_an_illegal_dtype_names_the_legal_ones(changed_folder):
    with pytest.raises(CheckpointError, match=r"dtype=torch\.float16 .* Legal: torch\.float32, torch\.bfloat16"):
        load_hf(changed_folder("dense"), dtype=torch.float16)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_may_not_name_files_outside_its_folder(target, changed_folder):
    folder = changed_folder("dense")
    for place in (folder.parent / "outside.safetensors", folder / "sub" / "model.safetensors"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    with pytest.raises(CheckpointError, match=f"names a file outside its folder: '{target}'"):
        load_hf(folder)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "absent"}}'])
def test_a_broken_index_is_named(content, changed_folder):
    folder = changed_folder("dense")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json|absent not found"):
        load_hf(folder)


def test_a_damaged_weight_file_is_named(changed_folder):
    folder = changed_folder("dense")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_hf(folder)


def test_a_folder_without_weights_or_config_is_no_model(changed_folder, tmp_path):
    folder = changed_folder("dense")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors not found"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_hf(folder)
    with pytest.raises(CheckpointError, match="is not a Hugging Face model folder"):
        load_hf(tmp_path)


def test_pickled_weights_are_never_read(changed_folder):
    folder = changed_folder("dense")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors not found"):
        load_hf(folder)
