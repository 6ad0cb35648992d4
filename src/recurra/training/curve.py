"""The picture of a training run: loss, gradient norm and learning rate over the updates."""

from __future__ import annotations

import io
from collections.abc import Callable

from recurra.files import write_atomically
from recurra.training.run import Run


def draw_curve(run: Run, figure_name: str, figure: Callable[[float], float]) -> None:
    """Write ``loss.svg`` from the run's metrics, the loss as ``figure`` has it. Without metrics: nothing."""
    entries = run.read_metrics()
    training = [e for e in entries if e.get("loss") is not None]
    validation = [e for e in entries if e.get("validation_loss") is not None]
    if not training:
        return
    # The object interface: no global state, no window, no display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasSVG(picture)
    loss, norm = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [e["step"] for e in training]
    values = [figure(e["loss"]) for e in training]
    loss.plot(steps, values, color="#9ecae1", linewidth=0.8, label="training, each update")
    loss.plot(steps, _smooth(values), color="#1f77b4", linewidth=1.6, label="training, running mean")
    if validation:
        points = [figure(e["validation_loss"]) for e in validation]
        best = min(range(len(points)), key=points.__getitem__)
        loss.plot([e["step"] for e in validation], points, "o-", color="#d62728", markersize=4, label="validation")
        loss.annotate(
            f"best {points[best]:.3f}",
            (validation[best]["step"], points[best]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="right",
            color="#d62728",
        )
    skipped = [e["step"] for e in entries if e.get("skipped")]
    for step in skipped:
        loss.axvline(step, color="#ff7f0e", linewidth=1, linestyle=":")
    loss.set_ylabel(figure_name)
    loss.set_title(str(run.path.name))
    loss.legend(frameon=False)
    loss.grid(alpha=0.25)
    norm.plot(steps, [e["gradient_norm"] for e in training], color="#2ca02c", linewidth=0.8)
    norm.set_yscale("log")
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("update")
    norm.grid(alpha=0.25)
    drawn = io.BytesIO()
    picture.savefig(drawn, format="svg", metadata={"Date": None, "Creator": "recurra"})
    write_atomically(run.curve, drawn.getvalue())


def _smooth(values: list[float], keep: float = 0.97) -> list[float]:
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth
