"""Speculative decoding (Leviathan et al. 2023): the MTP blocks draft, the model judges all drafts in one pass."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemohybrid.data.tokenizer import Tokenizer
from nemohybrid.errors import ConfigError
from nemohybrid.generate.draft import Drafter
from nemohybrid.generate.engine import Decoder, check_prompts, encode_prompt
from nemohybrid.generate.sampling import Sampling
from nemohybrid.model.hybrid import HybridModel

# L length, D hidden, V vocabulary


@dataclass
class Acceptance:
    """What became of the drafts: counts for the first draft of a step, the second, ..., summed over prompts.

    A draft after a rejected one is rejected. A draft beyond the end of the document counts nowhere.
    """

    steps: int = 0  # passes of the model over drafts
    tokens: int = 0  # that came of them: accepted drafts, and the model's own token after them
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Mean over the steps; plain decoding has 1. NaN without a step."""
        return self.tokens / self.steps if self.steps else math.nan

    def add(self, drafts: list[int], run: list[int], ended: bool) -> None:
        """One step: its drafts, and the tokens that came of them, which `ended` the document or did not."""
        self.steps += 1
        self.tokens += len(run)
        for depth, draft in enumerate(drafts[: len(run)] if ended else drafts):
            self.drafted[depth] += 1
            self.accepted[depth] += run[depth : depth + 1] == [draft]

    def __str__(self) -> str:
        """One line: `2.41 tokens a step; 41 of 58 drafts accepted, by depth 79.3 % 62.1 %`."""
        if not self.steps:
            return "no step had a draft"
        rates = " ".join(f"{100 * a / d:.1f} %" for a, d in zip(self.accepted, self.drafted, strict=True) if d)
        total = f"{sum(self.accepted)} of {sum(self.drafted)} drafts accepted"
        return f"{self.tokens_per_step:.2f} tokens a step; {total}, by depth {rates}"


class SpeculativeDecoder:
    """Decoding in steps of several tokens. The text is the model's own, whatever the drafts.

    Each token is chosen from the model's logits as in plain decoding, with the same random numbers, and a draft is
    accepted when it is that token. So greedy text is the plain greedy text, and sampled text the plain text of that seed,
    as far as a pass over several tokens rounds like one over a single token. `acceptance` sums up over all prompts.
    """

    def __init__(self, model: HybridModel, sampling: Sampling, drafts: int | None = None, seed: int = 0) -> None:
        """`drafts` in a step; None: as many as the pattern has MTP depths. Raises ConfigError for a model without MTP."""
        if not model.mtp_depth:
            raise ConfigError(
                f"the pattern {model.config.pattern} has no MTP part, such as /*E, to draft with. "
                "Legal: generate without speculative decoding"
            )
        if drafts is not None and drafts < 1:
            raise ConfigError(f"{drafts} drafts in a step of speculative decoding. Legal: 1 or more")
        self.model, self.sampling, self.drafts = model, sampling, drafts or model.mtp_depth
        self.generator = torch.Generator().manual_seed(seed)
        self.acceptance = Acceptance(drafted=[0] * self.drafts, accepted=[0] * self.drafts)

    def stream(self, prompt: Sequence[int], max_new_tokens: int, eod: int | None = None) -> Iterator[int]:
        """Yield what follows `prompt`: `max_new_tokens`, or those before `eod`.

        Raises DataError for an empty prompt, and ConfigError where a mixer cannot take drafts back.
        """
        check_prompts([prompt])
        text = _Text(self.model, self.drafts, self._choose, eod)
        run, left = text.begin(prompt), max_new_tokens
        while left > 0:
            ended = run[-1] == eod
            yield from run[:-1] if ended else run
            left -= len(run)
            if ended or left == 0:
                return
            drafts, run = text.step(min(self.drafts, left - 1))
            if drafts:
                self.acceptance.add(drafts, run, run[-1] == eod)

    def texts(self, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Each prompt with its continuation, one after the other. An empty prompt begins a new document."""
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        rows = [list(self.stream(prompt, max_new_tokens, tokenizer.eod)) for prompt in encoded]
        return [prompt + tokenizer.decode_continuation(row) for prompt, row in zip(prompts, rows, strict=True)]

    def _choose(self, logits_V: Tensor) -> int:
        return int(self.sampling.choose(logits_V.unsqueeze(0), self.generator))


class _Text:
    """One text in the making. What the model has read ends before the last of `tokens`."""

    def __init__(self, model: HybridModel, drafts: int, choose: Callable[[Tensor], int], eod: int | None) -> None:
        self.model, self.choose, self.eod = model, choose, eod
        self.decoder, self.drafter = Decoder(model), Drafter(model, drafts)
        self.tokens: list[int] = []
        self.hidden_LD = torch.empty(0)  # what the model said that the drafter has not seen

    @torch.no_grad()
    def begin(self, prompt: Sequence[int]) -> list[int]:
        """Read the prompt -> the one token after it. Raises ConfigError when a mixer cannot take tokens back."""
        self.hidden_LD = self._read(prompt)
        self.decoder.cache.check_rewindable()
        self.decoder.cache.rewindable = True
        run = self._agreed([], self.hidden_LD[-1:])
        self.tokens = [*prompt, *run]
        return run

    @torch.no_grad()
    def step(self, count: int) -> tuple[list[int], list[int]]:
        """`count` drafts, and the tokens that come of them: 1 to `count` + 1, the last of which may be `eod`."""
        drafts = self.drafter.draft(self.hidden_LD, self.tokens, count)
        hidden = self._read([self.tokens[-1], *drafts])
        run = self._agreed(drafts, hidden)
        self.decoder.cache.rewind(len(hidden) - len(run))
        self.drafter.rewind(len(run) - 1)
        self.hidden_LD = hidden[: len(run)]
        self.tokens += run
        return drafts, run

    def _read(self, tokens: Sequence[int]) -> Tensor:
        return self.decoder.hidden_states(torch.tensor([tokens], device=self.decoder.device))[0]

    def _agreed(self, drafts: list[int], hidden_LD: Tensor) -> list[int]:
        """The drafts as far as the model chooses them, then what it chooses instead, or after the last one."""
        run: list[int] = []
        for draft, logits in zip([*drafts, None], self.model.output.logits(hidden_LD), strict=True):
            run.append(self.choose(logits))
            if run[-1] == self.eod or run[-1] != draft:
                break
        return run
