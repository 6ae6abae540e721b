"""The decode loop: one pass over the prompts, then one token at a time from recurrent state and KV cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemohybrid.data.tokenizer import Tokenizer
from nemohybrid.errors import DataError
from nemohybrid.generate.sampling import Sampling
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.sequence import DecodeCache, SequenceContext
from nemohybrid.parallel.collectives import from_first

# B batch, L length, D hidden, V vocabulary


class Decoder:
    """A batch of rows that grow together. Mamba layers keep a state of fixed size, attention layers keys and values.

    Prompts of different lengths are padded on the left; the padding is a document of its own, so that no layer carries
    anything from it into the prompt.
    """

    def __init__(self, model: HybridModel) -> None:
        self.model = model
        self.cache = DecodeCache()
        self.device = model.embedding.weight.device

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """tokens [B, L] that follow what was fed before -> hidden states [B, L, D].

        Without `document_ids` every row goes on with its last document.
        """
        seq = SequenceContext(*tokens.shape, document_ids=document_ids, cache=self.cache)
        return self.model.hidden_states(tokens, seq).view(*tokens.shape, -1)

    @torch.no_grad()
    def feed(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """tokens [B, L] as above -> logits [B, V] of what comes next."""
        return self.model.output.logits(self.hidden_states(tokens, document_ids)[:, -1])

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Feed all prompts at once -> logits [B, V]."""
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        ids = None
        if any(len(prompt) < longest for prompt in prompts):
            marks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            ids = torch.tensor(marks, dtype=torch.int32, device=self.device)
        return self.feed(torch.tensor(rows, device=self.device), ids)


def stream_tokens(
    model: HybridModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, `max_new_tokens` times. Raises DataError for an empty prompt."""
    check_prompts(prompts)
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model)
    logits = decoder.prefill(prompts)
    for count in range(1, max_new_tokens + 1):
        chosen = from_first(sampling.choose(logits, generator), model.context)  # ranks must end at the same token
        yield chosen.tolist()
        if count < max_new_tokens:
            logits = decoder.feed(chosen[:, None])


def generate_tokens(
    model: HybridModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eod: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """New tokens of every prompt. A row ends before `eod`; the loop ends when all rows have."""
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for tokens in stream_tokens(model, prompts, max_new_tokens, sampling, seed):
        for i, token in enumerate(tokens):
            ended[i] = ended[i] or token == eod
            if not ended[i]:
                rows[i].append(token)
        if all(ended):
            break
    return rows


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raises DataError when there is no prompt, or an empty one."""
    if not prompts or not all(prompts):
        raise DataError("every prompt needs at least one token")


def generate_text(
    model: HybridModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> list[str]:
    """Each prompt with its continuation. An empty prompt begins a new document."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rows = generate_tokens(model, encoded, max_new_tokens, sampling, tokenizer.eod, seed)
    return [prompt + tokenizer.decode_continuation(row) for prompt, row in zip(prompts, rows, strict=True)]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one is the end of a document that is not there. Raises DataError for half characters."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not UTF-8 at character {error.start}: {prompt!r}") from None
    return tokenizer.encode(prompt) or [tokenizer.eod]
