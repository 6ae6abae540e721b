"""A picture of a pipeline's step: what each rank computes when, and under it which layers it has. SVG, by hand.

Blue is forward and orange backward, darker in the later stages of a rank; the numbers are microbatches.
"""

import colorsys
from collections.abc import Iterator
from xml.sax.saxutils import escape

from nemohybrid.parallel.schedule import FORWARD
from nemohybrid.plan.pipeline import PipelinePlan, summary
from nemohybrid.plan.timeline import Span

LEFT, PLOT, RIGHT = 70, 1200, 90  # pixels: names of ranks, the step, idle shares
TOP, ROW, GAP, CELL = 64, 30, 6, 22
DIGIT = 7  # width of one, at font size 11
BLUE, ORANGE = 210 / 360, 28 / 360
STYLE = (
    "text{font-family:sans-serif;font-size:11px;fill:#222}.title{font-size:15px;font-weight:bold}"
    ".number,.symbol{text-anchor:middle}.side{font-size:12px}.rank{fill:#f2f2f2}.layer{stroke:#fff;stroke-width:.5}"
    ".cut{stroke:#222;stroke-width:2}"
)


def svg(plan: PipelinePlan) -> str:
    """The whole picture; the same text for the same plan."""
    height = TOP + plan.ranks * (ROW + GAP) + 3 * CELL + 40
    width = LEFT + PLOT + RIGHT
    title = f"{plan.name}, {summary(plan)}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{_colors(len(plan.segments[0]))}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        *_legend(plan),
        *(line for rank in range(plan.ranks) for line in _row(plan, rank)),
        *_strip(plan, TOP + plan.ranks * (ROW + GAP) + 24),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _colors(turns: int) -> str:
    """Classes f0, f1, ... and b0, b1, ...: forward and backward of a rank's stages."""
    styles = []
    for turn in range(turns):
        light = 0.82 - 0.24 * turn / max(1, turns - 1) if turns > 1 else 0.68
        styles += [f".{name}{turn}{{fill:{_hex(hue, light)}}}" for name, hue in (("f", BLUE), ("b", ORANGE))]
    return "".join(styles)


def _hex(hue: float, light: float, saturation: float = 0.65) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue, light, saturation)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _legend(plan: PipelinePlan) -> Iterator[str]:
    """What the colours mean, and how long the step takes."""
    for x, name, text in ((LEFT, "f0", "forward"), (LEFT + 90, "b0", "backward")):
        yield f'<rect class="{name}" x="{x}" y="40" width="12" height="12"/><text x="{x + 18}" y="50">{text}</text>'
    step = f"a step of {plan.microbatches} microbatches takes {1e3 * plan.timeline.makespan:.1f} ms"
    yield f'<text x="{LEFT + 200}" y="50">{step}; numbers are microbatches, at the right what each rank waits</text>'


def _row(plan: PipelinePlan, rank: int) -> Iterator[str]:
    """One rank: its passes, between its name and its idle share."""
    y = TOP + rank * (ROW + GAP)
    yield f'<text class="side" x="8" y="{y + ROW / 2 + 4:g}">rank {rank}</text>'
    yield f'<rect class="rank" x="{LEFT}" y="{y}" width="{PLOT}" height="{ROW}"/>'
    for span in plan.timeline.spans[rank]:
        yield from _pass(plan, span, y)
    idle = f"{100 * plan.timeline.idle[rank]:.1f} % idle"
    yield f'<text class="side" x="{LEFT + PLOT + 8}" y="{y + ROW / 2 + 4:g}">{idle}</text>'


def _pass(plan: PipelinePlan, span: Span, y: int) -> Iterator[str]:
    scale = PLOT / (plan.timeline.makespan or 1.0)
    x, width = LEFT + span.start * scale, (span.end - span.start) * scale
    kind, stage, microbatch = span.action
    name = f"{'f' if kind == FORWARD else 'b'}{stage // plan.ranks}"
    yield (
        f'<rect class="{name}" x="{x:.2f}" y="{y}" width="{max(0.0, width - 0.5):.2f}" height="{ROW}">'
        f"<title>{kind} {microbatch}, stage {stage}: {1e3 * span.start:.2f} to {1e3 * span.end:.2f} ms</title></rect>"
    )
    if width >= DIGIT * len(str(microbatch)) + 2:
        yield f'<text class="number" x="{x + width / 2:.2f}" y="{y + ROW / 2 + 4:g}">{microbatch}</text>'


def _strip(plan: PipelinePlan, y: int) -> Iterator[str]:
    """The layers from first to last, a border where a stage ends, and whose they are."""
    wide = PLOT / max(1, plan.pattern.num_layers)
    at = 0
    yield f'<text class="side" x="8" y="{y + CELL - 6}">layers</text>'
    for stage, symbols in enumerate(plan.pattern.segments):
        rank, start = stage % plan.ranks, LEFT + at * wide
        color = _hex(rank / plan.ranks, 0.84, 0.5)
        for number, symbol in enumerate(symbols):
            yield from _layer(start + number * wide, y, wide, symbol, color)
        at += len(symbols)
        yield f'<line class="cut" x1="{start:.2f}" y1="{y - 4}" x2="{start:.2f}" y2="{y + CELL + 4}"/>'
        if len(symbols) * wide >= 5 * DIGIT:
            middle = start + len(symbols) * wide / 2
            yield f'<text class="symbol" x="{middle:.2f}" y="{y + CELL + 16}">rank {rank}</text>'
    end = LEFT + PLOT
    yield f'<line class="cut" x1="{end}" y1="{y - 4}" x2="{end}" y2="{y + CELL + 4}"/>'
    if plan.pattern.mtp_depth:
        text = f"and {plan.pattern.mtp_depth} x {plan.pattern.mtp} for MTP on rank {plan.ranks - 1}"
        yield f'<text class="side" x="{LEFT}" y="{y + 2 * CELL + 14}">{escape(text)}</text>'


def _layer(x: float, y: int, wide: float, symbol: str, color: str) -> Iterator[str]:
    yield f'<rect class="layer" x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{CELL}" fill="{color}"/>'
    if wide >= DIGIT:
        yield f'<text class="symbol" x="{x + wide / 2:.2f}" y="{y + CELL - 6}">{escape(symbol)}</text>'
