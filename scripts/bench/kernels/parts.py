"""Parts of the Mamba-2 mixer, each computed by several sides: ours, mamba-ssm's, and plain PyTorch.

A side is called with the inputs of its part by name. Those of one part return the same up to rounding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Draw, Sizes
from peer import Peer
from torch import Tensor

from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.mixer import mamba2_mixer
from nemohybrid_kernels.norm import gated_rms_norm
from nemohybrid_kernels.ssd import ssd_scan
from nemohybrid_kernels.ssd.triton import Call
from nemohybrid_kernels.ssd.triton.launch import decays_of

EPS = 1e-5
Inputs = dict[str, Tensor]
Side = Callable[..., Tensor]
Sides = Mapping[str, Side]


@dataclass(frozen=True)
class Part:
    """Among the `sides` are always "ours" and "torch". Where several are the peer's, in different chunks, the fastest counts."""

    name: str
    inputs: Callable[[Sizes, torch.device], Inputs]
    sides: Callable[[Sizes, Peer | None], Sides]
    has_backward: bool = True


def peer_chunks(sizes: Sizes) -> tuple[int, ...]:
    """The default of mamba-ssm and that of Megatron-LM; in the interpreter a tiny one."""
    return (256, 128) if sizes.tokens >= 256 else (16,)


def _peer_sides(peer: Peer | None, sizes: Sizes, side: Callable[[Peer, int], Side]) -> dict[str, Side]:
    if peer is None:
        return {}
    return {f"mamba-ssm, chunk {chunk}": side(peer, chunk) for chunk in peer_chunks(sizes)}


# --- convolution -----------------------------------------------------------------------------------------------------


def _conv_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    draw, channels = Draw(sizes, device), sizes.convolved
    x = draw.columns(sizes.inner, channels, sizes.heads)
    return {"x": x, "weight": draw(channels, 4, scale=0.5), "bias": draw(channels, scale=0.1)} | draw.documents()


def _conv_sides(sizes: Sizes, peer: Peer | None) -> Sides:
    sides: dict[str, Side] = {"ours": _conv("triton"), "torch": _conv("torch")}
    if peer is not None and peer.conv != "ours":
        sides["causal-conv1d"] = _conv("causal_conv1d")
    elif not sizes.packed:
        sides["F.conv1d"] = _torch_conv
    return sides


