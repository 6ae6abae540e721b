"""Where a pattern without "|" is cut for a pipeline: so that the slowest rank has least to do.

Costs are counted in whole picoseconds, so that sums do not depend on their order and every rank finds the same cut.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import sub

from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.schedule import orders
from nemohybrid.pattern import Pattern, PatternError, Segment
from nemohybrid.plan.cost import Costs, Time, modelled
from nemohybrid.plan.timeline import simulate
from nemohybrid.symbols import parse_pattern

PICOSECOND = 1e-12
ROUNDS = 2
"""Microbatches for each rank in the simulations that choose between cuts of an interleaved schedule."""

SIMULATED = 2**14
"""Passes that may be simulated to improve such a cut: some hundredths of a second."""

Borders = tuple[int, ...]
"""Where segments end, counted in layers; the last one is the number of layers."""


def staged(config: RunConfig) -> tuple[tuple[Segment, ...], ...]:
    """For each pipeline rank its segments, in the order in which a microbatch visits them.

    One rank has everything in one. Else the "|" of the pattern say where to cut, and without them the modelled cost on
    an H100, whatever this machine is. A pure function of the configuration, the same on every rank. Raises PatternError
    for more stages than layers, or segments that do not divide over the ranks.
    """
    pattern, ranks = parse_pattern(config.model.pattern), config.parallel.pipeline
    if ranks == 1:
        return ((Segment(0, pattern.main),),)
    return placed(pattern, config, modelled(config)).stage_layers(ranks)


def placed(pattern: Pattern, config: RunConfig, costs: Costs) -> Pattern:
    """The pattern with "|" where the pipeline of `config` is cut; its own where it has some."""
    ranks = config.parallel.pipeline
    if len(pattern.segments) > 1 or ranks == 1:
        return pattern
    return cut(pattern, ranks * (config.parallel.virtual_pipeline or 1), ranks, costs)


def evenly(pattern: Pattern, segments: int) -> Pattern:
    """The pattern cut into segments of equal length, the first ones a layer longer where they do not divide."""
    size, longer = divmod(pattern.num_layers, segments)
    return pattern.cut_at([size + (number < longer) for number in range(segments)])


def cut(pattern: Pattern, segments: int, ranks: int, costs: Costs) -> Pattern:
    """The pattern in `segments` of at least a layer each, segment s for rank s % ranks. Older "|" are ignored.

    A segment a rank: the largest sum of costs is as small as it can be, and among such cuts the sum of squares,
    exactly. Several: borders are moved, from several starts, to make the largest rank and the largest segment small; of
    what is found a simulated step decides. Raises PatternError where segments are more than layers or no multiple of
    the ranks.
    """
    if not 1 <= segments <= pattern.num_layers or segments % ranks:
        raise PatternError(
            f"num_layers={pattern.num_layers} cannot be cut into {segments} segments for {ranks} pipeline ranks: "
            f"legal are multiples of {ranks} up to the number of layers",
            pattern.canonical,
        )
    loads = Loads.of(pattern, segments, ranks, costs)
    borders = _exact(loads)
    if segments > ranks:
        borders = _interleaved(pattern, loads, costs, borders)
    return pattern.cut_at(_lengths(borders))


def _lengths(borders: Borders) -> list[int]:
    return [end - start for start, end in zip((0, *borders), borders, strict=False)]


def stage_times(pattern: Pattern, costs: Costs) -> list[Time]:
    """What each stage of a pattern that is cut takes, in the order of the stages."""
    last = len(pattern.segments) - 1
    return [costs.of(Segment(0, symbols), s == 0, s == last) for s, symbols in enumerate(pattern.segments)]


@dataclass(frozen=True)
class Loads:
    """Costs in picoseconds, forward and backward. sums[i]: of the first i layers; embedding, head: of the ends."""

    sums: tuple[int, ...]
    embedding: int
    head: int
    segments: int
    ranks: int

    @classmethod
    def of(cls, pattern: Pattern, segments: int, ranks: int, costs: Costs) -> "Loads":
        """Of a pattern's layers."""
        picoseconds = {symbol: _picoseconds(time) for symbol, time in costs.layers.items()}
        sums = accumulate((picoseconds[symbol] for symbol in pattern.main), initial=0)
        return cls(tuple(sums), _picoseconds(costs.embedding), _picoseconds(costs.ends), segments, ranks)

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.sums) - 1

    @property
    def total(self) -> int:
        """Of everything."""
        return self.embedding + self.sums[-1] + self.head

    def of_segment(self, start: int, end: int) -> int:
        """The load of the layers from `start` to before `end`, with the end of the model that they have."""
        ends = (self.embedding if start == 0 else 0) + (self.head if end == self.layers else 0)
        return self.sums[end] - self.sums[start] + ends

    def largest(self, borders: Borders) -> tuple[int, int, int]:
        """The largest load of a rank and of a segment, and the squares of the ranks': small where a cut is good."""
        sums = [self.sums[border] for border in borders]
        segments = list(map(sub, sums, (0, *sums)))
        segments[0] += self.embedding
        segments[-1] += self.head
        ranks = [sum(segments[rank :: self.ranks]) for rank in range(self.ranks)]
        return max(ranks), max(segments), sum(load * load for load in ranks)


def _ranks_first(largest: tuple[int, int, int]) -> tuple[int, ...]:
    return largest


def _segments_first(largest: tuple[int, int, int]) -> tuple[int, ...]:
    rank, segment, squares = largest
    return segment, rank, squares


def _picoseconds(time: Time) -> int:
    return round(time.both / PICOSECOND)


# --- A segment a rank: exact ------------------------------------------------------------------------------------------


