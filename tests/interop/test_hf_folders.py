"""Folders in other forms, and folders that are none: every fault is named."""

import contextlib
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf import load_hf
from nemohybrid.interop.hf.config_in import read_config

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
            r"unknown layers \['conv'\]. Legal in layers_block_type: mamba, linear_att",
        ),
        ({"layers_block_type": None}, "names no layers"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act=silu, only relu2 can be read"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act=gelu, only silu"),
        ({"use_bias": True}, "use_bias=True, only False"),
        ({"mlp_bias": True}, "mlp_bias=True, only False"),
        ({"attention_bias": True}, "attention_bias=True, only False"),
        ({"num_attention_heads": 6}, "does not fit its own config.json"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights cannot be read"),
        ({"hidden_size": math.nan}, "NaN is no value"),
        ({"layer_norm_epsilon": math.inf}, "layer_norm_epsilon=inf: must be finite"),
        ({"hidden_size": "32"}, "hidden_size=32: is not a whole number"),
        ({"n_groups": 4}, "mamba_num_heads=6: 6 heads cannot form 4 equal groups"),
        ({"hidden_size": 2**62}, "describes a model that cannot be|does not fit its own config.json"),
        ({"time_step_limit": ["a"]}, r"time_step_limit=\['a'\] is not"),
        ({"layers_block_type": "MMM"}, "layers_block_type not a list"),
        (
            {"hybrid_override_pattern": "M-M"},
            r"hybrid_override_pattern=M-M and layers_block_type, which is M-M\*-M-, do not",
        ),
        ({"hybrid_override_pattern": "M-X", "layers_block_type": None}, "the pattern M-X has other layers than M"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers=3, but M-M\*-M- has 7 layers"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 is not a number of blocks. Legal: 0 to 64"),
        ({"num_nextn_predict_layers": 10**9}, "is not a number of blocks"),
        ({"nemohybrid": {"hidden_size": 64}}, "nemohybrid.hidden_size: no such setting, or one that has a field"),
        ({"nemohybrid": {"pattern": "M-M*-M"}}, "nemohybrid.pattern=M-M.*is not the layers of the other fields"),
        ({"nemohybrid": [1]}, "nemohybrid is not an object"),
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
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for place in (folder.parent / "outside.safetensors", folder / "sub" / "model.safetensors"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    with pytest.raises(CheckpointError, match=f"lm_head.weight is in '{target}': not a safetensors file in"):
        load_hf(folder)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "absent"}}'])
def test_a_broken_index_is_named(content, changed_folder):
    folder = changed_folder("dense")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json|absent not found"):
        load_hf(folder)


