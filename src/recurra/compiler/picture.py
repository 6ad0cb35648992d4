"""The stages of a plan as a picture: what runs once, in batches, in which loop, and its share of the work."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurra.compiler.layout import DIRECTIONS, said
from recurra.files import write_atomically

if TYPE_CHECKING:
    from recurra.compiler.explain import Details, Row

# In inches: a stage, the room between two, the room above for the arrow of a carry, and around everything.
_WIDE, _HIGH, _GAP, _ABOVE, _MARGIN = 2.7, 1.75, 0.45, 0.8, 0.25
_LABEL, _LEGEND = 0.95, 0.45
_COLOURS = {"once": "#e6e6e6", "batched": "#d6e6f5", "loop": "#fde3c8", "summed": "#dcecd9"}
_STRONG = {"once": "#8c8c8c", "batched": "#2f6fad", "loop": "#d9730d", "summed": "#4d8f43"}
_MEANING = {
    "once": "once in a sequence",
    "batched": "all steps at once",
    "loop": "step by step",
    "summed": "once, on sums over all steps",
}
# As many characters of the small type fill the width of a stage.
_CHARACTERS = 43


def draw(details: Details, path: Path) -> None:
    """Write the picture as an SVG."""
    drawn = io.BytesIO()
    figure_of(details).savefig(drawn, format="svg", metadata={"Date": None, "Creator": "recurra", "Title": "explain()"})
    write_atomically(path, drawn.getvalue())


def figure_of(details: Details) -> Any:
    """The picture. Bars are shares of the FLOPs of one row and step, forward and backward together."""
    # The object interface: no global state, no window, no display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = [row for row in details.rows if row.kind == "loop" or not all(each.moves for each in row.operations)]
    bands = [band for d in DIRECTIONS if (band := [row for row in shown if row.direction == d])]
    longest = max(len(band) for band in bands)
    width = 2 * _MARGIN + _LABEL + longest * _WIDE + (longest - 1) * _GAP
    width = max(width, 2 * _MARGIN + _LABEL + 2.6 * _WIDE)
    height = 2 * _MARGIN + _LEGEND + len(bands) * (_HIGH + _ABOVE)
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    total = sum(row.flops for row in shown)
    for number, band in enumerate(bands):
        bottom = height - _MARGIN - (number + 1) * (_HIGH + _ABOVE)
        _band(axes, band, bottom, total)
    _legend(axes, dict.fromkeys(row.kind for row in shown), total)
    return figure


def _band(axes: Any, rows: Sequence[Row], bottom: float, total: int) -> None:
    share = sum(row.flops for row in rows) / total if total else 0
    middle = bottom + _HIGH / 2
    axes.text(_MARGIN, middle, rows[0].direction, weight="bold", size=11, va="center")
    axes.text(_MARGIN, middle - 0.2, f"{100 * share:.0f} %", size=9, va="center", color="#555555")
    for place, row in enumerate(rows):
        left = _MARGIN + _LABEL + place * (_WIDE + _GAP)
        _stage(axes, row, left, bottom, total)
        if place:
            arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (left - 0.03, middle), (left - _GAP + 0.03, middle), arrowprops=arrow)


def _stage(axes: Any, row: Row, left: float, bottom: float, total: int) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    strong = _STRONG[row.kind]
    shape = "round,pad=0,rounding_size=0.08"
    box = FancyBboxPatch((left, bottom), _WIDE, _HIGH, boxstyle=shape, facecolor=_COLOURS[row.kind], edgecolor=strong)
    box.set_gid(f"{row.direction} {row.kind} {' '.join(row.carries)}".strip())
    axes.add_patch(box)
    inner, top = left + 0.12, bottom + _HIGH - 0.2
    axes.text(inner, top, _MEANING[row.kind], weight="bold", size=9.5, va="center")
    for number, line in enumerate(_words(row)):
        axes.text(inner, top - 0.22 - 0.165 * number, line, size=7, va="center", family="monospace")
    share = row.flops / total if total else 0
    room = _WIDE - 0.24
    figure = f"{row.flops_once:,} FLOPs, once" if row.kind == "once" else f"{row.flops:,} FLOPs"
    axes.text(inner, bottom + 0.36, figure, size=8, va="center")
    axes.text(left + _WIDE - 0.12, bottom + 0.36, f"{100 * share:.1f} %", size=8, va="center", ha="right")
    axes.add_patch(Rectangle((inner, bottom + 0.12), room, 0.12, facecolor="white", edgecolor="none"))
    bar = Rectangle((inner, bottom + 0.12), room * share, 0.12, facecolor=strong, edgecolor="none")
    bar.set_gid(f"share {row.direction} {100 * share:.1f}")
    axes.add_patch(bar)
    if row.kind == "loop":
        _carry(axes, row, left, bottom + _HIGH, strong)


def _carry(axes: Any, row: Row, left: float, top: float, colour: str) -> None:
    """The arrow from the end of a step to the beginning of the next."""
    begin, end, high = left + 0.82 * _WIDE, left + 0.18 * _WIDE, top + 0.3
    axes.plot([begin, begin, end, end], [top, high, high, top + 0.1], color=colour, linewidth=1.6)
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (end, top), (end, top + 0.15), arrowprops=arrow)
    axes.text(left + _WIDE / 2, high + 0.12, _cut(", ".join(row.carries), 34), size=9, ha="center", color=colour)


def _words(row: Row) -> list[str]:
    """Up to five lines about a stage: what became of a loop, and the lines of the step that cost most."""
    found = []
    if row.kind == "loop":
        kind = "native code" if row.native else "eager steps, no native code" if row.refused else "eager steps"
        found.append(f"{kind}, linear recurrence" if row.linear else kind)
    groups: dict[str, list[Any]] = {}
    for each in row.operations:
        if not each.moves:
            groups.setdefault(each.line, []).append(each)
    ranked = sorted(groups, key=lambda line: -sum(each.flops for each in groups[line]))
    kept = ranked[: 5 - len(found)] if len(ranked) <= 5 - len(found) else ranked[: 4 - len(found)]
    found += [_cut(f"{line} {said(groups[line])}".strip(), _CHARACTERS) for line in groups if line in kept]
    return [*found, f"and {len(groups) - len(kept)} more lines"] if len(kept) < len(groups) else found


def _legend(axes: Any, kinds: Sequence[str] | dict[str, None], total: int) -> None:
    from matplotlib.patches import Rectangle

    place = _MARGIN + _LABEL
    for kind in kinds:
        swatch = Rectangle(
            (place, _MARGIN - 0.02), 0.16, 0.16, facecolor=_COLOURS[kind], edgecolor=_STRONG[kind], linewidth=1
        )
        axes.add_patch(swatch)
        axes.text(place + 0.24, _MARGIN + 0.06, _MEANING[kind], size=8, va="center")
        place += 0.5 + 0.068 * len(_MEANING[kind])
    words = f"bars: share of {total:,} FLOPs for each row and step"
    axes.text(place + 0.1, _MARGIN + 0.06, words, size=8, va="center", color="#555555")


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"
