"""The exchange by DeepEP (github.com/deepseek-ai/DeepEP): a token is sent once to each rank that has experts for it."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nemohybrid.errors import ConfigError
from nemohybrid.parallel.expert.all_to_all import AllToAll
from nemohybrid.parallel.expert.exchange import Pending, Trip
from nemohybrid.parallel.expert.placement import Compute, Dispatcher, Meanwhile, Placement
from nemohybrid.parallel.expert.routes import alone, travel
from nemohybrid_kernels.moe.visits import sort_by_expert

# T own tokens, D hidden, K experts a token visits, N tokens that came to this rank, n visits of these to its experts

INSTALL = "Install it from github.com/deepseek-ai/DeepEP, or use all_to_all"
ON_A_NODE = 8
"""Ranks that DeepEP reaches by NVLink (NUM_MAX_NVL_PEERS of its csrc/kernels/configs.cuh); to more it goes by RDMA."""


class DeepEP(Dispatcher):
    """Dispatch and combine of DeepEP 1.x: bf16 on GPUs, one rank to an expert, any numbers of tokens above 0.

    The experts get the visits of what came, sorted by expert: rows [n, D]. The host waits once a layer, as DeepEP tells
    it how many tokens come; and once more where the layer is computed again. Raises ConfigError where it cannot do it.
    """

    def __init__(self, placement: Placement) -> None:
        if placement.tensor > 1:
            raise ConfigError(
                f"deepep cannot share an expert by {placement.tensor} tensor ranks. Legal: 1, or all_to_all"
            )
        self.placement = placement
        load()  # better refused now than in the first step

    def obstacle(self, x: Tensor) -> str | None:
        """Why it cannot send these tokens, or None. The widths are those its kernels assert."""
        multiple = 16 if self.placement.block.size <= ON_A_NODE else 256
        if x.device.type != "cuda":
            return f"deepep needs tokens on a GPU, these are on {x.device.type}"
        if x.dtype != torch.bfloat16:
            return f"deepep sends bfloat16, these tokens are {str(x.dtype).removeprefix('torch.')}"
        return f"deepep sends multiples of {multiple} channels, not {x.shape[1]}" if x.shape[1] % multiple else None

    def run(
        self, x: Tensor, ids: Tensor, weights: Tensor, compute: Compute, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """As `Dispatcher.run`. On the meta device as AllToAll: the experts get the same rows."""
        if self.placement.block.size == 1:
            return alone(x, ids, weights, compute, meanwhile)
        if x.is_meta:
            return AllToAll(self.placement).run(x, ids, weights, compute, meanwhile)
        if obstacle := self.obstacle(x):
            raise ConfigError(f"{obstacle}. Legal: all_to_all")
        library, hidden_bytes = load(), x.shape[1] * max(x.itemsize, 2)
        ids = ids.to(getattr(library, "topk_idx_t", torch.int64)).contiguous()
        crossing = _Crossing(_buffer(library, self.placement.block.handle, hidden_bytes), ids, self.placement)
        return travel(crossing, x, weights, crossing.ids, compute, meanwhile)


class Fastest(Dispatcher):
    """DeepEP for tokens that it can send, another for others. Ranks agree, since their tokens are of one kind."""

    def __init__(self, deepep: DeepEP, otherwise: Dispatcher) -> None:
        self.deepep, self.otherwise, self.absent = deepep, otherwise, otherwise.absent

    @property
    def overflow(self) -> Tensor | None:
        """That of the other."""
        return self.otherwise.overflow

    def reset(self) -> None:
        """Of the other."""
        self.otherwise.reset()

    def grow(self) -> None:
        """Of the other."""
        self.otherwise.grow()

    def run(
        self, x: Tensor, ids: Tensor, weights: Tensor, compute: Compute, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """As `Dispatcher.run`."""
        chosen = self.otherwise if self.deepep.obstacle(x) else self.deepep
        return chosen.run(x, ids, weights, compute, meanwhile)


def load() -> ModuleType:
    """DeepEP 1, or 2 with what it calls legacy. Raises ConfigError where it is not there, or does not fit torch."""
    try:
        library = import_module("deep_ep")
    except (ImportError, AssertionError, RuntimeError) as error:  # it checks NCCL and its compiler when imported
        raise ConfigError(f"deepep cannot be loaded: {error}. {INSTALL}") from error
    if getattr(library, "Buffer", None) is None:
        raise ConfigError(f"deepep: this build has no deep_ep.Buffer. {INSTALL}")
    return library


def loadable() -> bool:
    """Whether `load` succeeds."""
    try:
        load()
    except ConfigError:
        return False
    return True


@cache
def _buffer(library: Any, handle: Any, hidden_bytes: int) -> Any:
    """What all layers of this width send through; sized as DeepEP's README does. Collective."""
    ranks, maker = handle.size(), library.Buffer
    try:
        configs = maker.get_dispatch_config(ranks), maker.get_combine_config(ranks)
    except AssertionError as error:
        raise ConfigError(f"deepep: {error}. Legal: 2, 4, 8, 16, 32, 64, 128, or all_to_all") from error
    nvlink = max(config.get_nvl_buffer_size_hint(hidden_bytes, ranks) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(hidden_bytes, ranks) for config in configs)
    return maker(handle, nvlink, rdma)


