"""Calls of our kernels at sizes of one's choice, with their twins: what `nemohybrid_kernels.canary.check` compares."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid.train.canary_cases import Draw
from nemohybrid_kernels.activation import squared_relu, squared_relu_torch
from nemohybrid_kernels.calls import BF16, Experts, Mixer
from nemohybrid_kernels.canary import Case, Tensors
from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.cross_entropy import linear_cross_entropy
from nemohybrid_kernels.mixer import mamba2_mixer
from nemohybrid_kernels.moe import expert_mlp
from nemohybrid_kernels.norm import gated_rms_norm, rms_norm
from nemohybrid_kernels.ssd import ssd_scan

EPS = 1e-5
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_devices(names: Iterable[str], on_cpu: Iterable[str]) -> list[Any]:
    """Pairs for "device, name": all on a GPU, and some on the CPU, where each takes the interpreter seconds."""
    of_gpu = [pytest.param("cuda", name, marks=ON_GPU, id=f"cuda-{name}") for name in names]
    return [*of_gpu, *(pytest.param("cpu", name, id=f"cpu-{name}") for name in on_cpu)]


@dataclass(frozen=True)
class Rows:
    """Of a norm or an activation, or of logits: then `width` is the vocabulary and `inner` the width of its input."""

    tokens: int
    width: int
    dtype: torch.dtype = BF16
    inner: int = 64


def call(operator: str, sizes: Any, inputs: Callable[[Draw], Tensors], run: Callable[..., Any]) -> Case:
    """run(backend=..., **inputs) by our kernels and by the twin."""
    run_twin = partial(run, backend="plain" if operator == "cross_entropy" else "torch")
    drawn = partial(_drawn, inputs, sizes.dtype)
    return Case(operator, "triton", str(sizes), drawn, partial(run, backend="triton"), run_twin)


def _drawn(inputs: Callable[[Draw], Tensors], dtype: torch.dtype) -> Tensors:
    return inputs(Draw(dtype))


def _documents(sizes: Mixer) -> Tensors:
    """Of one token, one that ends within a chunk, and the rest."""
    if not sizes.packed:
        return {}
    first = torch.tensor([0, 1, sizes.tokens // 3 + 5])
    return {"document_ids": (torch.arange(sizes.tokens)[:, None] >= first).sum(1, dtype=torch.int32)[None]}


def _decays(draw: Draw, heads: int) -> Tensors:
    """Strong ones: what is some dozens of tokens ago is forgotten."""
    return {"A": -1 - draw.weight(heads).abs(), "D": draw.weight(heads, mean=1.0)}


def mixer_call(sizes: Mixer) -> Case:
    """All between the projections of a Mamba-2 layer, one row."""

    def inputs(draw: Draw) -> Tensors:
        given = {"zxbcdt": draw.normal(1, sizes.tokens, sizes.inner + sizes.convolved + sizes.heads)}
        given |= {"conv_weight": draw.weight(sizes.convolved, sizes.taps, scale=sizes.taps**-0.5)}
        given |= {"conv_bias": draw.weight(sizes.convolved, scale=0.2), "dt_bias": draw.weight(sizes.heads)}
        given |= {"norm_weight": draw.weight(sizes.inner, scale=0.2, mean=1.0)}
        return given | _decays(draw, sizes.heads) | _documents(sizes)

    named: dict[str, Any] = {"heads": sizes.heads, "groups": sizes.groups, "state": sizes.state}
    run = partial(mamba2_mixer, **named, recompute=sizes.recompute, group_size=sizes.inner // sizes.groups, eps=EPS)
    return call("mamba2_mixer", sizes, inputs, run)


def scan_call(sizes: Mixer) -> Case:
    """With a state to go on from, and the state after it."""

    def inputs(draw: Draw) -> Tensors:
        row, groups = (1, sizes.tokens), (sizes.groups, sizes.state)
        given = {
            "x": draw.normal(*row, sizes.heads, sizes.width),
            "dt": F.softplus(draw.normal(*row, sizes.heads).float()),
        }
        given |= {"B": draw.normal(*row, *groups), "C": draw.normal(*row, *groups)}
        given |= {"initial_state": draw.weight(1, sizes.heads, sizes.width, sizes.state)}
        return given | _decays(draw, sizes.heads) | _documents(sizes)

    return call("ssd_scan", sizes, inputs, ssd_scan)


def conv_call(sizes: Mixer) -> Case:
    """With inputs of before."""

    def inputs(draw: Draw) -> Tensors:
        C, K = sizes.convolved, sizes.taps
        given = {"x": draw.normal(1, sizes.tokens, C), "weight": draw.weight(C, K, scale=K**-0.5)}
        given |= {"bias": draw.weight(C, scale=0.2), "initial_state": draw.normal(1, K - 1, C)}
        return given | _documents(sizes)

    return call("causal_conv1d", sizes, inputs, causal_conv1d)


def norm_call(sizes: Rows) -> Case:
    """The plain norm."""

    def inputs(draw: Draw) -> Tensors:
        return {"x": draw.normal(sizes.tokens, sizes.width), "weight": draw.weight(sizes.width, mean=1.0)}

    return call("rms_norm", sizes, inputs, partial(rms_norm, eps=EPS))


def gated_norm_call(sizes: Rows) -> Case:
    """In 8 groups."""

    def inputs(draw: Draw) -> Tensors:
        x, z = (draw.normal(sizes.tokens, sizes.width) for _ in "xz")
        return {"x": x, "z": z, "weight": draw.weight(sizes.width, mean=1.0)}

    return call("gated_rms_norm", sizes, inputs, partial(gated_rms_norm, group_size=sizes.width // 8, eps=EPS))


def squared_relu_call(sizes: Rows) -> Case:
    """Between the products of a feed-forward layer."""
    return call("squared_relu", sizes, lambda draw: {"h": draw.normal(sizes.tokens, sizes.width)}, squared_relu)


def loss_call(sizes: Rows) -> Case:
    """The output projection and its loss."""

    def inputs(draw: Draw) -> Tensors:
        labels = torch.randint(sizes.width, (sizes.tokens,), generator=draw.generator)
        weight = draw.weight(sizes.width, sizes.inner, scale=sizes.inner**-0.5)
        return {"x": draw.normal(sizes.tokens, sizes.inner), "weight": weight, "labels": labels}

    return call("cross_entropy", sizes, inputs, partial(linear_cross_entropy, columns=sizes.width))


def experts_call(sizes: Experts, experts: int = 8) -> Case:
    """Squared-ReLU experts, one of them without tokens where there are more than a token visits."""

    def inputs(draw: Draw) -> Tensors:
        K, D, W = sizes.per_token, sizes.hidden, sizes.width
        scores = torch.rand(sizes.tokens, experts, generator=draw.generator)
        scores[:, experts // 2] *= float(experts <= K)
        weights, ids = scores.topk(K)
        up, down = draw.weight(experts, W, D, scale=D**-0.5), draw.weight(experts, D, W, scale=W**-0.5)
        return {"x": draw.normal(sizes.tokens, D), "expert_ids": ids, "expert_weights": weights, "up": up, "down": down}

    made = call("expert_mlp", sizes, inputs, partial(expert_mlp, activation=squared_relu))
    return replace(made, twin=partial(expert_mlp, activation=squared_relu_torch, backend="torch"))


def at_the_end(case: Case, tokens: int, last: int, names: Sequence[str], axis: int) -> Case:
    """The `last` tokens of a row of `tokens`, of which the case's are the last. The twin sees the case's alone.

    names: the arguments with an entry for each token, along `axis`. What stands before is made of copies of the row, and
    of another document; without documents it must be forgotten before the `last` tokens. There is no initial state, which
    the twin would meet elsewhere.
    """

    def inputs() -> Tensors:
        return {name: tensor for name, tensor in case.inputs().items() if name != "initial_state"}

    def run(**given: Tensor) -> Tensor:
        longer = {name: _preceded(name, t, tokens, axis) if name in names else t for name, t in given.items()}
        return end(case.run(**longer))

    def end(returned: Any) -> Tensor:
        y = returned[0] if isinstance(returned, tuple) else returned
        return y.narrow(axis, y.shape[axis] - last, last)

    sizes = f"{case.sizes} at the end of {tokens}"
    return replace(case, sizes=sizes, inputs=inputs, run=run, twin=lambda **given: end(case.twin(**given)))


def _preceded(name: str, tensor: Tensor, tokens: int, axis: int) -> Tensor:
    held = tensor.shape[axis]
    before = tensor.detach().index_select(axis, torch.arange(tokens - held, device=tensor.device) % held)
    return torch.cat([torch.zeros_like(before) if name == "document_ids" else before, tensor], axis)
