"""The roofline says what its parts say, grows with what it depends on, and can be replaced by what is measured."""

import json
from dataclasses import replace

import pytest
import torch

from nemohybrid.config.accounting import layer_cost
from nemohybrid.config.compose import load_model_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.pattern import Segment
from nemohybrid.plan.cost import CORE, MEMORY, PRODUCTS, Costs, Roofline, Time, from_json, modelled, to_json
from nemohybrid.plan.hardware import DEVICES, Device, device, peak_flops
from nemohybrid.plan.measure import measure

FAST_MEMORY = Device(flops=1e12, memory=1e30, network=1e30)
FAST_PRODUCTS = Device(flops=1e30, memory=1e12, network=1e30)


def configured(*words: str) -> RunConfig:
    return load_model_config(["model=tiny_latent_mtp", "data.sequence_length=64", *words])


@pytest.mark.parametrize("symbol", "M*-E")
def test_with_fast_memory_a_layer_takes_its_flops(symbol):
    config = configured()
    cost = layer_cost(symbol, config.model, sequence_length=64)
    time = Roofline.of(config, FAST_MEMORY).layer(symbol)
    products, core = (cost.flops - cost.core) * 64 / (1e12 * PRODUCTS), cost.core * 64 / 1e12 / CORE.get(symbol, 1)
    assert time.forward == pytest.approx(products + core)
    assert time.backward == pytest.approx(2 * products + 2.5 * core)


def test_with_fast_products_an_mlp_takes_what_it_reads_and_writes():
    config = configured("model.dtype=bfloat16")
    m, rate = config.model, 1e12 * MEMORY
    weights = layer_cost("-", m, 64).parameters
    activations = 64 * 2 * (2 * (m.ffn_hidden_size or 0) + 5 * m.hidden_size)
    time = Roofline.of(config, FAST_PRODUCTS).layer("-")
    assert time.forward == pytest.approx((2 * weights + activations) / rate)
    assert time.backward == pytest.approx((4 * weights + 10 * weights + 2 * activations) / rate)


def test_attention_grows_with_the_square_of_the_length_and_mamba_does_not():
    words = ["experiment=nemotron3_super"]
    short, long = (modelled(load_model_config([*words, f"data.sequence_length={n}"])) for n in (8192, 65536))
    assert long.layers["M"].both == pytest.approx(8 * short.layers["M"].both, rel=0.1)
    assert long.layers["*"].both > 20 * short.layers["*"].both


def test_ranks_that_share_a_layer_take_less_each():
    words = ["experiment=nemotron3_super"]
    alone, tensor, expert = (
        modelled(load_model_config([*words, *more])) for more in ([], ["parallel.tensor=4"], ["parallel.expert=64"])
    )
    for symbol in "M*E":
        assert alone.layers[symbol].both / 4.2 < tensor.layers[symbol].both < alone.layers[symbol].both / 2
    assert expert.layers["E"].both < 0.8 * alone.layers["E"].both
    assert expert.layers["M"] == alone.layers["M"]
    assert tensor.head.both < alone.head.both / 3
    assert tensor.transfer == pytest.approx(alone.transfer / 4)


def test_recomputation_adds_a_forward_pass_to_the_backward_pass():
    plain, again = (modelled(configured(f"train.recompute={how}")) for how in ("none", "layer"))
    for symbol, time in plain.layers.items():
        assert again.layers[symbol] == Time(time.forward, time.backward + time.forward)
    assert again.head.backward == plain.head.backward + plain.head.forward, "with MTP heads are computed again"


def test_rows_of_a_microbatch_multiply_the_work():
    words = ["experiment=nemotron_nano_v2_12b"]
    one, two = (modelled(load_model_config([*words, f"train.microbatch={rows}"])) for rows in (1, 2))
    assert two.layers["-"].both == pytest.approx(2 * one.layers["-"].both, rel=0.15)


def test_a_symbol_of_your_own_is_taken_for_an_mlp():
    roofline = Roofline.of(configured(), DEVICES["H100"])
    assert roofline.layer("Q") == roofline.layer("-")


def test_a_stage_is_its_layers_and_the_ends_it_has():
    costs = Costs({"M": Time(1, 2), "*": Time(10, 20)}, Time(100, 200), Time(1000, 2000), Time(1e4, 2e4), mtp_depth=2)
    assert costs.of(Segment(0, "MM*"), first=False, last=False) == Time(12, 24)
    assert costs.of(Segment(0, ""), first=True, last=False) == Time(100, 200)
    assert costs.of(Segment(3, "M"), first=False, last=True) == Time(21001, 42002)


def test_devices_are_known_by_name():
    assert device("H100").flops == peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert all(d.flops > 1e14 and d.memory > 1e12 for d in DEVICES.values())
    with pytest.raises(ConfigError, match=r"Did you mean 'H100'.*A100, B200"):
        device("H10")


# --- Measured ---------------------------------------------------------------------------------------------------------


def test_every_part_of_a_tiny_model_is_measured_and_comes_back_from_its_file(tmp_path):
    config = configured('model.pattern="M*-E/*E"', "train.recompute=layer")
    costs = measure(config, torch.device("cpu"), repeats=1)
    assert set(costs.layers) == set("M*-E")
    parts = [*costs.layers.values(), costs.embedding, costs.head, costs.mtp]
    assert all(time.forward > 0 and time.backward > 0 for time in parts)
    assert all(time.backward > time.forward for time in costs.layers.values()), "with recomputation"
    file = tmp_path / "costs.json"
    file.write_text(to_json(costs))
    assert from_json(file, config) == costs


def test_one_process_cannot_measure_what_ranks_share():
    with pytest.raises(ConfigError, match=r"parallel\.tensor=1"):
        measure(configured("parallel.tensor=2"), torch.device("cpu"))


GOOD = {"M": [1, 2], "*": [1, 2], "embedding": [0, 0], "head": [3, 4]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        (json.dumps([1]), r"a mapping of \*, M, embedding, head to \[forward, backward\]"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "M"}), "a mapping of"),
        (json.dumps(GOOD | {"E": [1, 2]}), "a mapping of"),
        (json.dumps(GOOD | {"M": [1]}), r"M must be \[forward, backward\] in seconds, not \[1\]"),
        (json.dumps(GOOD | {"M": [1, -2]}), "must not be below 0"),
        (json.dumps(GOOD | {"M": [1, float("nan")]}), "must not be below 0"),
    ],
)
def test_a_file_that_is_none_of_measured_times_is_refused(content, complaint, tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        from_json(file, configured('model.pattern="M*"'))


def test_measured_times_need_no_mtp_where_there_is_none(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(GOOD))
    costs = from_json(file, configured('model.pattern="M*"'))
    assert costs == replace(costs, layers={"*": Time(1, 2), "M": Time(1, 2)}, head=Time(3, 4), mtp_depth=0)
