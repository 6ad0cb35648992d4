"""What is timed: the cells, the points of each grid, and the arithmetic that a point cannot do without.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

STANDARD = ("vanilla", "GRU", "LSTM")
OWN = ("own gated", "own normed")
# Blocks of H rows in the weights of one layer, on the input as on the state.
BLOCKS = {"vanilla": 1, "GRU": 3, "LSTM": 4, "own gated": 3, "own normed": 4}

# The arithmetic of one training step that a full run still takes up: about a second of a fast path on one core.
BUDGET = 1.0e11


@dataclass(frozen=True)
class Point:
    """One training step to time. ``every_peer``: also those that take long to build."""

    grid: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    every_peer: bool = False

    @property
    def flops(self) -> float:
        """Necessary floating-point operations, 6 B T for each weight of a matrix product: forward, backward to what
        went in, backward to the weight. Pointwise arithmetic and what a path computes again do not count."""
        weights = self.H * (self.I + self.H) + (self.layers - 1) * 2 * self.H**2
        return 6.0 * self.B * self.T * BLOCKS[self.cell] * weights

    def __str__(self) -> str:
        layers = f" {self.layers} layers" if self.layers > 1 else ""
        size = f"H{self.H}" if self.I == self.H else f"I{self.I} H{self.H}"
        return f"{self.cell}{layers} B{self.B} T{self.T} {size}"


def c1() -> list[Point]:
    """The one GRU that another project has published its figure for."""
    return [Point("C1", "GRU", 32, 64, 32, 128, every_peer=True)]


def c2(quick: bool) -> list[Point]:
    """Five cells, small to large."""
    batches, lengths, sizes = (1, 8, 32, 128), (100, 1000), (32, 64, 128, 256, 512)
    if quick:
        batches, lengths, sizes = (1, 32), (100,), (64, 256)
    points = []
    for cell, B, T, H in product(STANDARD + OWN, batches, lengths, sizes):
        every = B in (1, 32) and H in (64, 256) and T == 100
        if quick:
            every = every and B == 32 and H == 64 and cell in ("LSTM", "own gated")
        points.append(Point("C2", cell, T, B, H, H, every_peer=every))
    return points


def c3(quick: bool) -> list[Point]:
    """Sizes that are no multiple of a vector."""
    if quick:
        return [Point("C3", "LSTM", 100, 32, 100, 100)]
    return [Point("C3", cell, 100, B, H, H) for cell, B, H in product(STANDARD + OWN, (1, 32), (100, 200, 300))]


def chained(quick: bool) -> list[Point]:
    """Two layers, one on the other."""
    if quick:
        return [Point("chained", cell, 100, 32, 64, 64, 2) for cell in STANDARD]
    return [Point("chained", cell, 100, B, H, H, 2) for cell, B, H in product(STANDARD, (1, 32), (64, 256))]


def tiny() -> list[Point]:
    """Every cell in no time, for the tests."""
    return [*(Point("tiny", cell, 3, 2, 5, 8) for cell in STANDARD + OWN), Point("tiny", "LSTM", 3, 2, 8, 8, 2)]


GRIDS = ("C1", "C2", "C3", "chained", "S1", "M1")


def points(names: list[str], quick: bool) -> tuple[list[Point], list[Point]]:
    """The points of the training grids among ``names``, and those left out because they are over the budget."""
    made = {"C1": c1(), "C2": c2(quick), "C3": c3(quick), "chained": chained(quick), "tiny": tiny()}
    asked = [point for name in names for point in made.get(name, [])]
    return [p for p in asked if p.flops <= BUDGET], [p for p in asked if p.flops > BUDGET]


@dataclass(frozen=True)
class Streaming:
    """One step at a time, batch 1, I = H = ``size``; at most ``steps``, at most ``seconds`` for each way to do it."""

    cell: str
    size: int
    steps: int
    seconds: float


def streams(names: list[str], quick: bool) -> list[Streaming]:
    """S1, and its tiny form."""
    if "tiny" in names:
        return [Streaming("LSTM", 8, 20, 0.1), Streaming("GRU", 8, 20, 0.1)]
    if "S1" not in names:
        return []
    sizes = (16, 128) if quick else (4, 8, 16, 32, 64, 128, 256)
    return [Streaming(cell, size, 480_000, 0.3 if quick else 3.0) for cell, size in product(("LSTM", "GRU"), sizes)]


@dataclass(frozen=True)
class Remembered:
    """One training step whose peak of memory is measured, in a process of its own."""

    cell: str
    T: int
    B: int
    H: int
    path: str


MEMORY_PATHS = ("torch.nn", "store", "recompute", "sqrt")


def memories(names: list[str], quick: bool) -> list[Remembered]:
    """M1, and its tiny form."""
    if "tiny" in names:
        return [Remembered("LSTM", 50, 2, 8, "store")]
    if "M1" not in names:
        return []
    lengths = (1000,) if quick else (1000, 10_000)
    kinds = ("LSTM",) if quick else ("LSTM", "GRU")
    return [Remembered(cell, T, 8, 256, path) for cell, T, path in product(kinds, lengths, MEMORY_PATHS)]
