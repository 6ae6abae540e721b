"""What layers know about the rows they are given, and what they remember while generating."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nemohybrid.errors import ConfigError, DataError
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.borders import Borders, borders, whole_rows
from nemohybrid.parallel.tensor import TensorRanks
from nemohybrid_kernels.attention import Documents


@dataclass
class DecodeCache:
    """State carried from one call to the next while generating: one entry a mixer, of whatever that mixer needs.

    While `rewindable`, the tokens of the last call can be taken back. An entry then needs a method `rewind(tokens)`, after
    which it is what it would be had it never seen the last `tokens` of every row. It is called for no more of them than the
    last call fed, perhaps in portions; what that takes need not be kept while `rewindable` is off.
    """

    length: int = 0
    document_ids: Tensor | None = None  # [B, length] of all tokens so far; None: one document a row
    states: dict[nn.Module, Any] = field(default_factory=dict)
    rewindable: bool = False

    def check_rewindable(self) -> None:
        """Raises ConfigError when a mixer keeps something here that has no `rewind`, naming it."""
        for module, state in self.states.items():
            if not hasattr(state, "rewind"):
                raise ConfigError(
                    f"a draft cannot be taken back from {type(module).__name__}: what it keeps while generating, "
                    f"a {type(state).__name__}, has no `rewind`. Legal: generate without speculative decoding"
                )

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` of every row: 0 to what the last call fed while `rewindable`. Raises ConfigError."""
        self.check_rewindable()
        assert 0 <= tokens <= self.length
        if tokens == 0:
            return
        self.length -= tokens
        if self.length == 0:
            self.document_ids, self.states = None, {}
        if self.document_ids is not None:
            self.document_ids = self.document_ids[:, : self.length]
        for state in self.states.values():
            state.rewind(tokens)


def _one_rank() -> TensorRanks:
    """A function with everything named: torch.compile cannot look into defaults of a class of ours."""
    return TensorRanks(Group(), cut=False)


def _alone() -> Group:
    """As above."""
    return Group(1, 0, None)


