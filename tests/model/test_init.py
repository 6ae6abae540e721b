"""First values: of the published size, and a function of (seed, logical name) alone."""

import copy

import pytest
import torch

from nemohybrid.model import HybridModel
from nemohybrid.parallel.layout import layout_of, logical_parameters

WIDE = {"hidden_size": 128, "ffn_hidden_size": 512, "mamba_num_heads": 64, "mamba_head_dim": 8, "ssm_state_size": 16}


@pytest.fixture
def fresh(tiny_config):
    """`fresh(pattern, seed=0, **changes)`: a model as `create` leaves it."""
    return lambda pattern, seed=0, **changes: HybridModel.create(tiny_config(pattern, **changes), seed)


def test_the_same_seed_gives_the_same_values_and_another_seed_others(fresh):
    first, again, other = (logical_parameters(fresh("M*-E", seed)) for seed in (3, 3, 4))
    for name, values in first.items():
        assert torch.equal(values, again[name]), name
        if values.unique().numel() > 1:  # not a constant 0 or 1
            assert not torch.equal(values, other[name]), f"{name} ignores the seed"


def test_no_two_tensors_share_their_random_numbers(fresh):
    model = logical_parameters(fresh("MM**--EE"))
    heads = [tuple(v.flatten()[:4].tolist()) for v in model.values() if v.unique().numel() > 1]
    assert len(set(heads)) == len(heads)


def test_a_layer_keeps_its_values_when_layers_follow(fresh):
    short, long = (logical_parameters(fresh(pattern, rescale_output_init=False)) for pattern in ("M*", "M*-E"))
    for name, values in short.items():
        assert torch.equal(values, long[name]), name


def test_the_residual_projections_shrink_with_the_root_of_the_layers(fresh):
    shallow, deep = (logical_parameters(fresh(pattern)) for pattern in ("M*-E", "M*-E" * 4))
    for name in ("0.mixer.out_proj", "1.mixer.out_proj", "2.mixer.fc2", "3.mixer.shared_expert.fc2"):
        torch.testing.assert_close(deep[f"layers.{name}.weight"], shallow[f"layers.{name}.weight"] / 2, msg=name)
    torch.testing.assert_close(deep["layers.3.mixer.experts.down"], shallow["layers.3.mixer.experts.down"] / 2)
    for name in ("0.mixer.in_proj.x", "1.mixer.qkv.q", "2.mixer.fc1.weight", "3.mixer.experts.up"):
        assert torch.equal(deep[f"layers.{name}"], shallow[f"layers.{name}"]), f"{name} is no residual projection"


def test_matrices_are_normal_with_the_std_of_the_papers(fresh):
    """Within 5%: the smallest matrix here has 8192 values, so its sample std is off by under 1%."""
    values = logical_parameters(fresh("M-*-", init_std=0.02, **WIDE, head_dim=32))
    residual = 0.02 / 4**0.5
    expected = {
        "embedding.weight": 0.02,
        "output.weight": 0.02,
        "layers.0.mixer.in_proj.z": 0.02,
        "layers.0.mixer.in_proj.dt": 0.02,
        "layers.0.mixer.out_proj.weight": residual,
        "layers.1.mixer.fc1.weight": 0.02,
        "layers.1.mixer.fc2.weight": residual,
        "layers.2.mixer.qkv.k": 0.02,
        "layers.2.mixer.out_proj.weight": residual,
    }
    for name, std in expected.items():
        assert abs(values[name].std() / std - 1) < 0.05, f"{name}: std {values[name].std():.4f}, expected {std:.4f}"
        assert values[name].mean().abs() < 0.05 * std, f"{name}: mean {values[name].mean():.5f}"


