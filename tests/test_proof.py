"""The reference loop against the oracle: every cell, odd sizes, lengths, resets, direction, precision.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import pytest

from agreement import check_float32, check_oracle, draw
from catalogue import CATALOGUE

# Every two of T (1, 2, 63), H (1, 7, 100) and B (0, 1, 5) meet at least once: T, B, inputs, H, options.
SIZES = [
    (1, 0, 5, 1, "state"),
    (1, 1, 3, 7, "lengths reverse"),
    (1, 5, 7, 100, "state resets"),
    (2, 1, 5, 1, "state lengths resets"),
    (2, 5, 3, 7, "state"),
    (2, 0, 7, 100, "lengths reverse"),
    (63, 5, 5, 1, "lengths reverse"),
    (63, 0, 3, 7, "state resets"),
    (63, 1, 5, 100, "state"),
    (63, 5, 3, 7, "state lengths resets reverse"),
    (2, 5, 3, 100, "lengths resets"),
]


@pytest.mark.parametrize(("T", "B", "inputs", "H", "options"), SIZES)
@pytest.mark.parametrize("entry", CATALOGUE, ids=str)
def test_the_loop_agrees_with_the_published_equations(entry, T, B, inputs, H, options):
    case = draw(entry, T, B, inputs, H, *options.split())
    expected = check_oracle(case)
    check_float32(case, expected)