def _conv(backend: str) -> Side:
    return lambda **inputs: causal_conv1d(**inputs, backend=backend)[0]


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What there is without causal-conv1d: the depthwise convolution of torch, then the activation."""
    taps = weight.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


# --- time steps ------------------------------------------------------------------------------------------------------


def _steps_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    draw = Draw(sizes, device)
    heads = draw.per_head()
    dt = draw.columns(sizes.inner + sizes.convolved, sizes.heads, 0)
    return {"dt": dt, "A": heads["A"], "dt_bias": heads["dt_bias"]}


def _steps_sides(sizes: Sizes, peer: Peer | None) -> Sides:
    """Sums of the steps over chunks, and factors made of them, belong to it; compared are the steps."""

    def ours(dt: Tensor, A: Tensor, dt_bias: Tensor) -> Tensor:
        one = dt.new_zeros(1)  # the launcher reads shapes off tensors that it does not need here
        x = one.expand(1, sizes.tokens, sizes.heads, sizes.width)
        B = one.expand(1, sizes.tokens, sizes.groups, sizes.state)
        return decays_of(Call(x, dt, A, B, B, bias=dt_bias, softplus=True)).dt[..., : sizes.tokens]

    def twin(dt: Tensor, A: Tensor, dt_bias: Tensor) -> Tensor:
        return F.softplus(dt + dt_bias).transpose(1, 2)

    def of_peer(peer: Peer, chunk: int) -> Side:
        def run(dt: Tensor, A: Tensor, dt_bias: Tensor) -> Tensor:
            return peer.cumsum(dt, A, chunk, dt_bias=dt_bias, dt_softplus=True)[1].flatten(2)[..., : sizes.tokens]

        return run

    return {"ours": ours, "torch": twin} | _peer_sides(peer, sizes, of_peer)


# --- scan ------------------------------------------------------------------------------------------------------------


def _scan_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    draw, heads = Draw(sizes, device), (1, sizes.tokens, sizes.heads)
    groups = 1, sizes.tokens, sizes.groups, sizes.state
    of_head = draw.per_head()
    dt = F.softplus(draw(*heads, dtype=torch.float32) + of_head["dt_bias"])
    tensors = {"x": draw(*heads, sizes.width), "dt": dt, "A": of_head["A"], "B": draw(*groups), "C": draw(*groups)}
    return tensors | {"D": of_head["D"]} | draw.documents()


def _scan_sides(sizes: Sizes, peer: Peer | None) -> Sides:
    def of(backend: str) -> Side:
        return lambda **inputs: ssd_scan(**inputs, backend=backend)[0]

    def of_peer(peer: Peer, chunk: int) -> Side:
        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Tensor) -> Tensor:
            return peer.scan(x, dt, A, B, C, chunk, D=D, seq_idx=rest.get("document_ids"))

        return run

    return {"ours": of("triton"), "torch": of("torch")} | _peer_sides(peer, sizes, of_peer)


# --- gated norm ------------------------------------------------------------------------------------------------------


def _norm_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    draw = Draw(sizes, device)
    z = draw.columns(0, sizes.inner, sizes.convolved + sizes.heads)
    weight = 1 + draw(sizes.inner, dtype=torch.float32, scale=0.1)
    return {"x": draw(1, sizes.tokens, sizes.inner), "z": z, "weight": weight}


def _norm_sides(sizes: Sizes, peer: Peer | None) -> Sides:
    size = sizes.inner // sizes.groups

    def of(backend: str) -> Side:
        return lambda x, z, weight: gated_rms_norm(x, z, weight, group_size=size, eps=EPS, backend=backend)

    def of_peer(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return peer.norm(x, weight, None, z=z, eps=EPS, group_size=size, norm_before_gate=False)  # type: ignore[union-attr]

    return {"ours": of("triton"), "torch": of("torch")} | ({} if peer is None else {"mamba-ssm": of_peer})


# --- the whole middle ------------------------------------------------------------------------------------------------


def _middle_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    draw = Draw(sizes, device)
    channels = sizes.convolved
    zxbcdt = draw(1, sizes.tokens, sizes.inner + channels + sizes.heads)
    conv = {"conv_weight": draw(channels, 4, scale=0.5), "conv_bias": draw(channels, scale=0.1)}
    norm = {"norm_weight": 1 + draw(sizes.inner, dtype=torch.float32, scale=0.1)}
    return {"zxbcdt": zxbcdt} | conv | draw.per_head() | norm | draw.documents()


def _middle_sides(sizes: Sizes, peer: Peer | None) -> Sides:
    """From the output of the first projection to the input of the second."""
    named = {"heads": sizes.heads, "groups": sizes.groups, "state": sizes.state}
    size = sizes.inner // sizes.groups

    def of(backend: str) -> Side:
        return lambda **inputs: mamba2_mixer(**inputs, **named, group_size=size, eps=EPS, backend=backend)

    def of_peer(peer: Peer, chunk: int) -> Side:
        def run(zxbcdt: Tensor, **rest: Tensor) -> Tensor:
            weights = (rest[name] for name in ("conv_weight", "conv_bias", "dt_bias", "A", "D"))
            norm = {"rmsnorm_weight": rest["norm_weight"], "rmsnorm_eps": EPS, "norm_before_gate": False}
            shape = {"headdim": sizes.width, "ngroups": sizes.groups, "seq_idx": rest.get("document_ids")}
            return peer.split(zxbcdt, *weights, chunk, **norm, **shape)

        return run

    return {"ours": of("triton"), "torch": of("torch")} | _peer_sides(peer, sizes, of_peer)


MIDDLE = Part("middle", _middle_inputs, _middle_sides)
SCAN = Part("scan", _scan_inputs, _scan_sides)
PARTS = (
    MIDDLE,
    SCAN,
    Part("conv", _conv_inputs, _conv_sides),
    Part("norm", _norm_inputs, _norm_sides),
    Part("steps", _steps_inputs, _steps_sides, has_backward=False),
)
"""All of them: at the main sizes. On the grid the first two."""
