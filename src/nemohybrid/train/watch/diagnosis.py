"""Who holds a job up: from the last words of its ranks to a report. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from nemohybrid.train.watch.processes import GONE, RUNS, STOPPED
from nemohybrid.train.watch.record import DONE, Beat, LastWords
from nemohybrid.train.watch.sight import DEVICE
from nemohybrid.train.watch.wording import ranks, seconds

MOST = 16
"""Entries of a kind that a report spells out."""
_SILENT = {
    GONE: "dead: its process is gone",
    STOPPED: STOPPED,
    RUNS: "its process runs, but its watch has no turn: a call that never gives the interpreter back",
}


@dataclass(frozen=True)
class Facts:
    """why the alarm was given; size: of the world; beats: the last of each rank; words: of those that still answer."""

    why: str
    size: int
    beats: Mapping[int, Beat]
    words: Mapping[int, LastWords]

    @property
    def processes(self) -> dict[int, str]:
        """What neighbours know of processes: rank -> state."""
        return {rank: state for words in self.words.values() for rank, state in words.neighbours.items()}


def suspects(facts: Facts) -> dict[int, str]:
    """Rank -> why the others wait for it. The strongest evidence alone counts; empty where all stand at the same line.

    In this order: ranks that do not answer; ranks that are in no collective, above all those that have entered fewer than
    others of their groups; ranks that have entered another number than others; ranks that stand elsewhere than most.
    """
    for evidence in (_without_an_answer, _in_no_collective, _out_of_step, _apart):
        if found := evidence(facts):
            return found
    return {}


def _without_an_answer(facts: Facts) -> dict[int, str]:
    """One that is done has no more to say, and holds nobody up."""
    processes = facts.processes
    done = {rank for rank, beat in facts.beats.items() if beat.left == DONE}
    silent = set(range(facts.size)) - facts.words.keys() - done
    return {rank: _silent(facts.beats.get(rank), processes.get(rank, "")) for rank in sorted(silent)}


def _silent(beat: Beat | None, process: str) -> str:
    if beat and beat.left:
        return f"it has ended: {beat.left}"
    return _SILENT.get(process, "no answer: its process, its host or its network is gone, or it is stopped")


def _in_no_collective(facts: Facts) -> dict[int, str]:
    busy = {rank for rank, words in facts.words.items() if not words.waits_in}
    late = {rank for counts in _uneven(facts).values() for rank, n in counts.items() if n < max(counts.values())}
    return dict.fromkeys(sorted(busy & late or busy), "it is in no collective")


def _out_of_step(facts: Facts) -> dict[int, str]:
    """Where most ranks of some group have entered as many collectives, those that have not. Elsewhere those that have
    entered fewer, but for those that have entered more in another group: they only wait there.
    """
    uneven = _uneven(facts)
    clear = {group: counts for group, counts in uneven.items() if _majority(counts) is not None}
    odd, fine = dict[int, str](), set[int]()
    for (name, members), counts in (clear or uneven).items():
        usual = _majority(counts) or max(counts.values())
        fine |= {rank for rank, count in counts.items() if count == usual}
        told = f"collectives of the {name} group of {ranks(members)}, others {usual}"
        odd |= {rank: f"it has entered {count} {told}" for rank, count in counts.items() if count != usual}
    return {r: why for r, why in sorted(odd.items()) if r not in fine} or dict(sorted(odd.items()))


def _majority(counts: Mapping[int, int]) -> int | None:
    """What more than half of the ranks have."""
    count, how_often = Counter(counts.values()).most_common(1)[0]
    return count if 2 * how_often > len(counts) else None


def _uneven(facts: Facts) -> dict[tuple[str, tuple[int, ...]], dict[int, int]]:
    """(name, members) of a group -> rank -> entered, where they differ."""
    groups: dict[tuple[str, tuple[int, ...]], dict[int, int]] = {}
    for rank, words in sorted(facts.words.items()):
        for name, entered in words.groups.items():
            groups.setdefault((name, entered.ranks), {})[rank] = entered.count
    return {group: counts for group, counts in groups.items() if len(set(counts.values())) > 1}


def _apart(facts: Facts) -> dict[int, str]:
    standing = {rank: (words.waits_in, words.places) for rank, words in facts.words.items()}
    common = Counter(standing.values()).most_common(2)
    if len(common) < 2:
        return {}
    most = common[0][0] if common[0][1] > common[1][1] else None
    return {r: "it waits elsewhere than others" for r, place in sorted(standing.items()) if place != most}


def report(facts: Facts) -> str:
    """In plain words: who holds the job up and where it stands; who waits, in which collective, at which line."""
    found = suspects(facts)
    lines = [f"this job ends: {facts.why}", "", "Held up by"]
    lines += [line for rank, why in list(found.items())[:MOST] for line in _suspect(facts, rank, why)]
    lines += _and_more(len(found))
    if not found:
        lines.append("  no rank: all stand at the same line, so a network link or a device hangs")
    lines += ["", "Who waits", *_waiting(facts, set(found))]
    if uneven := _uneven(facts):
        lines += ["", "Groups whose ranks have entered different numbers of collectives", *_groups(uneven)]
    return "\n".join([*lines, "", "The same command goes on from the newest checkpoint."])


def alone(facts: Facts, holder: int | None) -> str:
    """What a rank can tell without the store, which `holder` has, or the launcher: of itself and its host."""
    (words,) = facts.words.values()
    done = {rank for rank, beat in facts.beats.items() if beat.left == DONE}
    found = {r: _silent(facts.beats.get(r), state) for r, state in words.neighbours.items() if state != RUNS}
    if holder is not None:
        found[holder] = f"{_of_holder(facts, holder)}. It has the store of the job"
    lines = [line for rank in sorted(found.keys() - done - {words.rank}) for line in _suspect(facts, rank, found[rank])]
    lines = lines or [
        "  the store of the job, in which ranks write to each other: torchrun has it where the job was started"
    ]
    told = [f"this job ends: {facts.why}", "", "Held up by", *lines]
    told += ["", f"Who waits, as far as rank {words.rank} knows", *_crowd([words])]
    return "\n".join([*told, "", "The same command goes on from the newest checkpoint."])


def _of_holder(facts: Facts, holder: int) -> str:
    state = facts.processes.get(holder, "")
    return RUNS if state == RUNS else _silent(facts.beats.get(holder), state)


def _suspect(facts: Facts, rank: int, why: str) -> list[str]:
    beat, words = facts.beats.get(rank), facts.words.get(rank)
    known = words or beat
    where = f" on {known.host} (process {known.pid})" if known else ""
    lines = [f"  rank {rank}{where}: {why}"]
    if words:
        return [*lines, f"    {_doing(words)}", *_places(words)]
    if beat and not beat.left:
        last = f"last heard of in step {beat.step}, {beat.phase}" if beat.phase else "not heard of since it began"
        lines.append(f"    {last}")
    return lines


def _doing(words: LastWords) -> str:
    at = f", stage {words.stage}, microbatch {words.microbatch}" if words.step else ""
    waits = f", waiting for {words.waits_in}" if words.waits_in == DEVICE else ""
    waits = waits or (f", waiting in {words.waits_in}" if words.waits_in else "")
    return f"step {words.step}, {words.phase}{at}, for {seconds(words.still)}{waits}"


def _places(words: LastWords) -> list[str]:
    inner = [] if words.waits_in or words.innermost in words.places else [f"    innermost: {words.innermost}"]
    return [f"    at {place}" for place in words.places] + inner


def _waiting(facts: Facts, found: set[int]) -> list[str]:
    """Ranks that stand at the same place, together, the most of them first."""
    together: dict[tuple, list[LastWords]] = {}
    for rank, words in sorted(facts.words.items()):
        if rank not in found:
            together.setdefault((words.waits_in, words.places, words.phase, words.step), []).append(words)
    crowds = sorted(together.values(), key=len, reverse=True)
    lines = [line for crowd in crowds[:MOST] for line in _crowd(crowd)]
    return lines + _and_more(len(crowds)) or ["  no rank"]


def _crowd(crowd: list[LastWords]) -> list[str]:
    hosts = sorted({words.host for words in crowd})
    on = ", ".join(hosts[:MOST]) + (f" and {len(hosts) - MOST} more" if len(hosts) > MOST else "")
    return [f"  {ranks(words.rank for words in crowd)} on {on}: {_doing(crowd[0])}", *_places(crowd[0])]


def _groups(uneven: Mapping[tuple[str, tuple[int, ...]], Mapping[int, int]]) -> list[str]:
    lines = []
    for (name, members), counts in list(uneven.items())[:MOST]:
        by_count = {count: [r for r, n in counts.items() if n == count] for count in sorted(set(counts.values()))}
        told = ", ".join(f"{ranks(who)} {count}" for count, who in by_count.items())
        lines.append(f"  {name} of {ranks(members)}: {told}")
    return lines + _and_more(len(uneven))


def _and_more(count: int) -> list[str]:
    return [f"  and {count - MOST} more"] if count > MOST else []
