"""The bars of the benchmark of speed, its pictures, and what the pages show of it.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bars
import pictures
import report
from grid import Point

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "speed.json"

# Bars


def row(cell="LSTM", B=32, T=100, H=256, grid="C2", **milliseconds):
    names = {"nn": "torch.nn", "jax": "JAX scan"}
    point = Point(grid, cell, T, B, H, H)
    times = {names.get(way, way): ms for way, ms in milliseconds.items()}
    return {**point.__dict__, "threads": 2, "flops": point.flops, "milliseconds": times}


def judged(*rows, flops=1e11, memory=()):
    record = {"points": list(rows), "limits": [{"threads": 2, "flops": flops}], "memory": list(memory)}
    return {bar.aim: bar for bar in bars.judge(record)}


def the(found, words):
    [bar] = [bar for aim, bar in found.items() if words in aim]
    return bar


def test_nothing_measured_is_neither_passed_nor_missed():
    assert {bar.passed for bar in judged().values()} == {None}


@pytest.mark.parametrize(("ours", "passed"), [(1.9, True), (2.0, True), (2.1, False)])
def test_never_slower_looks_at_the_fastest_peer(ours, passed):
    bar = the(judged(row(recurra=1.0, nn=5.0, jax=3.0), row(B=1, recurra=ours, nn=4.0, jax=2.0)), "never slower")
    assert bar.passed is passed
    assert "LSTM B1 T100 H256 (JAX scan)" in bar.worst


def test_recurra_without_a_figure_misses_its_bars():
    found = judged(row(nn=2.0), row("own gated", eager=2.0))
    for words in ("never slower", "LSTM: at least", "85 %", "5 times the eager"):
        assert the(found, words).passed is False


def test_recurra_nn_is_no_peer():
    assert bars.ratio({"milliseconds": {"recurra": 2.0, "recurra.nn": 1.0, "torch.nn": 3.0}}) == 1.5


def test_the_mean_is_geometric_and_of_each_cell():
    rows = row(recurra=1.0, nn=4.0), row(B=1, recurra=1.0, nn=1.0), row("GRU", recurra=1.0, nn=1.4)
    found = judged(*rows)
    assert the(found, "LSTM: at least").worst == "2.00 times over 2 points"
    assert the(found, "LSTM: at least").passed is True
    assert the(found, "GRU: at least").passed is False
    assert the(found, "vanilla: at least").passed is None


def test_the_share_is_of_necessary_operations_at_large_sizes():
    flops = row()["flops"]
    assert the(judged(row(recurra=1000.0), flops=flops / 0.86), "85 %").passed is True
    assert the(judged(row(recurra=1000.0), row(H=128, recurra=1e9), flops=flops / 0.84), "85 %").passed is False
    assert the(judged(row(H=128, recurra=1e9)), "85 %").passed is None
    beyond = the(judged(row(recurra=1000.0), flops=flops / 1.1), "85 %")
    assert beyond.passed is None
    assert "the limit is wrong" in beyond.worst


def test_a_cell_of_ones_own_is_held_to_the_lstm_and_to_the_eager_loop():
    lstm = row(recurra=4.0)
    assert the(judged(lstm, row("own normed", recurra=4.5)), "1.15 times").passed is True
    assert the(judged(lstm, row("own gated", recurra=3.6)), "1.15 times").passed is False
    assert the(judged(row("own gated", recurra=1.0, eager=5.0)), "5 times the eager").passed is True
    assert the(judged(row("own gated", recurra=1.1, eager=5.0)), "5 times the eager").passed is False
    assert the(judged(row("own gated", B=128, recurra=1.1, eager=5.0)), "5 times the eager").passed is None


def test_what_no_code_could_reach_is_counted_and_still_missed():
    own = row("own gated")
    at_limit = 1e3 * own["flops"] / 1e11
    bar = the(judged(row("own gated", recurra=at_limit, eager=4 * at_limit)), "5 times the eager")
    assert bar.passed is False
    assert bar.worst.endswith("1 of them beyond the machine's limit")
    bar = the(judged(row("own gated", recurra=2 * at_limit, eager=6 * at_limit)), "5 times the eager")
    assert (bar.passed, "beyond" in bar.worst) == (False, False)


def test_c1_shows_both_figures():
    bar = the(judged(row("GRU", 64, 32, 128, "C1", recurra=4.9, nn=10.0)), "C1")
    assert (bar.passed, bar.worst) == (True, "4.90 ms; torch.nn.GRU 10.00 ms")
    assert the(judged(row("GRU", 64, 32, 128, "C1", recurra=5.1, nn=10.0)), "C1").passed is False


@pytest.mark.parametrize(("path", "size", "passed"), [("store", 100, True), ("store", 101, False)])
def test_memory_is_held_to_torch_nn(path, size, passed):
    rows = [{"cell": "LSTM", "T": 9, "path": "torch.nn", "bytes": 100}]
    found = judged(memory=[*rows, {"cell": "LSTM", "T": 9, "path": path, "bytes": size}])
    assert the(found, "'store'").passed is passed
    for half, reached in ((50, True), (51, False)):
        found = judged(memory=[*rows, {"cell": "LSTM", "T": 9, "path": "recompute", "bytes": half}])
        assert the(found, "'recompute'").passed is reached


# Pages and pictures


def test_pictures_show_each_number():
    rows = [row("GRU", 1, recurra=1.0, nn=1.25), row("LSTM", 32, recurra=1.0, nn=3.75), row("LSTM", 1, nn=1.0)]
    record = {"points": rows, "limits": [{"threads": 2, "flops": 1e15}]}
    drawn = pictures.draw(record)
    texts = [each.text for each in xml.etree.ElementTree.fromstring(drawn["ratio"]).iter() if each.text]
    assert {"1.25", "3.75", "GRU", "LSTM", "T100 B32"} <= set(texts)
    assert pictures.draw(record) == drawn
    assert pictures.draw({"points": [], "limits": []}) == {}


def test_numbers_show_the_digits_that_count():
    shown = [report.number(value) for value in (None, 0.01234, 1.234, 12.34, 1234.5)]
    assert shown == ["-", "0.012", "1.23", "12.3", "1,234"]


def test_the_scoreboard_shows_the_run_that_is_kept():
    if KEPT.exists():
        text = report.scoreboard(json.loads(KEPT.read_text()))
        assert text in (ROOT / "docs" / "scoreboard.md").read_text(), f"it should have:\n{text}"
