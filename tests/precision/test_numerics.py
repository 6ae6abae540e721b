"""Quantized tensors are those of Transformer Engine, bit by bit, and rounding does what its name says."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemohybrid.precision.formats import (
    E2M1,
    E4M3,
    E5M2,
    exponent_rounded_up,
    of_exponent,
    power_of_2_below,
    stochastic_e2m1,
)
from nemohybrid.precision.hadamard import hadamard
from nemohybrid.precision.numerics import (
    quantize_fp8,
    quantize_fp8_block,
    quantize_fp8_current,
    quantize_mxfp8,
    quantize_nvfp4,
)
from nemohybrid.precision.philox import philox, random_bytes

GOLDEN = load_file(Path(__file__).parent / "fixtures" / "transformer_engine.safetensors")
"""What Transformer Engine's reference quantizers gave; tests/precision/fixtures/README.md says how it is named."""
CASES = sorted(name.removesuffix(".values") for name in GOLDEN if name.endswith(".values"))
CPU = torch.device("cpu")


def quantized(case):
    kind, dtype, data, *options = case.split(".")
    if kind == "fp8_current":
        return quantize_fp8_current(GOLDEN[f"x.{dtype}.{data}"], options[0], "pow2" in options)
    if kind == "fp8_block":
        return quantize_fp8_block(GOLDEN[f"x.{dtype}.block"], options[0], int(data.split("x")[0]), "pow2" in options)
    if kind == "mxfp8":
        return quantize_mxfp8(GOLDEN[f"{case}.x"], two_d=True)
    x, transposed = GOLDEN[f"x.{dtype}.{data}"], "col" in options
    block = "16x16" if "2d" in options else "1x16"
    return quantize_nvfp4(x.T.contiguous() if transposed else x, block, hadamard="rht" in options and transposed)


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_scales_are_those_of_transformer_engine(case):
    got = quantized(case)
    assert torch.equal(got.values, GOLDEN[f"{case}.values"].float())
    stored = {"nvfp4": "scale", "mxfp8": "scale_e8m0"}.get(case.split(".")[0], "scale_inv")
    assert torch.equal(got.scale, GOLDEN[f"{case}.{stored}"])
    if f"{case}.amax" in GOLDEN:
        assert torch.equal(got.amax, GOLDEN[f"{case}.amax"])


def test_every_tensor_of_the_golden_file_is_compared():
    compared = {f"{case}.{of}" for case in CASES for of in ("values", "scale", "scale_inv", "scale_e8m0", "amax")}
    inputs = {name for name in GOLDEN if name.startswith("x.") or name.endswith(".x") or name.startswith("nvfp4_gemm")}
    assert set(GOLDEN) <= compared | inputs


def numbers_of(fmt):
    """All finite numbers of a format that are not negative, in order, with their codes."""
    if fmt is E2M1:
        return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).float()
    return codes[codes.isfinite()]


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda fmt: fmt.name)
def test_nearest_is_nearest_with_ties_to_the_even_code(fmt):
    table = numbers_of(fmt)
    assert (table[-1], table[1]) == (fmt.max, fmt.smallest)
    middles = (table[1:] + table[:-1]) / 2
    even = torch.where(torch.arange(len(middles)) % 2 == 0, table[:-1], table[1:])
    assert torch.equal(fmt.nearest(middles), even)
    assert torch.equal(fmt.nearest(-middles), -even)
    assert torch.equal(fmt.nearest(torch.nextafter(middles, table[1:])), table[1:])
    assert torch.equal(fmt.nearest(torch.nextafter(middles, table[:-1])), table[:-1])
    assert torch.equal(fmt.nearest(table), table)
    assert torch.equal(fmt.nearest(torch.tensor([1e30, -math.inf])), torch.tensor([fmt.max, -fmt.max]))
    assert fmt.nearest(torch.tensor([math.nan])).isnan()


