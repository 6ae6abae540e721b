"""In which order a run takes samples from several corpora: sample i is a pure function of (weights, i).

The order is that of Webster and Sainte-Lague: sample j = 0, 1, ... of a corpus with weight w has the time (2j + 1) / 2w,
and the samples of all corpora come in order of time, at equal times in order of the corpora. It depends on nothing but
the weights, least of all on the length of the run, and it is exact: weights are fractions (0.1 is 1/10), times are
whole numbers.

After any number i of samples, a corpus with share s of C corpora has given i * s of them, off by at most
1/2 + s * (C - 2) / 2: each corpus is at most half a sample off its own time, and the time itself is shared by all.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction


class Blend:
    """The order in which samples of several corpora come.

    weights: one positive number a corpus, of any scale. `shares` are they, divided by their sum.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        assert min(exact, default=0) > 0, f"weights {weights}"
        self.shares = [weight / sum(exact) for weight in exact]
        self.total = math.lcm(*(share.denominator for share in self.shares))
        self.parts = [int(share * self.total) for share in self.shares]  # whole weights with the sum `total`
        common = math.lcm(*self.parts)
        self.strides = [common // part for part in self.parts]  # half the time between two samples of a corpus

    def positions(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(corpus, sample of that corpus) for the samples `start` to `stop - 1` of the blend."""
        return list(self._following(self.counts(start), stop - start))

    def counts(self, stop: int) -> list[int]:
        """[corpora] how many of the first `stop` samples come from each corpus."""
        counts = self._counts_shortly_before(stop)
        for corpus, index in self._following(counts, stop - sum(counts)):
            counts[corpus] = index + 1
        return counts

    def _counts_shortly_before(self, stop: int) -> list[int]:
        """What has come up to the time (stop - C/2) / total: at most `stop` samples, and fewer than C less.

        Up to the time t a corpus with the whole weight w has given floor(w t + 1/2).
        """
        twice = 2 * stop - len(self.parts)
        return [max(0, (part * twice + self.total) // (2 * self.total)) for part in self.parts]

    def _following(self, counts: Sequence[int], number: int) -> Iterator[tuple[int, int]]:
        """The next `number` positions after those that `counts` says."""
        strides = self.strides
        heap = [((2 * index + 1) * strides[corpus], corpus, index) for corpus, index in enumerate(counts)]
        heapq.heapify(heap)
        for _ in range(number):
            time, corpus, index = heap[0]
            yield corpus, index
            heapq.heapreplace(heap, (time + 2 * strides[corpus], corpus, index + 1))
