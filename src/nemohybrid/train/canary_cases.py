"""The calls that a model makes of operators with fused kernels, cut down to a few hundred tokens, for the kernel canary."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemohybrid.model.attention import Attention
from nemohybrid.model.embedding import VocabularyMatrix
from nemohybrid.model.mamba2 import CausalConv, Mamba2
from nemohybrid.model.mlp import MLP, computed_by
from nemohybrid.model.moe.layer import Experts, MoE
from nemohybrid.model.norm import GatedRMSNorm, RMSNorm
from nemohybrid_kernels.activation import is_squared_relu, squared_relu
from nemohybrid_kernels.attention import Documents, attention
from nemohybrid_kernels.attention.blocks import BLOCK
from nemohybrid_kernels.attention.parts.halves import attention_in_halves
from nemohybrid_kernels.canary import Case, Tensors
from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.cross_entropy import linear_cross_entropy
from nemohybrid_kernels.launching import cut_like
from nemohybrid_kernels.mixer import mamba2_mixer
from nemohybrid_kernels.moe import expert_mlp
from nemohybrid_kernels.norm import gated_rms_norm, rms_norm
from nemohybrid_kernels.ssd import ssd_scan

# B rows, L tokens, T = B*L, H heads, P head dim, G groups, N state, C channels, E experts, F width of an expert

PLAIN = ("torch", "plain", "separate")
"""Backends that are what others are compared with, or calls of several operators."""
OF_TORCH = ("auto", "sdpa", "grouped")
"""PyTorch's own kernels: on CPUs they are not suspected of anything."""
ROWS, MOST_EXPERTS = 2, 8
MOST_WEIGHTS = 2**26
"""Of an output projection: 0.5 GB in float64."""