def with_header(content, change):
    """The bytes of a safetensors file with other entries."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def last_tensor(file):
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])


DAMAGE = {
    "empty": (lambda c: b"", "backbone.embeddings.weight is lost: the file ends within its header, at byte 0"),
    "header cut": (lambda c: c[:100], "embeddings.weight is lost: the file ends within its header, at byte 100"),
    "header damaged": (lambda c: c[:8] + b"x" + c[9:], "embeddings.weight is lost: the header is damaged"),
    "data cut": (lambda c: c[:-4], "{last!r} is cut off: it needs the bytes .* of the data, and the file holds"),
    "longer": (lambda c: c + b"1234", "4 bytes after {last!r} belong to no tensor"),
    "an entry": (
        lambda c: with_header(c, lambda h: h["lm_head.weight"].update(data_offsets=[0])),
        "'lm_head.weight' has a damaged entry",
    ),
    "a place": (
        lambda c: with_header(c, lambda h: h["lm_head.weight"].update(shape=[63, 32])),
        "'lm_head.weight' does not lie where its shape",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_weight_file_is_refused_with_its_first_tensor(damage, message, changed_folder):
    folder = changed_folder("dense")
    file = folder / "model.safetensors"
    message = message.format(last=last_tensor(file))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors cannot be read: .*{message}"):
        load_hf(folder)


def test_a_shard_without_a_header_is_refused_with_its_first_tensor_in_the_index(changed_folder):
    folder = changed_folder("dense")
    into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    lost = next(name for name, file in listed.items() if file == "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=rf"00002-of-00002\.safetensors cannot be read: {lost} is lost"):
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
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is pickled, which could run code, and is never read"
    ):
        load_hf(folder)


def test_code_in_a_folder_is_not_run(changed_folder, untouched_folder, tmp_path):
    """NVIDIA's folders name remote code; it is neither imported nor a reason to refuse them."""
    folder = changed_folder("dense", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.NemotronHForCausalLM"}})
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert torch.equal(load_hf(folder)(IDS), load_hf(untouched_folder("dense"))(IDS))
    assert not (tmp_path / "ran").exists(), "the folder's code was run"


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


LIES = {
    "elsewhere": (
        lambda m: m.update({"lm_head.weight": "model-00001-of-00002.safetensors"}),
        "lm_head.weight is in model-00001-of-00002.safetensors, but it is in model-00002-of",
    ),
    "not listed": (lambda m: m.pop("lm_head.weight"), "lm_head.weight is nowhere, but it is in model-00002-of"),
    "invented": (
        lambda m: m.update(more="model-00001-of-00002.safetensors"),
        "more is in model-00001-of-00002.safetensors, but it is not",
    ),
    "no such shard": (
        lambda m: m.update(more="model-00003-of-00003.safetensors"),
        "model-00003-of-00003.safetensors not found; .* says that it holds more",
    ),
    "a long name": (
        lambda m: m.update(more="a" * 5000 + ".safetensors"),
        "a.safetensors not found; .* says that it holds more",
    ),
    "half a letter": (lambda m: m.update({"\ud800": "a"}), "is not JSON: .*surrogates not allowed"),
    "no file name": (lambda m: m.update(more=3), "more is in 3: not a safetensors file"),
    "pickled": (lambda m: m.update(more="pytorch_model.bin"), "more is in 'pytorch_model.bin': not a safetensors file"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=list(LIES))
def test_an_index_that_lies_is_refused_with_the_tensor(change, message, changed_folder):
    folder = changed_folder("dense")
    into_shards(folder)
    rewrite_index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_hf(folder)


def test_two_sets_of_weights_are_refused(changed_folder):
    folder = changed_folder("dense")
    weights = (folder / "model.safetensors").read_bytes()
    into_shards(folder)
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="two sets of weights"):
        load_hf(folder)


def test_types_that_fp32_does_not_hold_are_refused(changed_folder):
    def to_float64(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"].double()

    with pytest.raises(CheckpointError, match=r"lm_head\.weight is F64\. Legal: F32, BF16, F16"):
        load_hf(changed_folder("dense", tensors=to_float64))


def test_eight_bits_without_their_scales_are_refused(changed_folder):
    def to_float8(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float8_e4m3fn)

    with pytest.raises(CheckpointError, match=r"lm_head\.weight is F8_E4M3\. Legal: F32, BF16, F16"):
        load_hf(changed_folder("dense", tensors=to_float8))


def test_a_folder_does_not_choose_what_the_caller_computes_in(changed_folder):
    with pytest.raises(CheckpointError, match=r"nemohybrid\.dtype: no such setting"):
        load_hf(changed_folder("dense", {"nemohybrid": {"dtype": "bfloat16"}}))


def test_a_padding_beyond_all_measure_is_refused_before_it_is_allocated(changed_folder):
    with pytest.raises(CheckpointError, match=r"vocab_multiple=1000000000 would pad 64 ids .* Legal: up to 1024"):
        load_hf(changed_folder("dense", {"nemohybrid": {"vocab_multiple": 10**9}}))


def test_more_experts_than_tensors_are_refused_before_they_are_counted(changed_folder):
    with pytest.raises(CheckpointError, match="describes 7 layers of 1000000000 experts, but the folder has"):
        load_hf(changed_folder("moe", {"n_routed_experts": 10**9}))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_folder_is_refused_or_means_something(seed, changed_folder):
    """One byte changed anywhere in the header, or in config.json: a CheckpointError or a model, never another error."""
    folder = changed_folder("dense")
    draw = random.Random(seed)
    file = folder / ("config.json" if seed % 2 else "model.safetensors")
    content = bytearray(file.read_bytes())
    end = len(content) if seed % 2 else 8 + int.from_bytes(content[:8], "little")
    content[draw.randrange(end)] = draw.randrange(256)
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        load_hf(folder)


# --- multi-token prediction ------------------------------------------------------------------------------------------


def test_mtp_blocks_have_the_depth_of_the_folder_or_the_one_asked_for(untouched_folder):
    folder = untouched_folder("mtp")
    assert load_hf(folder).config.pattern == "ME*E/*E"
    assert load_hf(folder, mtp_depth=0).config.pattern == "ME*E"
    twice = load_hf(folder, mtp_depth=2)  # as the published Super is trained: one block, two depths
    assert (twice.config.pattern, len(twice.mtp)) == ("ME*E/*E/*E", 1)
    assert [draft.shape[1] for draft in twice.forward_mtp(IDS)] == [11, 10]


def test_a_depth_that_cannot_be_is_refused(untouched_folder):
    with pytest.raises(CheckpointError, match=r"an MTP depth of 2 was asked for, the folder has 0\. Legal: 0"):
        load_hf(untouched_folder("moe"), mtp_depth=2)
    with pytest.raises(CheckpointError, match=r"depth of 100 was asked for, the folder has 1\. Legal: any up to 64"):
        load_hf(untouched_folder("mtp"), mtp_depth=100)


def test_what_transformers_saved_without_mtp_weights_is_refused_with_the_way_out(changed_folder):
    def drop_mtp(weights):
        for name in [name for name in weights if name.startswith("mtp.")]:
            del weights[name]

    folder = changed_folder("mtp", tensors=drop_mtp)
    with pytest.raises(
        CheckpointError, match=r"(?s)missing tensor mtp\.layers\.0\.enorm.*An MTP depth of 0 reads the fold"
    ):
        load_hf(folder)
    assert load_hf(folder, mtp_depth=0)(IDS).shape == (1, 12, 64)


def test_mtp_weights_that_the_config_does_not_count_are_refused_with_the_way_out(changed_folder):
    folder = changed_folder("mtp", {"num_nextn_predict_layers": 0})
    with pytest.raises(
        CheckpointError, match=r"(?s)unexpected tensor mtp\.layers\.0.*An MTP depth of 0 reads the folder"
    ):
        load_hf(folder)


# --- tied embeddings -------------------------------------------------------------------------------------------------


def test_tied_embeddings_need_one_matrix_or_two_equal_ones(changed_folder):
    def tie(weights):
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"].clone()

    model = load_hf(changed_folder("dense", {"tie_word_embeddings": True}, tie))
    assert model.output is model.embedding


def test_a_tied_head_may_be_absent(changed_folder):
    model = load_hf(
        changed_folder("dense", {"tie_word_embeddings": True}, lambda weights: weights.pop("lm_head.weight"))
    )
    assert model.output is model.embedding


def test_a_head_that_should_be_tied_and_is_not_is_refused(changed_folder):
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: config\.json says tie_word_embeddings, but it differs"
    ):
        load_hf(changed_folder("dense", {"tie_word_embeddings": True}))
