"""What the benchmarks of scripts/bench/kernels wrote, as figures and short tables for the summary of gpu_suite.py."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]


@dataclass
class Outcome:
    """`figures` go on the stage's line, `lines` beneath it."""

    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def read(file: Path, make: Callable[[Entry], Outcome]) -> Outcome:
    """Of a file that a benchmark wrote, however far it came. Raises OSError or ValueError where there is none to read."""
    found = json.loads(file.read_text(encoding="utf-8"))
    outcome = make(found)
    if peer := found["machine"].get("peer"):
        outcome.lines.insert(0, f"peer: {peer}")
    if found["left_out"]:
        outcome.lines.append(f"left out for want of time: {len(found['left_out'])}, named in {file.name}")
    return outcome


def kernels(found: Entry) -> Outcome:
    """Of against_mamba.py: milliseconds at the main sizes, and where on the grid a bar is missed."""
    entries: Sequence[Entry] = found["lines"]
    outcome = Outcome()
    for entry in entries:
        times, peer = entry["milliseconds"], entry["peer"]
        name = f"{entry['part']:8}{entry['direction']:9}"
        if entry["sizes"] == entries[0]["sizes"]:
            shown = [f"{side} {times[side]:.3f} ms" for side in ("ours", peer, "torch") if side in times]
            ratio = "" if entry["ratio"] is None else f"  {entry['ratio']:.2f} times as fast as {peer}"
            outcome.lines.append(name + ", ".join(shown) + ratio)
        if "ours" in entry["faults"]:
            outcome.lines.append(f"{name}{entry['sizes']}: ours has no time: {entry['faults']['ours']}")
    judged = [entry for entry in entries if entry["verdict"]]
    passed = sum(entry["verdict"] == "pass" for entry in judged)
    if judged:
        outcome.figures = {"bars": f"{passed} of {len(judged)} passed"}
    for e in judged:
        if e["verdict"] != "pass" and e["ratio"] is not None:  # without a time it was said above
            words = f"{e['part']} {e['direction']} at {e['sizes']}: {e['ratio']:.2f}, bar {e['bar']}"
            outcome.lines.append(f"{e['verdict']}: {words}")
    return outcome


def roofline(found: Entry) -> Outcome:
    """Of roofline.py: each kernel of the first case, which is a whole mixer, and the sums of the others."""
    outcome = Outcome()
    for case in found["cases"]:
        rows = case["timed"]
        if case["fault"]:
            outcome.lines.append(f"{case['case']}: {case['fault']}")
            continue
        seconds, fraction = sum(row["seconds"] for row in rows), fraction_of(rows)
        outcome.lines.append(f"{case['case']:28}{1e6 * seconds:9.1f} us{_share(fraction)}")
        if case is found["cases"][0]:
            outcome.figures = {} if fraction is None else {"of_roofline": fraction}
            outcome.lines += [
                f"  {row['kernel']['name']:26}{1e6 * row['seconds']:9.1f} us{_share(row['fraction'])}" for row in rows
            ]
    return outcome


def fraction_of(rows: Sequence[Entry]) -> float | None:
    """Of all of them together: their least time to their own."""
    least = [row["fraction"] * row["seconds"] for row in rows if row["fraction"] is not None]
    return sum(least) / sum(row["seconds"] for row in rows) if rows and len(least) == len(rows) else None


def layers(found: Entry) -> Outcome:
    """Of layers.py: a line for each side of each layer."""
    lines = [f"{e['model']:20}{e['layer']:3}{e['side']:22}{_speed(e)}" for e in found["layers"]]
    shares = [e["mfu"] for e in found["layers"] if e["side"] == "ours" and e["mfu"] is not None]
    return Outcome({"median_mfu": statistics.median(shares)} if shares else {}, lines)


def models(found: Entry) -> Outcome:
    """Of models.py: a line for each side."""
    lines = [f"{e['model']:16}{e['side']:22}{_speed(e)}, recompute {e['recompute']}" for e in found["models"]]
    ours = [e for e in found["models"] if e["side"] == "ours"]
    figures = {key: ours[0][key] for key in ("tokens_per_second", "mfu") if ours and ours[0][key] is not None}
    return Outcome(figures, lines)


def precision(found: Entry) -> Outcome:
    """Of precision_gemm.py: a line for each shape, and of each recipe and side how much faster all layers of the model are."""
    outcome, sums = Outcome(), dict[str, tuple[float, float]]()
    for e in found["shapes"]:
        start, bf16 = f"{e['recipe']:14}{e['shape']:12}[{e['outputs']}, {e['inputs']}]", e["layer_ms"]["bf16"]
        for side, ms in e["layer_ms"].items():
            if side != "bf16":
                one, other = sums.get(name := f"{e['recipe']} by {side}", (0.0, 0.0))
                sums[name] = one + bf16 * e["count"], other + ms * e["count"]
                outcome.lines.append(f"{start}  {side} {ms:.3f} ms, bf16 {bf16:.3f} ms  {bf16 / ms:.2f}")
        outcome.lines += [f"{start}  {side} has no time: {why}" for side, why in e["faults"].items()]
    outcome.figures = {name: f"{bf16 / ms:.2f} times bf16" for name, (bf16, ms) in sums.items()}
    return outcome


def _speed(entry: Entry) -> str:
    if entry["tokens_per_second"] is None:
        return entry["fault"] or "no time"
    memory = "" if entry["peak_bytes"] is None else f", {entry['peak_bytes'] / 2**30:.2f} GiB"
    rates = f"{entry['tokens_per_second']:12,.0f} tokens/s{entry['model_flops_per_second'] / 1e12:8.1f} TFLOP/s"
    return f"{rates}{_share(entry['mfu'], 'MFU')}{memory}"


def _share(fraction: float | None, of: str = "of roofline") -> str:
    return "" if fraction is None else f"{fraction:6.0%} {of}"