def test_mamba_vectors_start_in_the_published_ranges(fresh):
    values = logical_parameters(fresh("M", conv_kernel=4, **WIDE))
    decay, dt = values["layers.0.mixer.A_log"].exp(), torch.nn.functional.softplus(values["layers.0.mixer.dt_bias"])
    assert 1 <= decay.min() < 3, f"A from {decay.min()}"
    assert 14 < decay.max() <= 16, f"A to {decay.max()}"
    assert 0.999e-3 <= dt.min() < 2e-3, f"dt from {dt.min()}"
    assert 0.05 < dt.max() <= 0.1001, f"dt to {dt.max()}"
    assert abs(dt.log().mean() - torch.tensor(0.01).log()) < 0.5, "log-uniform: its middle is the geometric mean 0.01"
    assert (values["layers.0.mixer.D"] == 1).all()
    for name in ("conv.x", "conv.B", "conv.x.bias"):
        largest = values[f"layers.0.mixer.{name}"].abs().max()
        assert 0.4 < largest <= 0.5, f"{name}: uniform in 1/sqrt(4 taps), found {largest}"


def test_initial_time_steps_keep_their_floor(fresh):
    values = logical_parameters(fresh("M", dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-3, **WIDE))
    dt = torch.nn.functional.softplus(values["layers.0.mixer.dt_bias"])
    torch.testing.assert_close(dt.min(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_norms_start_at_one_and_biases_at_zero(fresh):
    for name, values in logical_parameters(fresh("M*-E", linear_bias=True)).items():
        if name.endswith("norm.weight"):
            assert (values == 1).all(), name
        if name.endswith(".bias") and ".conv." not in name:
            assert (values == 0).all(), name


def test_router_biases_start_at_zero(fresh):
    assert fresh("E").layers[0].mixer.router.expert_bias.tolist() == [0.0] * 6


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
def test_layouts_cover_every_parameter_exactly_and_names_are_unique(activation, fresh):
    model = fresh("M*-E", activation=activation, linear_bias=True)
    for name, parameter in model.named_parameters():
        layout = layout_of(parameter)
        assert layout.shape == tuple(parameter.shape), name
        counter = torch.zeros(parameter.shape, dtype=torch.int32)
        for piece, view in layout.views(counter):
            assert tuple(view.shape) == piece.shape, f"{name}, piece {piece.name}"
            view += 1
        assert (counter == 1).all(), f"{name}: pieces overlap or leave a gap"
    values = logical_parameters(model)
    assert sum(v.numel() for v in values.values()) == sum(p.numel() for p in model.parameters())


def test_logical_names_are_those_of_the_contract(fresh):
    names = set(logical_parameters(fresh("M*-E", linear_bias=True)))
    mamba = {f"in_proj.{p}{b}" for p in ("z", "x", "B", "C", "dt") for b in ("", ".bias")}
    mamba |= {f"conv.{p}{b}" for p in ("x", "B", "C") for b in ("", ".bias")}
    mamba |= {"A_log", "D", "dt_bias", "norm.weight", "out_proj.weight", "out_proj.bias"}
    assert {n.removeprefix("layers.0.mixer.") for n in names if n.startswith("layers.0.mixer.")} == mamba
    assert {"layers.1.mixer.qkv.q", "layers.1.mixer.qkv.q.bias", "layers.2.mixer.fc1.weight"} <= names
    assert {"embedding.weight", "output.weight", "final_norm.weight", "layers.3.norm.weight"} <= names
    assert {"layers.3.mixer.experts.up", "layers.3.mixer.router.gate.weight"} <= names


def test_padding_the_vocabulary_changes_no_initial_value(fresh):
    plain, padded = (logical_parameters(fresh("-", vocab_multiple=multiple)) for multiple in (1, 64))
    for name, values in plain.items():
        assert torch.equal(padded[name][: len(values)], values), f"{name} depends on the padding"


def test_the_plain_constructor_gives_the_weights_of_seed_0(tiny_config):
    config = tiny_config("M-*E")
    created = logical_parameters(HybridModel.create(config, seed=0))
    for name, value in logical_parameters(HybridModel(config)).items():
        assert torch.equal(value, created[name]), name


def test_a_copy_of_a_model_keeps_its_layouts_and_shares_nothing(tiny_model):
    model = tiny_model("M*-E/*E", tie_embeddings=True)
    twin = copy.deepcopy(model)
    assert twin.output is twin.embedding
    theirs = logical_parameters(twin)
    for name, values in logical_parameters(model).items():
        assert torch.equal(theirs[name], values), name
        assert theirs[name].data_ptr() != values.data_ptr(), name
