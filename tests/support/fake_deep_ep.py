"""DeepEP's `Buffer` on any backend of torch.distributed: signatures and results of github.com/deepseek-ai/DeepEP 1.2.1.

Everyone is told everything and keeps its own, which no exchange of ours does. What the real one leaves to the caller is
checked: which arguments come together, types, one wait for each event, results that are not looked at before. fp32 is
taken as well. `calls` is the list of what this process asked for.
"""

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64
calls: list[str] = []


class Config:
    """How much memory a transfer needs."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class EventOverlap:
    """Fills the results at the moment they are waited for."""

    def __init__(self, name: str, results: list[tuple[Tensor, Tensor]]) -> None:
        self.name, self.results = name, results
        for shown, _ in results:
            shown.fill_(-7 if shown.dtype == torch.int64 else torch.nan)

    def current_stream_wait(self) -> None:
        assert self.results is not None, "waited for twice"
        calls.append(f"{self.name} waited for")
        for shown, true in self.results:
            shown.copy_(true)
        self.results = None


class Buffer:
    num_sms: int = 20

    def __init__(self, group, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, low_latency_mode: bool = False) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.rank, self.group_size = group.rank(), group.size()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Buffer.get_dispatch_config(num_ranks)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ):
        _check(topk_idx, topk_idx_t)
        ranks = topk_idx // (num_experts // self.group_size)
        is_token_in_rank = torch.zeros(len(topk_idx), self.group_size, dtype=torch.bool).scatter_(1, ranks, True)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return is_token_in_rank.sum(0).int(), None, per_expert, is_token_in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ):
        _check(x, torch.bfloat16, torch.float32)
        assert async_finish, "nothing would overlap"
        assert self.num_nvl_bytes >= x.shape[1] * x.itemsize * self.group_size, "the buffer is too small"
        if handle is not None:
            assert topk_idx is topk_weights is None, "a cached layout brings no choices"
            calls.append("dispatch with a handle")
            rows = self._to_ranks(x, handle[0])
            shown = torch.empty_like(rows)
            return shown, None, None, None, None, EventOverlap("dispatch", [(shown, rows)])
        layout = num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert
        assert all(part is not None for part in layout)
        _check(topk_idx, topk_idx_t)
        _check(topk_weights, torch.float32)
        calls.append("dispatch")
        local = len(num_tokens_per_expert) // self.group_size
        rows, ids, weights = (self._to_ranks(part, is_token_in_rank) for part in (x, topk_idx, topk_weights))
        elsewhere = ids // local != self.rank
        ids = (ids % local).masked_fill(elsewhere, -1)
        weights = weights.masked_fill(elsewhere, 0)
        loads = [int((ids == expert).sum()) for expert in range(local)]
        shown = [torch.empty_like(part) for part in (rows, ids, weights)]
        event = EventOverlap("dispatch", list(zip(shown, (rows, ids, weights), strict=True)))
        return *shown, loads, (is_token_in_rank, self._everyone(is_token_in_rank)), event

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ):
        _check(x, torch.bfloat16, torch.float32)
        assert async_finish, "nothing would overlap"
        calls.append("combine" if topk_weights is None else "combine with weights")
        given = [x] if topk_weights is None else [x, topk_weights]
        _check(given[-1], torch.bfloat16, torch.float32)
        results = [self._to_tokens(part, handle) for part in given]
        shown = [torch.empty_like(part) for part in results]
        event = EventOverlap("combine", list(zip(shown, results, strict=True)))
        return shown[0], shown[1] if len(shown) > 1 else None, event

    def _everyone(self, part: Tensor) -> list[Tensor]:
        """The part of each rank, of any length."""
        found: list[Tensor] = [part] * self.group_size
        dist.all_gather_object(found, part, group=self.group)
        return found

    def _to_ranks(self, part: Tensor, is_token_in_rank: Tensor) -> Tensor:
        """From every rank, in order, what has to come here."""
        parts = zip(self._everyone(part), self._everyone(is_token_in_rank), strict=True)
        return torch.cat([rows[goes[:, self.rank]] for rows, goes in parts])

    def _to_tokens(self, part: Tensor, handle: tuple) -> Tensor:
        """The sum of what all ranks have of each own token, rounded once."""
        own, everyones = handle
        total = torch.zeros(len(own), part.shape[1], dtype=torch.float32)
        for rank, rows in enumerate(self._everyone(part)):
            before = sum(int(goes[:, rank].sum()) for goes in everyones[: self.rank])
            mine = rows[before : before + int(own[:, rank].sum())]
            total[own[:, rank]] += mine.float()
        return total.to(part.dtype)


def _check(tensor: Tensor, *dtypes: torch.dtype) -> None:
    assert tensor.dtype in dtypes, tensor.dtype
    assert tensor.is_contiguous()
