"""The benchmark of speed: it runs, refuses a wrong path, and keeps what an interrupted run has.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bars
import limit
import memory
import report
import speed
from clock import in_turn, one_by_one
from grid import BUDGET, GRIDS, OWN, STANDARD, Point, points, tiny
from lines import Gone, Process
from measure import TOLERANCE, difference, measure
from peers import Task, eager, library, oracle, over_time

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "speed.json"
POINT = Point("tiny", "GRU", 5, 3, 4, 6)


@pytest.fixture
def alone(monkeypatch):
    """Without JAX and ONNX Runtime, whether they are there or not."""
    monkeypatch.setenv("PEERS_PYTHON", str(ROOT / "nowhere"))


# A whole run


def run(path: Path, *more: str) -> int:
    return speed.main(["--quick", "--grid", "tiny", "--threads", "1", "--seconds", "0.001", "--json", str(path), *more])


def test_a_run_measures_every_cell_and_writes_figures_and_a_page(alone, tmp_path, capsys):
    assert run(tmp_path / "tiny.json", "--backend", "compiled") == 0
    record = json.loads((tmp_path / "tiny.json").read_text())
    assert record["complete"]
    assert record["failed"] == []
    assert [bars.name(row) for row in record["points"]] == [str(point) for point in tiny()]
    for row in record["points"]:
        expected = {"recurra", "eager"} | ({"torch.nn"} if row["cell"] in STANDARD else set())
        assert set(row["milliseconds"]) == set(row["largest_difference"]) == expected
        assert min(row["milliseconds"].values()) > 0
        assert max(row["largest_difference"].values()) < 1e-5
        assert row["wrong"] == {}
        assert "make peers" in row["refused"]["JAX scan"]
    assert {row["cell"] for row in record["streams"]} == {"LSTM", "GRU"}
    assert all(
        row["nanoseconds"]["recurra"]["p99"] >= row["nanoseconds"]["recurra"]["p50"] for row in record["streams"]
    )
    assert {row["path"] for row in record["memory"]} == {"store"}
    assert all(row["bytes"] >= 0 for row in record["memory"])
    page = (tmp_path / "tiny.md").read_text()
    assert page == report.page(record, [])
    for row in record["points"]:
        assert f"| {bars.name(row)} | {report.number(row['milliseconds']['recurra'])} |" in page
    told = capsys.readouterr()
    assert told.out == report.verdict(record) + "\n"
    assert f"/11 {tiny()[0]}, threads: 1: recurra " in told.err


@pytest.mark.skipif(not memory.REFERENCES.exists(), reason="the peak of a single step is counted on Linux")
def test_a_step_grows_by_its_peak_and_never_by_less_than_nothing(monkeypatch):
    passing = SimpleNamespace(step=lambda: torch.ones(16_000_000).sum())
    passing.step()  # what PyTorch loads at a first call is not the step's
    assert memory.grown(passing) == pytest.approx(64e6, rel=0.05)
    monkeypatch.setattr(memory, "resident", {"VmRSS": 8192, "VmHWM": 4096}.__getitem__)
    assert memory.grown(passing) == 0


def test_nothing_in_the_figures_tells_whose_machine_it_was():
    record = json.dumps(speed.describe())
    assert not re.search(rf"\b{re.escape(platform.node())}\b", record)
    assert str(ROOT) not in record


WRONG_WORKER = """
import sys
sys.path.insert(0, {folder!r})
import peers, worker

honest = peers.over_time

def exchanged(task, **options):
    [layer] = task.weights
    r, z, n = layer["weight_hh"].chunk(3)
    weights = [{{**layer, "weight_hh": peers.torch.cat([z, r, n])}}]
    return honest(peers.Task(task.point, weights, task.x, task.r), **options)