def _exact(loads: Loads) -> Borders:
    """The borders whose largest segment is smallest; of those with the least sum of squares; of those the first."""
    limit = _smallest_limit(loads)
    best: dict[int, tuple[int, Borders]] = {0: (0, ())}  # where the segments so far end -> their squares and borders
    for number in range(loads.segments):
        best = _with_one_more(loads, best, limit, left=loads.segments - number - 1)
    return best[loads.layers][1]


def _with_one_more(loads: Loads, best: dict[int, tuple[int, Borders]], limit: int, left: int) -> dict:
    """`best` after one more segment of at most `limit`; `left`: how many come after it, with a layer each."""
    longer: dict[int, tuple[int, Borders]] = {}
    for start, (squares, borders) in best.items():
        for end in _ends(loads, start, limit, left):
            load = loads.of_segment(start, end)
            found = squares + load * load, (*borders, end)
            if end not in longer or found < longer[end]:
                longer[end] = found
    return longer


def _ends(loads: Loads, start: int, limit: int, left: int) -> range:
    """Where a segment of at most `limit` may end that begins at `start`."""
    if not left:
        fits = start < loads.layers and loads.of_segment(start, loads.layers) <= limit
        return range(loads.layers, loads.layers + fits)
    room = limit - (0 if start else loads.embedding)
    reach = bisect_right(loads.sums, loads.sums[start] + room) - 1
    return range(start + 1, min(reach, loads.layers - left) + 1)


def _smallest_limit(loads: Loads) -> int:
    """The smallest load that no segment has to exceed, by bisection: feasibility is monotone and quick to see."""
    low, high = 0, loads.total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _is_feasible(loads, middle) else (middle + 1, high)
    return low


def _is_feasible(loads: Loads, limit: int) -> bool:
    """Whether segments that are filled in turn as far as `limit` allows leave no more than the last holds."""
    at = 0
    for left in range(loads.segments - 1, -1, -1):
        ends = _ends(loads, at, limit, left)
        if not ends:
            return False
        at = ends[-1]
    return True


# --- Several segments a rank: search ----------------------------------------------------------------------------------


def _interleaved(pattern: Pattern, loads: Loads, costs: Costs, smallest: Borders) -> Borders:
    """The best of several starts after their borders were moved, by a simulated step; of equals the better loads.

    In a long step the largest rank counts, in a short one the largest segment, for which the other ranks wait in turn.
    """
    even = tuple(accumulate(map(len, evenly(pattern, loads.segments).segments)))
    found = {even, smallest, _refined(loads, smallest, _segments_first)}
    found |= {_refined(loads, start, _ranks_first) for start in (smallest, _by_ranks(loads))}
    judged = [(_step(pattern, loads, costs, borders), loads.largest(borders), borders) for borders in found]
    step, _, best = min(judged)
    return _polished(pattern, loads, costs, best, step)


def _polished(pattern: Pattern, loads: Loads, costs: Costs, borders: Borders, step: float) -> Borders:
    """Move borders while that makes the simulated step shorter, as long as the time of a start-up allows."""
    left = SIMULATED // (2 * loads.segments * ROUNDS * loads.ranks)
    moves = _moves(loads, borders)
    for _ in range(left):
        moved = next(moves, None)
        if moved is None:
            break
        seconds = _step(pattern, loads, costs, moved)
        if seconds < step:
            step, borders, moves = seconds, moved, _moves(loads, moved)
    return borders


def _step(pattern: Pattern, loads: Loads, costs: Costs, borders: Borders) -> float:
    """Seconds of a short interleaved step."""
    plan = orders("interleaved", loads.ranks, loads.segments, ROUNDS * loads.ranks)
    times = stage_times(pattern.cut_at(_lengths(borders)), costs)
    return simulate(plan, times, costs.transfer).makespan


def _by_ranks(loads: Loads) -> Borders:
    """Equal ranks, each with equal segments beside embedding or head, as near as layers allow."""
    room = [loads.total / loads.ranks] * loads.ranks
    room[0] -= loads.embedding
    room[-1] -= loads.head
    local, borders = loads.segments // loads.ranks, [0]
    targets = accumulate(max(0.0, room[number % loads.ranks]) / local for number in range(loads.segments - 1))
    for number, target in enumerate(targets, start=1):
        low, high = borders[-1] + 1, loads.layers - (loads.segments - number)
        borders.append(min(max(_nearest(loads.sums, target), low), high))
    return (*borders[1:], loads.layers)


def _nearest(sums: Sequence[int], target: float) -> int:
    after = bisect_right(sums, target)
    around = [i for i in (after - 1, after) if 0 <= i < len(sums)]
    return min(around, key=lambda i: (abs(sums[i] - target), i))


def _refined(loads: Loads, borders: Borders, judge: Callable[[tuple[int, int, int]], tuple[int, ...]]) -> Borders:
    """Move borders, one or a run of neighbours by one layer, while that makes the loads better."""
    best = judge(loads.largest(borders))
    while True:
        moved = next((m for m in _moves(loads, borders) if judge(loads.largest(m)) < best), None)
        if moved is None:
            return borders
        borders, best = moved, judge(loads.largest(moved))


def _moves(loads: Loads, borders: Borders) -> Iterator[Borders]:
    """Every way to move a border, then a run of up to as many as there are ranks, that leaves a layer everywhere."""
    inner = len(borders) - 1
    for width in range(1, min(loads.ranks, inner) + 1):
        for first in range(inner - width + 1):
            for by in (-1, 1):
                run = tuple(b + by for b in borders[first : first + width])
                before = borders[first - 1] if first else 0
                if before < run[0] and run[-1] < borders[first + width]:
                    yield (*borders[:first], *run, *borders[first + width :])
