"""Which tensor of a NemotronH folder is made of which of our logical tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.symbols import parse_pattern

Shapes = Mapping[str, tuple[int, ...]]

MIXERS = {
    "M": {
        "in_proj.weight": ("in_proj.z", "in_proj.x", "in_proj.B", "in_proj.C", "in_proj.dt"),
        "conv1d.weight": ("conv.x", "conv.B", "conv.C"),
        "conv1d.bias": ("conv.x.bias", "conv.B.bias", "conv.C.bias"),
        "dt_bias": ("dt_bias",),
        "A_log": ("A_log",),
        "D": ("D",),
        "norm.weight": ("norm.weight",),
        "out_proj.weight": ("out_proj.weight",),
    },
    "*": {
        "q_proj.weight": ("qkv.q",),
        "k_proj.weight": ("qkv.k",),
        "v_proj.weight": ("qkv.v",),
        "o_proj.weight": ("out_proj.weight",),
    },
    "-": {"up_proj.weight": ("fc1.weight",), "down_proj.weight": ("fc2.weight",)},
    "E": {
        "gate.weight": ("router.gate.weight",),
        "gate.e_score_correction_bias": ("router.expert_bias",),
        "fc1_latent_proj.weight": ("latent_down.weight",),
        "fc2_latent_proj.weight": ("latent_up.weight",),
        "shared_experts.up_proj.weight": ("shared_expert.fc1.weight",),
        "shared_experts.down_proj.weight": ("shared_expert.fc2.weight",),
    },
}
"""Symbol -> disk name under `mixer.` -> logical tensors under `mixer.` that are stacked in it, in order."""

STAYS_FP32 = ("dt_bias", "A_log", ".D", "gate.weight", "e_score_correction_bias")
"""Ends of names of what is stored in fp32 whatever the rest is: time steps, decays, skips and routers are fp32 with us."""


@dataclass(frozen=True)
class DiskTensor:
    """A tensor of a folder.

    parts: the logical tensors that are stacked in it along rows; none: it is zero, and our model does without it.
    expert: it is this entry of its one part.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    expert: int | None = None

    @property
    def stays_fp32(self) -> bool:
        """Whether its values must not be rounded."""
        return self.name.endswith(STAYS_FP32)

    def gather(self, value: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from the logical ones that `value` returns: a view where it can be one."""
        if not self.parts:
            return torch.zeros(self.shape)
        stacked = [value(part) for part in self.parts]
        joined = stacked[0] if len(stacked) == 1 else torch.cat(stacked)
        chosen = joined if self.expert is None else joined[self.expert]
        return chosen[: self.shape[0]].reshape(self.shape)  # without rows that only pad the vocabulary

    def scatter(self, tensor: Tensor, values: Mapping[str, Tensor]) -> None:
        """Copy the tensor into the logical ones. The rows that pad the vocabulary become zero."""
        if self.expert is not None:
            values[self.parts[0]][self.expert].copy_(tensor)
            return
        start = 0
        for part in self.parts:
            target = values[part]
            rows = tensor[start : start + len(target)]
            target[: len(rows)].copy_(rows.reshape(len(rows), *target.shape[1:]))
            target[len(rows) :].zero_()
            start += len(rows)


def disk_tensors(model: HybridModel) -> dict[str, DiskTensor]:
    """Disk name -> tensor, for every tensor of a model of ours, which may be on the meta device; layer by layer."""
    tensors = logical_parameters(model) | dict(model.named_buffers())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {tensor.name: tensor for tensor in _all(model, shapes)}


def _all(model: HybridModel, shapes: Shapes) -> Iterator[DiskTensor]:
    config, pattern = model.config, parse_pattern(model.config.pattern)
    vocabulary = (config.vocab_size or 0, config.hidden_size)
    yield DiskTensor("backbone.embeddings.weight", vocabulary, ("embedding.weight",))
    for number, symbol in enumerate(pattern.main):
        yield from _layer(f"backbone.layers.{number}.", f"layers.{number}.", symbol, shapes)
    yield _same("backbone.norm_f.weight", "final_norm.weight", shapes)
    # transformers ignores `tie_word_embeddings`, so that a tied model needs the matrix twice
    yield DiskTensor("lm_head.weight", vocabulary, ("embedding.weight" if config.tie_embeddings else "output.weight",))
    for depth in range(len(model.mtp)):
        yield from _mtp_block(depth, pattern.mtp, shapes)


def _mtp_block(depth: int, symbols: str, shapes: Shapes) -> Iterator[DiskTensor]:
    """Layers are numbered through all blocks; the first of a block holds its entry, the last its final norm."""
    first, last = depth * len(symbols), (depth + 1) * len(symbols) - 1
    for name in ("enorm", "hnorm", "eh_proj"):
        yield _same(f"mtp.layers.{first}.{name}.weight", f"mtp.{depth}.{name}.weight", shapes)
    for inner, symbol in enumerate(symbols):
        yield from _layer(f"mtp.layers.{first + inner}.", f"mtp.{depth}.layers.{inner}.", symbol, shapes)
    yield _same(f"mtp.layers.{last}.final_layernorm.weight", f"mtp.{depth}.final_norm.weight", shapes)


def _layer(disk: str, ours: str, symbol: str, shapes: Shapes) -> Iterator[DiskTensor]:
    yield _same(disk + "norm.weight", ours + "norm.weight", shapes)
    for name, short in MIXERS[symbol].items():
        parts = tuple(f"{ours}mixer.{part}" for part in short)
        if parts[0] in shapes:  # no conv bias, no latent projection, ...
            yield DiskTensor(f"{disk}mixer.{name}", _stacked(name, [shapes[part] for part in parts]), parts)
    if symbol == "E":
        yield from _experts(disk + "mixer.", ours + "mixer.", shapes)


def _experts(disk: str, ours: str, shapes: Shapes) -> Iterator[DiskTensor]:
    """One tensor an expert on disk, all experts stacked in memory.

    Every layer there has a balancing bias and a shared expert: what we do without is written as zeros, the expert with
    a width of 1, because transformers takes 0 for the width of an MLP.
    """
    experts, hidden = shapes[ours + "router.gate.weight"]
    if ours + "router.expert_bias" not in shapes:
        yield DiskTensor(disk + "gate.e_score_correction_bias", (experts,), ())
    if ours + "shared_expert.fc1.weight" not in shapes:
        yield DiskTensor(disk + "shared_experts.up_proj.weight", (1, hidden), ())
        yield DiskTensor(disk + "shared_experts.down_proj.weight", (hidden, 1), ())
    for theirs, part in (("up_proj", ours + "experts.up"), ("down_proj", ours + "experts.down")):
        for number in range(experts):
            yield DiskTensor(f"{disk}experts.{number}.{theirs}.weight", shapes[part][1:], (part,), number)


def _same(disk: str, ours: str, shapes: Shapes) -> DiskTensor:
    return DiskTensor(disk, shapes[ours], (ours,))


def _stacked(name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The parts one below the other; the convolution has one input channel, [channels, 1, taps]."""
    one_channel = (1,) if name == "conv1d.weight" else ()
    return (sum(shape[0] for shape in shapes), *one_channel, *shapes[0][1:])