peers.over_time = exchanged
worker.main()
"""


def test_a_wrong_path_gets_no_figure_and_the_run_ends_with_one(alone, tmp_path, monkeypatch, capsys):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG_WORKER.format(folder=str(ROOT / "benchmarks")))
    monkeypatch.setattr(speed, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(speed.grid, "tiny", lambda: [POINT])
    monkeypatch.setattr(speed.grid, "streams", lambda *_: [])
    monkeypatch.setattr(speed.grid, "memories", lambda *_: [])
    assert run(tmp_path / "wrong.json", "--backend", "loop") == 1
    [row] = json.loads((tmp_path / "wrong.json").read_text())["points"]
    assert set(row["wrong"]) == {"recurra"}
    assert "recurra" not in row["milliseconds"]
    assert f"WRONG  {POINT}: recurra: " in capsys.readouterr().out
    assert f"recurra: wrong: {row['wrong']['recurra']}: {POINT}" in (tmp_path / "wrong.md").read_text()


def test_a_worker_that_dies_is_told_and_the_run_ends_with_one(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "WORKER", [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(7)"])
    assert run(tmp_path / "dead.json") == 1
    record = json.loads((tmp_path / "dead.json").read_text())
    assert record["points"] == []
    assert {each["why"] for each in record["failed"]} == {"the process ended with 7"}


def test_ctrl_c_keeps_what_there_is(tmp_path):
    path = tmp_path / "cut.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--grid", "tiny", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--seconds", "0.5", "--backend", "loop", "--json", str(path)],
        env={**os.environ, "PEERS_PYTHON": str(ROOT / "nowhere")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("2/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in out + err
    record = json.loads(path.read_text())
    assert not record["complete"]
    assert [bars.name(row) for row in record["points"]] == [str(tiny()[0])]
    assert "An interrupted run" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("wrong", [["--grid", "C1,C9"], ["--threads", "0"], ["--threads", "two"], ["--json"]])
def test_wrong_arguments_end_with_two(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        speed.main(wrong)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_part_of_the_grid_does_not_take_the_place_of_the_kept_run():
    assert speed.read([]).json == KEPT
    assert speed.read(["--quick"]).json != KEPT
    assert speed.read(["--grid", "C1"]).json != KEPT
    assert speed.read(["--backend", "hoisted"]).json != KEPT


# Agreement


class Altered:
    """A way whose results are changed by ``change``."""

    def __init__(self, change):
        self.peer, self.change, self.timed = library(Task.of(POINT)), change, 0

    def first(self):
        results = self.peer.first()
        self.change(results)
        return results

    def run(self, count):
        self.timed += count
        return self.peer.run(count)


def scale(name, factor):
    return lambda results: results[name].mul_(factor)


CHANGES = {
    "y": scale("y", 1.001),
    "into x": scale("x", -1.0),
    "bias": scale("0.bias", 0.999),
    "bias of n": scale("0.bias_hn", 1.01),
    "one number": lambda results: results["0.weight_ih"][0, 0].add_(0.01 * results["0.weight_ih"].abs().max()),
    "NaN": lambda results: results["0.weight_hh"][1, 1].fill_(float("nan")),
    "missing": lambda results: results.pop("0.bias"),
    "shape": lambda results: results.update(y=results["y"][:1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_disagrees_is_not_timed(change):
    wrong = Altered(change)
    row = measure(Task.of(POINT), {"honest": lambda: Altered(lambda _: None), "wrong": lambda: wrong}, 0.001, 1)
    assert set(row["wrong"]) == {"wrong"}
    assert set(row["milliseconds"]) == {"honest"}
    assert wrong.timed == 0


def test_rounding_is_no_disagreement():
    row = measure(Task.of(POINT), {"near": lambda: Altered(scale("y", 1 + 1e-6))}, 0.001, 1)
    assert row["wrong"] == {}


@pytest.mark.parametrize("point", tiny(), ids=str)
def test_the_ways_of_this_process_agree_in_float64(point):
    task = Task.of(point)
    truth = oracle(task)
    ways = [over_time(task, torch.float64, backend="loop"), eager(task, torch.float64)]
    ways += [library(task, dtype=torch.float64)] if point.cell in STANDARD else []
    for way in ways:
        found = way.first()
        assert found.keys() == truth.keys()
        assert max(difference(found[name], truth[name]) for name in truth) < 1e-12 < TOLERANCE


# Arithmetic


def test_operations_are_those_of_the_products():
    assert Point("C1", "LSTM", 7, 5, 3, 11).flops == 6 * 7 * 5 * (44 * 3 + 44 * 11)
    assert Point("C1", "vanilla", 7, 5, 3, 11, 2).flops == 6 * 7 * 5 * (11 * 3 + 11 * 11 + 2 * 11 * 11)
    weights = Task.of(Point("C1", "own gated", 1, 1, 3, 11)).weights[0]
    assert Point("C1", "own gated", 1, 1, 3, 11).flops == 6 * sum(w.numel() for w in weights.values() if w.dim() == 2)


def test_the_grid_is_the_whole_one():
    taken, left_out = points(list(GRIDS), quick=False)
    both = taken + left_out
    assert len({point for point in both if point.grid == "C2"}) == 5 * 4 * 2 * 5
    assert {point.cell for point in both if point.grid == "C3"} == {*STANDARD, *OWN}
    assert all(point.flops <= BUDGET for point in taken)
    assert all(point.flops > BUDGET for point in left_out)
    assert len(left_out) < len(both) / 5
    quick, _ = points(list(GRIDS), quick=True)
    assert {point.cell for point in quick} == {*STANDARD, *OWN}
    assert {point.grid for point in quick} == {"C1", "C2", "C3", "chained"}


def test_the_kernel_of_the_limit_computes_and_is_timed(monkeypatch):
    monkeypatch.setattr(limit, "ROUNDS", 1000)
    assert limit.fma_limit(2, repeats=1) > 0
    honest = limit.assembly
    monkeypatch.setattr(limit, "assembly", lambda width: honest(width).replace("%s10, %n11", "%s10, %s10"))
    with pytest.raises(ArithmeticError):
        limit.fma_limit(1, repeats=1)


def test_of_two_limits_the_higher_counts():
    rows = []
    for flops, copied in ((5.0, 9.0), (8.0, 2.0)):
        speed.keep(rows, "limits", {"threads": 2, "flops": flops, "copied": copied})
    assert rows == [{"threads": 2, "flops": 8.0, "copied": 9.0}]


def test_turns_are_taken_one_after_another():
    order = []

    def taker(name, seconds):
        def run(count):
            order.append((name, count))
            return [seconds] * count

        return run

    found = in_turn({"a": taker("a", 0.01), "b": taker("b", 1.0)}, seconds=0.06, rounds=3)
    assert order == [("a", 1), ("b", 1), *[("a", 3), ("b", 1)] * 3]
    assert {name: len(times) for name, times in found.items()} == {"a": 6, "b": 3}
    assert len(in_turn({"b": taker("b", 1.0)}, seconds=0.06, rounds=5)["b"]) == 3
    assert len(in_turn({"b": taker("b", 1.0)}, seconds=0.6, rounds=5)["b"]) == 5


def test_single_steps_are_counted_and_bounded():
    pushed = []
    found = one_by_one(pushed.append, [1, 2, 3], steps=7, seconds=10.0)
    assert pushed == [1, 2, 3] * 3
    assert found["steps"] == 9
    assert 0 < found["p50"] <= found["p99"]
    assert one_by_one(pushed.append, [1, 2, 3], steps=10**9, seconds=0.01)["steps"] < 10**9


def test_a_process_answers_and_its_end_is_an_error():
    code = "from lines import serve\nserve(lambda request: print('talk') or {'twice': 2 * request['of']})"
    process = Process([sys.executable, "-c", code], {"PYTHONPATH": str(ROOT / "benchmarks")})
    assert process.ask({"of": 21}) == {"twice": 42}
    with pytest.raises(Gone, match="ended with 1"):
        process.ask({"off": 1})
    process.close()