def test_exponents_are_rounded_up():
    values = [0.0, 1.0, 1.0000001, 1.5, 2.0, 448.0, 2.0**-126, 2.0**-127, 2.0**-149, 1.1 * 2.0**-127, 3.0e38]
    expected = [0, 127, 128, 128, 128, 136, 1, 0, 0, 1, 254]
    got = exponent_rounded_up(torch.tensor(values))
    assert got.tolist() == expected
    assert of_exponent(got).tolist() == [2.0 ** (e - 127) for e in expected]


def test_powers_of_two_below():
    assert power_of_2_below(torch.tensor([1.0, 1.9, 4.0, 0.3])).tolist() == [1.0, 1.0, 4.0, 0.25]


def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean():
    """Over all 256 bytes the mean is off by 1/512 of the distance of neighbours at most: exactly, not by luck."""
    x = torch.linspace(-6, 6, 4001)
    every = torch.arange(256, dtype=torch.uint8)
    drawn = stochastic_e2m1(x[:, None].expand(-1, 256), every.expand(len(x), -1))
    table = numbers_of(E2M1)
    above = torch.searchsorted(table, x.abs()).clamp(max=7)
    below = torch.where(table[above] == x.abs(), above, above - 1)
    assert torch.isin(drawn.abs(), table).all()
    assert (drawn.abs().amin(1) >= table[below]).all()
    assert (drawn.abs().amax(1) <= table[above]).all()
    distance = (table[above] - table[below]).clamp(min=1e-9)
    assert ((drawn.mean(1) - x).abs() <= distance / 512 + 1e-6).all()


def test_stochastic_rounding_of_a_tensor_is_unbiased():
    """n = 1024 draws of 4096 numbers: their mean is off by no more than chance allows, 5 standard errors of the mean of all."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = quantize_nvfp4(x)
    total = torch.zeros_like(x)
    for step in range(1024):
        total += quantize_nvfp4(x, random=random_bytes(x.shape, (1, 2), (step, 0, 0), CPU)).dequantize()
    error = total / 1024 - x
    inside = exact.values.abs() < 6  # what a block's rounded scale takes above 6 is clamped, by any rounding
    step = exact.scale.repeat_interleave(16, 1) * exact.amax / 2688 * 2  # the largest distance of two numbers
    assert (error.abs() / step)[inside].max() < 5 * 0.5 / 1024**0.5
    assert abs((error / step)[inside].mean()) < 5 * 0.5 / (1024 * inside.sum()) ** 0.5 + 1 / 512
    nearest = (exact.dequantize() - x)[inside].square().mean()
    assert error[inside].square().mean() < nearest / 50


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """Known answers of Random123, the authors' library."""
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_bytes_depend_on_key_place_and_nothing_else():
    shape, of = (
        torch.Size((33, 5)),
        [((1, 2), (3, 4, 5)), ((1, 3), (3, 4, 5)), ((1, 2), (4, 4, 5)), ((1, 2), (3, 4, 6))],
    )
    drawn = [random_bytes(shape, key, place, CPU) for key, place in of]
    assert torch.equal(drawn[0], random_bytes(shape, *of[0], CPU))
    assert all((drawn[0] != other).float().mean() > 0.9 for other in drawn[1:])
    assert torch.equal(drawn[0].flatten()[:80], random_bytes(torch.Size((80,)), *of[0], CPU)), "a longer tensor goes on"


def test_the_transform_cancels_in_a_product_and_spreads_an_outlier():
    x, y = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(hadamard(x) @ hadamard(y).T, x @ y.T)
    spike = torch.zeros(1, 32)
    spike[0, 3] = 8.0
    assert hadamard(spike).abs().tolist() == [[2.0] * 16 + [0.0] * 16]


EDGES = {
    "fp8_block 1x128": (lambda x: quantize_fp8_block(x), 1, 128),
    "fp8_block 128x128": (lambda x: quantize_fp8_block(x, rows=128), 128, 128),
    "mxfp8 1x32": (lambda x: quantize_mxfp8(x), 1, 32),
    "mxfp8 32x32": (lambda x: quantize_mxfp8(x, two_d=True), 32, 32),
    "nvfp4 1x16": (lambda x: quantize_nvfp4(x), 1, 16),
    "nvfp4 16x16": (lambda x: quantize_nvfp4(x, "16x16"), 16, 16),
}


