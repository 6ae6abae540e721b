"""Whether a job must end: by the beats of its ranks alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemohybrid.train.watch.record import DONE, Beat
from nemohybrid.train.watch.wording import seconds

GRACE_S = 5.0
"""How long ranks may go on after one has ended with an error: mostly all have the same, and end by themselves."""


@dataclass(frozen=True)
class Limits:
    """Seconds without a move after which a job hangs: in steps, and while any rank does what may take long."""

    hang: float
    patience: float


def alarm(beats: Mapping[int, Beat], silent: Mapping[int, float], limits: Limits, hurried: float = math.inf) -> str:
    """Why the job must end; an empty string where it need not.

    silent: seconds for which the beat of a rank has not changed. A rank that is silent has not moved either, as far as
    anybody knows. hurried: seconds since a rank was last known to do what may take long; the others have rightly waited till
    then, and their last beats still say so.
    """
    failed = [r for r, beat in beats.items() if beat.left not in ("", DONE) and silent[r] >= GRACE_S]
    if failed:
        return f"rank {failed[0]} has ended: {beats[failed[0]].left}"
    running = {rank: beat for rank, beat in beats.items() if not beat.left}
    if not running:
        return ""
    still = {rank: beat.still + silent[rank] for rank, beat in running.items()}
    slowest = max(still, key=lambda rank: still[rank])
    if any(beat.patient for beat in running.values()):
        hangs = still[slowest] > limits.patience
    else:
        hangs = min(still[slowest], hurried) > limits.hang
    return (
        f"rank {slowest} has not moved for {seconds(still[slowest])} in step {running[slowest].step}" if hangs else ""
    )