@dataclass(frozen=True)
class Calls:
    """How a run calls its operators: types, device, whether rows hold several documents, how long a row is here; and how
    long one is in the run, and how many there are at a time."""

    dtype: torch.dtype
    device: torch.device
    packed: bool
    length: int
    row: int = BLOCK
    rows: int = 1

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
        chunk_size: int | None,
        row: int = BLOCK,
        rows: int = 1,
    ) -> "Calls":
        """Rows that cross two borders of chunks and end within one."""
        return cls(dtype, device, packed, 2 * (chunk_size or 128) + 45, row, rows)

    def of_attention(self) -> "Calls":
        """Rows of three blocks of FlexAttention, which compiles other code for rows that end within a block."""
        return replace(self, length=3 * BLOCK - (83 if self.row % BLOCK else 0))

    @property
    def words(self) -> str:
        """For the name of a case."""
        return f"{str(self.dtype).removeprefix('torch.')}{', documents' if self.packed else ''}"

    def is_suspect(self, backend: str) -> bool:
        """Whether a backend is held to its twin on this device."""
        return backend not in PLAIN and not (self.device.type == "cpu" and backend in OF_TORCH)

    def documents(self) -> Tensor:
        """[B, L]: a document of one token, one that ends within a chunk, and one that ends with the row."""
        first = torch.tensor([[0, 1, self.length // 3], [0, self.length // 2, self.length - 1]])
        return (torch.arange(self.length) >= first.unsqueeze(2)).sum(1).to(torch.int32)


class Draw:
    """Random arguments, the same in every process. All can be held in bf16, so that a cast of them changes nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """An activation, in the type of the model."""
        return (torch.randn(shape, generator=self.generator) * scale + mean).bfloat16().to(self.dtype)

    def weight(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """In fp32, as weights are kept."""
        return self.normal(*shape, scale=scale, mean=mean).float()


def cases_of(model: nn.Module, calls: Calls) -> list[Case]:
    """Every different call of a fused kernel in a training step of `model`, whose backends are bound."""
    found: dict[str, Case] = {}
    parts_of_fused = _parts_of_fused(model, calls)
    for module in model.modules():
        if module not in parts_of_fused and (case := _case(module, calls)) is not None:
            found.setdefault(case.name, case)
    return list(found.values())


def _parts_of_fused(model: nn.Module, calls: Calls) -> set[nn.Module]:
    """What a layer that is one operator does not call by itself, but to generate."""
    fused = [module for module in model.modules() if isinstance(module, Mamba2) and _is_fused(module, calls)]
    return {part for layer in fused for part in (layer.conv, layer.norm)}


def _is_fused(layer: Mamba2, calls: Calls) -> bool:
    return layer.is_fused(torch.empty(0, dtype=calls.dtype, device=calls.device))


def _case(module: nn.Module, calls: Calls) -> Case | None:
    match module:
        case Mamba2() if _is_fused(module, calls):
            return mixer_case(module, calls)
        case Mamba2() if calls.is_suspect(module.backend):
            return scan_case(module, calls)
        case CausalConv() if calls.is_suspect(module.backend):
            return conv_case(module, calls)
        case RMSNorm() if calls.is_suspect(module.backend):
            return norm_case(module, calls)
        case GatedRMSNorm() if calls.is_suspect(module.backend):
            return gated_norm_case(module, calls)
        case Attention() if module.rings:
            return ring_case(module, calls) if calls.is_suspect(module.ring_backend) else None
        case Attention() if calls.is_suspect(module.backend):
            return attention_case(module, calls)
        case MLP() if is_squared_relu(module.activation) and calls.is_suspect(module.backend):
            return activation_case(sum(module.fc1.widths), module.backend, calls)
        case Experts() if _activates(module) and calls.is_suspect(module.activation_backend):
            return activation_case(module.down.shape[2], module.activation_backend, calls)
        case MoE() if calls.is_suspect(module.experts.backend):
            return experts_case(module, calls)
        case VocabularyMatrix() if calls.is_suspect(module.backend):
            return loss_case(module, calls)
        case _:
            return None


def _activates(experts: Experts) -> bool:
    """Whether squared ReLU is an operator of its own there."""
    return is_squared_relu(experts.activation) and experts.backend != "triton"


def _made(
    operator: str, backend: str, sizes: str, calls: Calls, inputs: Callable[[Draw], Tensors], run: Callable[..., Any]
) -> Case:
    """run(backend=..., **inputs) is what the model calls."""

    def draw() -> Tensors:
        return inputs(Draw(calls.dtype))

    words = f"{sizes}, {calls.words}"
    return Case(operator, backend, words, draw, partial(run, backend=backend), partial(run, backend="torch"))


def _cut_as_trained(case: Case, calls: Calls) -> Case:
    """Our scan gives its programs more heads the more tokens there are, and cuts rows of few heads into segments."""
    if case.backend != "triton":
        return case
    words = f"{case.sizes}, cut as {calls.rows} x {calls.row} tokens"
    return replace(case, sizes=words, around=partial(cut_like, calls.rows, calls.row))


def _with_documents(inputs: Tensors, calls: Calls) -> Tensors:
    return inputs | ({"document_ids": calls.documents()} if calls.packed else {})


def _decays(draw: Draw, heads: int) -> dict[str, Tensor]:
    """A and D [H]: as at the start of training."""
    return {"A": -draw.weight(heads, mean=1.0).abs() - 0.1, "D": draw.weight(heads, mean=1.0)}


def mixer_case(layer: Mamba2, calls: Calls) -> Case:
    """All between the projections of a Mamba-2 layer."""
    H, G, N, inner, taps = layer.heads, layer.groups, layer.state, layer.inner, layer.conv.weight.shape[1]
    convolved = inner + 2 * G * N
    has_bias = layer.conv.bias is not None

    def inputs(draw: Draw) -> Tensors:
        given = {"zxbcdt": draw.normal(ROWS, calls.length, inner + convolved + H), **_decays(draw, H)}
        given |= {"conv_weight": draw.weight(convolved, taps, scale=taps**-0.5), "dt_bias": draw.weight(H, mean=-2.0)}
        given |= {"norm_weight": draw.weight(inner, scale=0.2, mean=1.0)}
        given |= {"conv_bias": draw.weight(convolved, scale=0.2)} if has_bias else {}
        return _with_documents(given, calls)

    def run(conv_bias: Tensor | None = None, **given: Any) -> Tensor:
        how = {"group_size": layer.norm.group_size, "eps": layer.norm.epsilon, "dt_limit": layer.dt_limit}
        how |= {"heads": H, "groups": G, "state": N, "chunk_size": layer.chunk_size, "recompute": layer.mixer_recompute}
        return mamba2_mixer(conv_bias=conv_bias, **given, **how)

    again = ", recomputing" if layer.mixer_recompute else ""
    sizes = f"{H} heads of {inner // H}, {G} groups, state {N}, {taps} taps{again}"
    backend = layer.fused_backend(torch.empty(0, dtype=calls.dtype, device=calls.device)) or "torch"
    return _cut_as_trained(_made("mamba2_mixer", backend, sizes, calls, inputs, run), calls)


def scan_case(layer: Mamba2, calls: Calls) -> Case:
    """x, B and C are views of wider rows, as the convolution leaves them."""
    H, P, G, N = layer.heads, layer.inner // layer.heads, layer.groups, layer.state

    def inputs(draw: Draw) -> Tensors:
        x, B, C = (draw.normal(ROWS, calls.length, width) for width in (H * P, G * N, G * N))
        steps = F.softplus(draw.normal(ROWS, calls.length, H, mean=-2.0).float())
        return _with_documents({"x": x, "dt": steps, "B": B, "C": C, **_decays(draw, H)}, calls)

    def run(x: Tensor, B: Tensor, C: Tensor, **given: Any) -> Tensor:
        x, B, C = torch.cat([x, B, C], -1).split([H * P, G * N, G * N], -1)
        B, C = (t.unflatten(-1, (G, N)) for t in (B, C))
        return ssd_scan(x.unflatten(-1, (H, P)), B=B, C=C, chunk_size=layer.chunk_size, **given)[0]

    case = _made("ssd_scan", layer.backend, f"{H} heads of {P}, {G} groups, state {N}", calls, inputs, run)
    return _cut_as_trained(case, calls)


def conv_case(conv: CausalConv, calls: Calls) -> Case:
    """x is a view of wider rows, as the projection leaves it."""
    C, K = conv.weight.shape

    def inputs(draw: Draw) -> Tensors:
        given = {"x": draw.normal(ROWS, calls.length, C), "weight": draw.weight(C, K, scale=K**-0.5)}
        bias = {} if conv.bias is None else {"bias": draw.weight(C, scale=0.2)}
        return _with_documents(given | bias, calls)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, **given: Any) -> Tensor:
        return causal_conv1d(F.pad(x, (8, 8))[..., 8:-8], weight, bias, **given)[0]

    return _made("causal_conv1d", conv.backend, f"{C} channels, {K} taps", calls, inputs, run)


def norm_case(norm: RMSNorm, calls: Calls) -> Case:
    """Of the residual stream, or of heads."""

    def inputs(draw: Draw) -> Tensors:
        return {"x": draw.normal(ROWS * calls.length, norm.width), "weight": draw.weight(norm.width, mean=1.0)}

    return _made("rms_norm", norm.backend, f"{norm.width} channels", calls, inputs, partial(rms_norm, eps=norm.epsilon))


def gated_norm_case(norm: GatedRMSNorm, calls: Calls) -> Case:
    """Of what the scan returned, gated by a view of wider rows."""
    width, group_size = norm.weight.shape[0], norm.group_size

    def inputs(draw: Draw) -> Tensors:
        x, z = (draw.normal(ROWS * calls.length, width) for _ in "xz")
        return {"x": x, "z": z, "weight": draw.weight(width, mean=1.0)}

    def run(z: Tensor, **given: Any) -> Tensor:
        return gated_rms_norm(z=F.pad(z, (0, 16))[..., :-16], group_size=group_size, eps=norm.epsilon, **given)

    return _made("gated_rms_norm", norm.backend, f"{width} channels by {group_size}", calls, inputs, run)


def attention_case(layer: Attention, calls: Calls) -> Case:
    """Heads lie side by side in a token, as the projection leaves them."""
    H, K, P = layer.heads, layer.groups, layer.head_dim
    calls = calls.of_attention()

    def inputs(draw: Draw) -> Tensors:
        q, k, v = (draw.normal(ROWS, calls.length, heads, P) for heads in (H, K, K))
        return _with_documents({"q": q, "k": k, "v": v}, calls)

    def run(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None, **given: Any) -> Tensor:
        documents = None if document_ids is None else Documents(document_ids)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v, documents=documents, softcap=layer.softcap, **given)

    cap = "" if layer.softcap is None else f", scores capped at {layer.softcap:g}"
    sizes = f"{H} heads of {P}, {K} of keys{cap}, rows of {calls.length}"
    return _made("attention", layer.backend, sizes, calls, inputs, run)


def ring_case(layer: Attention, calls: Calls) -> Case:
    """Of parts as a ring joins them: own keys and those of another rank, with documents that cross the border."""
    H, K, P = layer.heads, layer.groups, layer.head_dim
    calls = replace(calls, length=calls.length // 2 * 2)

    def inputs(draw: Draw) -> Tensors:
        q, k, v = (draw.normal(ROWS, heads, calls.length, P) for heads in (H, K, K))
        return _with_documents({"q": q, "k": k, "v": v}, calls)

    def run(document_ids: Tensor | None = None, **given: Any) -> Tensor:
        return attention_in_halves(segments=document_ids, softcap=layer.softcap, **given)

    cap = "" if layer.softcap is None else f", scores capped at {layer.softcap:g}"
    sizes = f"{H} heads of {P}, {K} of keys{cap}, rows of {calls.length} in halves"
    return _made("ring_attention", layer.ring_backend, sizes, calls, inputs, run)


def activation_case(width: int, backend: str, calls: Calls) -> Case:
    """Squared ReLU between the products of a feed-forward layer."""

    def inputs(draw: Draw) -> Tensors:
        return {"h": draw.normal(ROWS * calls.length, width)}

    return _made("squared_relu", backend, f"{width} channels", calls, inputs, squared_relu)


def experts_case(layer: MoE, calls: Calls) -> Case:
    """A few of the experts, one of them without tokens, at their own width."""
    experts, K = layer.experts, layer.router.top_k
    (held, up_width, D), F_ = experts.up.shape, experts.down.shape[2]
    E, T = min(held, max(MOST_EXPERTS, K + 1)), ROWS * calls.length

    def inputs(draw: Draw) -> Tensors:
        scores = torch.rand(T, E, generator=draw.generator)
        scores[:, E // 2] *= float(K >= E)
        weights, ids = scores.topk(min(K, E))
        up, down = draw.weight(E, up_width, D, scale=D**-0.5), draw.weight(E, D, F_, scale=F_**-0.5)
        return {"x": draw.normal(T, D), "expert_ids": ids, "expert_weights": weights, "up": up, "down": down}

    run = partial(expert_mlp, activation=computed_by(experts.activation, experts.activation_backend))
    sizes = f"{E} experts of {F_}, {D} channels, {K} a token"
    case = _made("expert_mlp", experts.backend, sizes, calls, inputs, run)
    plain = computed_by(experts.activation, "torch")
    return replace(case, twin=partial(expert_mlp, activation=plain, backend="torch"))


def loss_case(matrix: VocabularyMatrix, calls: Calls) -> Case:
    """The output projection and its loss, as of a rank that has all columns. The twin makes all logits."""
    held, D = matrix.weight.shape
    padding, W = held - matrix.columns, min(held, max(MOST_WEIGHTS // D, held - matrix.columns + 1))
    T = ROWS * calls.length

    def inputs(draw: Draw) -> Tensors:
        labels = torch.randint(W - padding, (T,), generator=draw.generator)
        return {"x": draw.normal(T, D), "weight": draw.weight(W, D, scale=D**-0.5), "labels": labels}

    run = partial(linear_cross_entropy, columns=W - padding)
    case = _made("cross_entropy", matrix.backend, f"{D} channels, {W} rows, {padding} padding", calls, inputs, run)
    return replace(case, twin=partial(run, backend="plain"))
