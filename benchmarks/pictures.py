"""Heat maps of a run: the ratio to the fastest peer, and the share of the limit.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from bars import ratio, share

Record = dict[str, Any]
Row = dict[str, Any]


def draw(record: Record) -> dict[str, str]:
    """The pictures as SVG, by name; none where there is no grid of batches and sizes."""
    threads = max((row["threads"] for row in record["points"]), default=0)
    rows = [row for row in record["points"] if row["threads"] == threads and row["grid"] == "C2"]
    if not rows:
        return {}

    def percent(row: Row) -> float | None:
        value = share(row, record["limits"])
        return None if value is None else 100 * value

    return {
        "ratio": heat_maps(
            rows,
            lambda row: ratio(row) or None,
            f"How many times as fast as the fastest peer, training, threads: {threads}",
            TwoSlopeNorm(1.0, 0.0, 4.0),
            "RdBu",
            "{:.2f}",
        ),
        "share": heat_maps(
            rows,
            percent,
            f"Percent of the measured limit of multiply-adds, training, threads: {threads}",
            Normalize(0, 100),
            "viridis",
            "{:.0f}",
        ),
    }


def heat_maps(
    rows: list[Row], value: Callable[[Row], float | None], title: str, scale: Normalize, colours: str, form: str
) -> str:
    """A map for each cell: H to the right, B and T downwards."""
    kinds = list(dict.fromkeys(row["cell"] for row in rows))
    sizes = sorted({row["H"] for row in rows})
    shapes = sorted({(row["T"], row["B"]) for row in rows})
    with matplotlib.rc_context({"svg.hashsalt": "recurra", "svg.fonttype": "none", "font.family": "sans-serif"}):
        height = 1.6 + 0.3 * len(shapes)
        figure = Figure(figsize=(1.2 + (0.45 * len(sizes) + 0.3) * len(kinds), height), layout="constrained")
        figure.suptitle(title, fontsize=9)
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            found = {(row["T"], row["B"], row["H"]): value(row) for row in rows if row["cell"] == kind}
            grid = [[found.get((T, B, H)) for H in sizes] for T, B in shapes]
            picture = axes.imshow(np.array(grid, dtype=float), norm=scale, cmap=colours, aspect="auto")
            for down, line in enumerate(grid):
                for right, each in enumerate(line):
                    if each is not None:
                        red, green, blue, _ = picture.cmap(scale(each))
                        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                        ink = "white" if dark else "black"
                        axes.text(right, down, form.format(each), ha="center", va="center", fontsize=6, color=ink)
            axes.set_title(kind, fontsize=8)
            axes.set_xticks(range(len(sizes)), [f"H{H}" for H in sizes], fontsize=6)
            labels = [f"T{T} B{B}" for T, B in shapes] if kind == kinds[0] else [""] * len(shapes)
            axes.set_yticks(range(len(shapes)), labels, fontsize=6)
            axes.tick_params(length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