@dataclass
class SequenceContext:
    """The shape and borders of one microbatch, built once and shared by all layers.

    Layers see the residual stream as [tokens, hidden], tokens = batch * length. `document_ids` [batch, length] marks the
    documents of packed rows: wherever the id changes, Mamba state, convolution and attention start anew. None means one
    document a row. With a `cache`, the rows continue what the cache has seen. `ranks`, which the model sets, says how the
    tokens lie on the ranks that share its matrices: `enter` and `leave` are the way into and out of what they share.

    Ranks of `context` share the rows: each has `length` of their tokens, in the order of ranks, and `document_ids` of these.
    """

    batch: int
    length: int
    document_ids: Tensor | None = None
    cache: DecodeCache | None = None
    share: float | None = None
    ranks: TensorRanks = field(default_factory=_one_rank)
    context: Group = field(default_factory=_alone)
    _borders: Borders | None = field(default=None, repr=False)
    _masks: dict[torch.device, Tensor | None] = field(default_factory=dict, repr=False)
    _documents: dict[torch.device, Documents] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Raises DataError when the document ids are not [batch, length]."""
        if self.document_ids is not None and tuple(self.document_ids.shape) != (self.batch, self.length):
            shape = list(self.document_ids.shape)
            raise DataError(f"document_ids are {shape}, but the rows are [{self.batch}, {self.length}]")

    @property
    def tokens(self) -> int:
        """Rows of the residual stream."""
        return self.batch * self.length

    def enter(self, x: Tensor) -> Tensor:
        """This rank's tokens of the stream -> all tokens [tokens, ...], for matrices of which it holds a part."""
        return self.ranks.enter(x)

    def leave(self, x: Tensor) -> Tensor:
        """What such matrices gave for all tokens, a summand [tokens, ...] -> the sum, this rank's tokens of the stream."""
        return self.ranks.leave(x)

    def uncut(self) -> "SequenceContext":
        """The same for a mixer that is given all tokens on every rank."""
        return replace(self, ranks=replace(self.ranks, cut=False)) if self.ranks.cut else self

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have other tokens of the same rows."""
        return self.context.size > 1

    @property
    def borders(self) -> Borders | None:
        """Where documents of rows that ranks share begin; None: every row is one. Collective at its first use."""
        if self.document_ids is not None and self._borders is None:
            self._borders = borders(self.document_ids, self.context)
        return self._borders

    @property
    def segments(self) -> Tensor | None:
        """[batch, length] the number of each token's document in the whole of a row that ranks share; None: one a row."""
        return self.borders.segments if self.is_shared and self.borders is not None else None

    def goes_on_from_left(self) -> Tensor | float:
        """Whether the first token goes on with the document of the last one on the rank to the left: [batch], or in all rows."""
        return float(self.context.rank > 0) if self.borders is None else self.borders.goes_on.float()

    @property
    def past(self) -> int:
        """Tokens of each row that came before, in the cache."""
        return self.cache.length if self.cache else 0

    @classmethod
    def packed(cls, lengths: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "SequenceContext":
        """Rows of documents with the given lengths: `packed([[5, 3], [8]])` is two rows of eight tokens.

        Raises DataError when the rows are not equally long or a document is empty.
        """
        sums = [sum(row) for row in lengths]
        if len(set(sums)) != 1:
            raise DataError(f"packed rows must be equally long; these hold {sums} tokens")
        if any(not row or min(row) <= 0 for row in lengths):
            raise DataError(
                f"a packed document needs at least one token; the lengths are {[list(row) for row in lengths]}"
            )
        ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
        return cls(len(lengths), sums[0], torch.stack(ids).to(device, torch.int32))

    def all_document_ids(self) -> Tensor | None:
        """[batch, past + length]: the documents of everything attention can look back on; None when there is one a row.

        Where only the past or only these tokens have ids, the first of these tokens goes on with the document before it.
        """
        ids, past_ids = self.document_ids, self.cache.document_ids if self.cache else None
        if self.past == 0:
            return ids
        if ids is None and past_ids is not None:
            ids = past_ids[:, -1:].expand(-1, self.length)
        if past_ids is None and ids is not None:
            past_ids = ids[:, :1].expand(-1, self.past)
        return None if ids is None or past_ids is None else torch.cat([past_ids, ids], dim=1)

    def goes_on(self) -> Tensor | None:
        """[batch] True where the first token belongs to the document of the last cached one; None: in every row."""
        past_ids = self.cache.document_ids if self.cache else None
        if past_ids is None or self.document_ids is None:
            return None
        return past_ids[:, -1] == self.document_ids[:, 0]

    def documents(self, device: torch.device) -> Documents | None:
        """The documents of these tokens, as attention without a cache wants to know them; None: one a row.

        Where ranks share the rows, those of whole rows. Collective at its first use.
        """
        if self.document_ids is None:
            return None
        if device in self._documents:
            return self._documents[device]
        ids = self.document_ids if self.segments is None else whole_rows(self.segments, self.context)
        documents = Documents(ids.to(device))
        if not torch.compiler.is_compiling():  # as in `lazy`
            self._documents[device] = documents
        return documents

    def attention_mask(self, device: torch.device) -> Tensor | None:
        """[batch or 1, 1, length, past + length], True where a token may look; None: plainly causal without a past."""
        if device not in self._masks:
            self._masks[device] = self._build_mask(device)
        return self._masks[device]

    def _build_mask(self, device: torch.device) -> Tensor | None:
        ids = self.all_document_ids()
        if ids is None and self.past == 0:
            return None
        total = self.past + self.length
        causal = torch.ones(self.length, total, dtype=torch.bool, device=device).tril_(self.past)[None, None]
        if ids is None:
            return causal
        segments = segment_numbers(ids).to(device)
        same = segments[:, self.past :, None] == segments[:, None, :]
        return causal & same[:, None]

    def numbers(self, own: int, device: torch.device) -> Tensor:
        """[own] the numbers of this rank's tokens of the stream among those of all ranks that share them."""
        first = self.ranks.group.rank * own if self.ranks.cut else 0
        index = torch.arange(first, first + own, device=device)
        if not self.is_shared:
            return index
        return index + (index // self.length * (self.context.size - 1) + self.context.rank) * self.length

    def positions(self, device: torch.device) -> Tensor:
        """[batch, length] position of each token in its document."""
        if self.is_shared:
            return self._positions_in_shared_rows(device)
        index = torch.arange(self.past + self.length, device=device).expand(self.batch, -1)
        ids = self.all_document_ids()
        if ids is not None:
            starts = _starts(ids).to(device)
            index = index - torch.where(starts, index, 0).cummax(dim=1).values
        return index[:, self.past :]

    def _positions_in_shared_rows(self, device: torch.device) -> Tensor:
        first = self.context.rank * self.length
        index = torch.arange(first, first + self.length, device=device).expand(self.batch, -1)
        return index if self.borders is None else index - self.borders.begins

    def advance(self) -> None:
        """Tell the cache that these tokens are now its past. Called once, after the last layer."""
        if self.cache is not None:
            self.cache.document_ids = self.all_document_ids()
            self.cache.length += self.length


def _starts(ids: Tensor) -> Tensor:
    """[B, L] True at the first token of each document."""
    first = torch.ones_like(ids[:, :1], dtype=torch.bool)
    return torch.cat([first, ids[:, 1:] != ids[:, :-1]], dim=1)


def segment_numbers(ids: Tensor) -> Tensor:
    """Document ids -> 1, 2, 3, ... along each row, so that an id that comes back later is still another document."""
    return _starts(ids).cumsum(dim=1)
