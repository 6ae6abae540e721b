"""What a rank has heard of the others, and what the system says of those on its own host."""

from collections.abc import Iterable, Sequence

from nemohybrid.train.watch.board import Board
from nemohybrid.train.watch.processes import GONE, RUNS, state_of
from nemohybrid.train.watch.record import Beat

BEAT = "beat"


class Hearing:
    """own: the rank that listens; here: the ranks of its host, itself among them."""

    def __init__(self, board: Board, own: Beat, here: Sequence[int]) -> None:
        self.board, self.own, self.here = board, own, here
        self.heard: dict[int, tuple[Beat, float]] = {}  # rank -> its last beat, and when that came

    def listen(self, ranks: Iterable[int], now: float) -> dict[int, Beat]:
        """The last beats of `ranks`. Raises RuntimeError where the store gives no answer."""
        beats = {rank: Beat.read(text) for rank, text in self.board.of_ranks(BEAT, ranks).items()}
        for rank, beat in beats.items():
            if rank not in self.heard or self.heard[rank][0].count != beat.count:
                self.heard[rank] = beat, now
        return beats

    @property
    def beats(self) -> dict[int, Beat]:
        """The last of each rank, as far as they were heard. Asks nobody."""
        return {rank: beat for rank, (beat, _) in dict(self.heard).items()}

    @property
    def neighbours(self) -> dict[int, Beat]:
        """Those on this host whose processes can be looked at: in another container a number means another process."""
        beats, own = self.beats, self.own
        return {
            rank: beats[rank]
            for rank in self.here
            if rank != own.rank and rank in beats and beats[rank].pids == own.pids
        }

    def states(self) -> dict[int, str]:
        """Neighbour -> what the system says of its process."""
        return {rank: state_of(beat.pid) for rank, beat in self.neighbours.items()}

    @property
    def speaks(self) -> bool:
        """Whether no earlier rank of this host runs: one says what each of them sees."""
        states = self.states()
        return not any(states.get(rank) == RUNS for rank in self.here if rank < self.own.rank)

    def gone(self) -> dict[int, Beat]:
        """Neighbours whose process is gone, and that have not said good-bye."""
        return {r: beat for r, beat in self.neighbours.items() if not beat.left and state_of(beat.pid) == GONE}