class _Crossing:
    """One dispatch and its combine, and their gradients: those of a dispatch are combined, and the other way round."""

    def __init__(self, buffer: Any, ids: Tensor, placement: Placement) -> None:
        self.buffer, self.chosen, self.placement = buffer, ids, placement
        self.handle: Any = None
        self.arrived: _Arrived | None = None

    def outward(self) -> Trip:
        """Tokens x [T, D] and weights [T, K] -> their visits to experts of this rank, [n, D] and [n, 1]."""
        return Trip(self._dispatch, self._combine_gradients)

    def homeward(self) -> Trip:
        """What came of the visits, [n, D] -> for each token the sum, [T, D]."""
        return Trip(self._combine, self._dispatch_gradients)

    def ids(self) -> Tensor:
        """The expert of each visit that came, [n, 1]."""
        return self._here.experts

    @property
    def _here(self) -> "_Arrived":
        assert self.arrived is not None, "nothing came yet"
        return self.arrived

    def _dispatch(self, x: Tensor, weights: Tensor) -> Pending:
        to_rank, to_node, to_expert, is_sent, _ = self.buffer.get_dispatch_layout(self.chosen, self.placement.experts)
        rows, ids, of_rows, loads, self.handle, event = self.buffer.dispatch(
            x.contiguous(),
            topk_idx=self.chosen,
            topk_weights=weights.contiguous(),
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            num_tokens_per_expert=to_expert,
            is_token_in_rank=is_sent,
            async_finish=True,
        )

        def wait() -> tuple[Tensor, Tensor]:
            event.current_stream_wait()
            here = self.arrived = _Arrived(ids.long(), sum(loads), self.placement.local)
            return rows.index_select(0, here.tokens), of_rows.reshape(-1, 1).index_select(0, here.visits)

        return wait

    def _combine_gradients(self, d_rows: Tensor, d_weights: Tensor) -> Pending:
        of_rows = self._here.per_choice(d_weights)
        d_x, d_of_tokens, event = self.buffer.combine(
            self._here.by_token(d_rows), self.handle, topk_weights=of_rows, async_finish=True
        )
        return _after(event, d_x, d_of_tokens)

    def _combine(self, out: Tensor) -> Pending:
        combined, _, event = self.buffer.combine(self._here.by_token(out), self.handle, async_finish=True)
        return _after(event, combined)

    def _dispatch_gradients(self, d_out: Tensor) -> Pending:
        rows, *_, event = self.buffer.dispatch(d_out.contiguous(), handle=self.handle, async_finish=True)
        wait = _after(event, rows)
        return lambda: (wait()[0].index_select(0, self._here.tokens),)


class _Arrived:
    """Of N tokens that came, the `count` visits to experts of this rank, sorted by expert; ids [N, K], -1 elsewhere."""

    def __init__(self, ids: Tensor, count: int, experts: int) -> None:
        ids = ids.masked_fill(ids < 0, experts)
        sorted_visits = sort_by_expert(ids, experts, absent=True)
        self.visits = sorted_visits.order[:count]  # [n] those to nobody stand behind
        self.tokens = self.visits // ids.shape[1]  # [n]
        self.experts = ids.flatten().index_select(0, self.visits)[:, None]  # [n, 1]
        self.nobody = ids == experts  # [N, K]
        self.place = sorted_visits.place.view_as(ids).clamp(max=max(count - 1, 0))  # [N, K] the row of each visit

    def by_token(self, rows: Tensor) -> Tensor:
        """rows [n, D] -> [N, D], the sum over a token's visits: choice by choice, since most are to other ranks."""
        total = torch.zeros(len(self.place), rows.shape[1], dtype=torch.float32, device=rows.device)
        for place, nobody in zip(self.place.unbind(1), self.nobody.unbind(1), strict=True):
            total += rows.index_select(0, place).masked_fill_(nobody[:, None], 0)
        return total.to(rows.dtype)

    def per_choice(self, of_visits: Tensor) -> Tensor:
        """[n, 1] -> [N, K] fp32, zero for visits to other ranks."""
        chosen = of_visits.float().index_select(0, self.place.flatten()).view_as(self.place)
        return chosen.masked_fill_(self.nobody, 0)


def _after(event: Any, *tensors: Tensor) -> Pending:
    def wait() -> tuple[Tensor, ...]:
        event.current_stream_wait()
        return tensors

    return wait
