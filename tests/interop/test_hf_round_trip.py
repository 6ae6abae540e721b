"""What is exported comes back bit for bit: from us to Hugging Face to us, and from there to us and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.model import AttentionConfig, ModelConfig, MTPConfig, RouterConfig
from nemohybrid.config.section import leaves
from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf import fields, load_hf, save, save_hf
from nemohybrid.interop.hf.config_in import config_of
from nemohybrid.interop.hf.config_out import config_json
from nemohybrid.interop.hf.files import stored_tensors
from nemohybrid.interop.hf.names import disk_tensors
from nemohybrid.model import HybridModel
from nemohybrid.parallel.layout import logical_parameters

FP32_NAMES = ("A_log", ".D", "dt_bias", "gate.weight", "e_score_correction_bias")


def all_tensors(model):
    return logical_parameters(model) | dict(model.named_buffers())


def weights_in(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys(), f"only on one side: {sorted(got.keys() ^ want.keys())}"
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, f"{name}: {got[name].dtype}"
        assert torch.equal(got[name], tensor), f"{name} has other values"


def test_a_folder_of_theirs_comes_back_with_every_bit(case, tmp_path):
    save_hf(load_hf(case.folder), tmp_path / "back")
    assert_same_bits(weights_in(tmp_path / "back"), weights_in(case.folder))


MODELS = {
    "all symbols": {"pattern": "M-*E"},
    "latent": {"pattern": "ME*", "moe_latent_size": 10, "router": RouterConfig(scaling_factor=2.5, groups=2)},
    "one block, two depths": {"pattern": "M|-*/M-/M-"},
    "two blocks": {"pattern": "M-/*E/*E", "mtp": MTPConfig(repeat_block=False, loss_weight=0.1)},
    "tied": {"pattern": "M-", "tie_embeddings": True},
    "padded vocabulary": {"pattern": "*-", "vocab_multiple": 16},
    "no shared expert, no bias": {
        "pattern": "ME/*E",
        "shared_expert_ffn_hidden_size": 0,
        "conv_bias": False,
        "router": RouterConfig(expert_bias=False),
    },
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request, tiny_model) -> HybridModel:
    """A tiny model whose balancing biases are not zero."""
    made = tiny_model(**request.param)
    for buffer in made.buffers():
        buffer.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_a_model_of_ours_comes_back_with_every_bit_and_setting(model, tmp_path):
    read = load_hf(save_hf(model, tmp_path / "hf"))
    assert_same_bits(all_tensors(read), all_tensors(model))
    assert read.config == model.config


def test_bf16_keeps_what_bf16_can_hold_and_the_rest_in_fp32(model, tmp_path):
    for name, tensor in all_tensors(model).items():
        if not name.endswith(("A_log", ".D", "dt_bias", "gate.weight", "expert_bias")):
            tensor.copy_(tensor.bfloat16())
    folder = save_hf(model, tmp_path / "hf", torch.bfloat16)
    for name, stored in stored_tensors(folder).items():
        assert stored.dtype == ("F32" if name.endswith(FP32_NAMES) else "BF16"), name
    assert_same_bits(all_tensors(load_hf(folder)), all_tensors(model))


def test_a_padding_that_no_reader_would_take_is_left_out(tiny_model, tmp_path):
    """Its rows mean nothing. The export must not be one that we refuse ourselves."""
    model = tiny_model("M-", vocab_multiple=2000)
    read = load_hf(save_hf(model, tmp_path / "hf"))
    assert read.config.vocab_multiple == 1
    rows = read.config.vocab_size
    assert torch.equal(read.embedding.weight, model.embedding.weight[:rows])


@pytest.mark.parametrize("name", ["gate.e_score_correction_bias", "shared_experts.up_proj.weight"])
def test_what_the_settings_do_without_must_be_zero(name, tiny_model, tmp_path):
    folder = save_hf(tiny_model(**MODELS["no shared expert, no bias"]), tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights[f"backbone.layers.1.mixer.{name}"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mixer\.{name}: is not zero, and the settings say"):
        load_hf(folder)


def test_shards_hold_what_one_file_holds(model, tmp_path):
    one = weights_in(save_hf(model, tmp_path / "one", torch.bfloat16))
    many = save_hf(model, tmp_path / "many", torch.bfloat16, max_shard_bytes=8000)
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in many.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 8000
    assert_same_bits(weights_in(many), one)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same_bits(all_tensors(load_hf(many)), all_tensors(load_hf(tmp_path / "one")))


def test_a_tensor_larger_than_a_shard_is_alone_in_one(tiny_model, tmp_path):
    folder = save_hf(tiny_model("M-"), tmp_path / "hf", max_shard_bytes=1)
    assert {len(load_file(file)) for file in folder.glob("*.safetensors")} == {1}


def test_every_setting_has_a_field_or_travels_as_ours_or_is_refused():
    """A new key of `model` needs a decision here, or it would be lost on the way without anybody knowing."""
    known = {field.ours for field in fields.FIELDS} | fields.OURS_ALONE | fields.NOT_THERE.keys()
    assert {key for key, _, _ in leaves(ModelConfig())} == known


REFUSED = {
    "activation": "swiglu",
    "linear_bias": True,
    "dt_limit": [0.01, 0.1],
    "attention": AttentionConfig(position_embedding="rope", qk_norm=True),
    "router": RouterConfig(score="softmax"),
    "output_norm": "*",
}


def test_what_they_do_not_have_is_refused_with_all_reasons(tiny_model, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        save_hf(tiny_model("M-*E", **REFUSED), tmp_path / "hf")
    for line in (
        "model.activation=swiglu: MLPs and experts there are squared ReLU",
        "model.linear_bias=True: attention there has no biases",
        "model.dt_limit=[0.01, 0.1]: transformers clamps time steps from below only",
        "model.attention.position_embedding=rope: attention there has no positions",
        "model.attention.qk_norm=True: queries and keys are not normalised there",
        "model.router.score=softmax: scores there are sigmoids",
        "model.output_norm=*: no mixer's output is normalised there",
    ):
        assert line in str(refused.value)
    assert not (tmp_path / "hf").exists()


def test_an_export_that_fails_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_write_json", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device\. Free some space"):
        save_hf(tiny_model("M-"), tmp_path / "out" / "hf")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_never_overwrites(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an empty folder; nothing in it is overwritten"):
        save_hf(tiny_model("M-"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_configs_say_layers_as_text_and_as_a_list_with_names_that_all_readers_know(tiny_model, tmp_path):
    config = json.loads((save_hf(tiny_model("M|-*E/*E/*E"), tmp_path / "hf") / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-*E"
    assert config["layers_block_type"] == ["mamba", "mlp", "attention", "moe"]
    assert config["mtp_layers_block_type"] == ["attention", "moe"]
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (4, 1)
    assert config["time_step_min"] == 1e-30
    assert config["nemohybrid"]["pattern"] == "M|-*E/*E/*E"


def test_the_name_of_a_folder_is_used_where_the_model_has_none(untouched_folder):
    assert load_hf(untouched_folder("moe")).config.name == "moe"


@pytest.mark.parametrize(("name", "parameters"), [("nemotron3_nano_30b", 31.578e9), ("nemotron3_super", 123.611e9)])
def test_published_models_have_as_many_numbers_on_disk_as_published(name, parameters):
    """Nothing is left out and nothing written twice; balancing biases, 512 a layer at most, do not count there."""
    with torch.device("meta"):
        model = HybridModel(load_model_config([f"model={name}"]).model)
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in disk_tensors(model).values())
    assert numbers == pytest.approx(parameters, rel=2e-5)
    assert config_of(config_json(model.config, torch.bfloat16), name, torch.bfloat16).pattern == model.config.pattern