@pytest.mark.parametrize("name", EDGES)
def test_a_block_at_the_edge_is_one_filled_up_with_zeros(name):
    quantize, rows, columns = EDGES[name]
    x = torch.randn(rows + 3, columns + 5, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (0, columns - 5, 0, -len(x) % rows))
    got, wanted = quantize(x), quantize(padded)
    assert got.values.shape == x.shape
    assert torch.equal(got.values, wanted.values[: len(x), : x.shape[1]])
    assert torch.equal(got.dequantize(), wanted.dequantize()[: len(x), : x.shape[1]])


@pytest.mark.parametrize("name", [*EDGES, "fp8_current"])
def test_what_comes_back_is_within_half_a_step(name):
    """Of the largest of a block: E4M3 has 4 digits, E2M1 2, and NVFP4's scales are rounded to 4 themselves."""
    quantize = EDGES[name][0] if name in EDGES else quantize_fp8_current
    x = torch.randn(130, 256, generator=torch.Generator().manual_seed(0)) * 10
    off = (quantize(x).dequantize() - x).abs() / x.abs().max()
    assert off.max() < (1 / 6 if "nvfp4" in name else 1 / 16)
    assert off.max() > 0


def test_a_known_scale_saturates():
    got = quantize_fp8(torch.tensor([[1.0, 100.0, -1000.0]]), "e4m3", torch.tensor([2.0]))
    assert got.dequantize().tolist() == [[1.0, 96.0, -224.0]], "200 is as near to 192 as to 208, which is odd"


@pytest.mark.parametrize("quantize", [quantize_fp8_current, quantize_nvfp4], ids=["fp8_current", "nvfp4"])
def test_parts_with_the_largest_of_the_whole_are_parts_of_the_whole(quantize):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize(x)
    parts = [quantize(part, amax=x.abs().amax().view(1)) for part in x.chunk(2)]
    assert torch.equal(torch.cat([part.values for part in parts]), whole.values)


def test_what_is_no_number_stays_none():
    """Not a number that looks healthy: the health of a run is seen in what it computes."""
    x = torch.ones(16, 32)
    x[3, 5] = math.nan
    for quantize in [quantize_fp8_current, quantize_fp8_block, quantize_mxfp8, quantize_nvfp4]:
        assert quantize(x).dequantize()[3, 5].isnan()


def test_the_products_of_a_layer_are_those_of_transformer_engine():
    """NVFP4 as it trains: square blocks of weights, the transform along tokens, rounding to nearest."""
    x, w, dy = (GOLDEN[f"nvfp4_gemm.{name}"] for name in ("x", "w", "dy"))
    weight = quantize_nvfp4(w, "16x16").dequantize()
    products = {
        "y": quantize_nvfp4(x).dequantize() @ weight.T,
        "dx_no_sr": quantize_nvfp4(dy).dequantize() @ weight,
        "dw_no_sr": quantize_nvfp4(dy.T.contiguous(), hadamard=True).dequantize()
        @ quantize_nvfp4(x.T.contiguous(), hadamard=True).dequantize().T,
    }
    for name, got in products.items():
        wanted = GOLDEN[f"nvfp4_gemm.{name}"]
        assert (got - wanted).norm() / wanted.norm() < 1e-6, name


def test_square_blocks_are_the_same_numbers_both_ways():
    """So the weight that the gradient meets is the one that made the output."""
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    for quantize in (lambda t: quantize_nvfp4(t, "16x16"), lambda t: quantize_mxfp8(t, two_d=True)):
        assert torch.equal(quantize(w).dequantize(), quantize(w.T.contiguous()).dequantize().T)
    assert not torch.equal(quantize_nvfp4(w).dequantize(), quantize_nvfp4(w.T.contiguous()).dequantize().T)
