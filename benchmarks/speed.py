"""recurra and its peers in turn, in one run: `make bench`, or

    python benchmarks/speed.py [--quick] [--grid C1,C2,C3,chained,S1,M1] [--threads 1,2] [--json FILE] [--bars]

No figure is given for a way whose numbers do not agree with a float64 oracle. FILE gets all figures; a page
and pictures of them lie beside it. JAX and ONNX Runtime are among the peers after `make peers`.

Ends with 0 where the numbers agree, 1 where they do not or a measurement failed, 2 for wrong arguments, 130 after
Ctrl-C, which keeps what there is. The bars are reported; with --bars one that is missed is a 1, too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bars
import grid
import report
from lines import Gone, Process
from machine import busy, describe

ROOT = Path(__file__).resolve().parents[1]
WORKER = [sys.executable, str(Path(__file__).with_name("worker.py"))]
# What a full run keeps; a quick one is only looked at.
KEPT, LOOKED_AT = ROOT / "benchmarks" / "results" / "speed.json", ROOT / "build" / "bench" / "quick.json"

QUICK = {"seconds": 0.12, "rounds": 3}
FULL = {"seconds": 0.5, "rounds": 5}


class Workers:
    """The process that measures with so many threads, started where there is none."""

    def __init__(self, common: dict[str, Any]) -> None:
        self.common = common
        self._process: Process | None = None
        self._threads = 0

    def ask(self, threads: int, job: dict[str, Any], fresh: bool = False) -> dict[str, Any]:
        """What a job found. Raises Gone where the process ended instead."""
        if fresh or threads != self._threads:
            self.close()
        if self._process is None:
            # One size of block for ever: what is freed goes back to the system, and memory can be counted.
            memory = {"MALLOC_MMAP_THRESHOLD_": str(2**22)} if fresh else {}
            compile_here = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
            self._process = Process(WORKER, {"OMP_NUM_THREADS": str(threads), **memory, **compile_here})
            self._threads = threads
        try:
            return self._process.ask({**self.common, **job})
        except Gone:
            self.close()
            raise

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process, self._threads = None, 0


Job = tuple[str, str, int, dict[str, Any]]


def jobs(arguments: argparse.Namespace, points: list[grid.Point]) -> list[Job]:
    """What it is called, the list of the record that it goes to, threads, and the job, in order."""
    made: list[Job] = []
    pace = QUICK if arguments.quick else FULL
    for threads in arguments.threads:
        measure_limit: Job = (f"limit, threads: {threads}", "limits", threads, {"job": "limit"})
        made.append(measure_limit)
        for point in points:
            job = {"job": "point", "point": asdict(point), **pace}
            if arguments.seconds is not None:
                job["seconds"] = arguments.seconds
            made.append((f"{point}, threads: {threads}", "points", threads, job))
        for stream in grid.streams(arguments.grid, arguments.quick):
            job = {"job": "stream", "stream": asdict(stream)}
            made.append((f"stream {stream.cell} H{stream.size}, threads: {threads}", "streams", threads, job))
        # Again, for other work may have lowered it.
        made.append(measure_limit)
    threads = max(arguments.threads)
    for each in grid.memories(arguments.grid, arguments.quick):
        what = f"memory {each.cell} T{each.T} B{each.B} H{each.H}, {each.path}"
        made.append((what, "memory", threads, {"job": "memory", "memory": asdict(each)}))
    return made


def talk(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def workers(arguments: argparse.Namespace) -> Iterator[Workers]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Workers({"folder": folder, "backend": arguments.backend})
        try:
            yield made
        finally:
            made.close()


def measure(arguments: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Fill the record. False if it was interrupted."""
    points, left_out = grid.points(arguments.grid, arguments.quick)
    record["left_out"] = [{**asdict(point), "flops": point.flops} for point in left_out]
    todo = jobs(arguments, points)
    try:
        with workers(arguments) as process:
            for number, (what, kind, threads, job) in enumerate(todo, start=1):
                try:
                    found = process.ask(threads, job, fresh=kind == "memory")
                except Gone as problem:
                    record["failed"].append({"what": what, "why": str(problem)})
                    talk(f"{number}/{len(todo)} {what}: {problem}")
                    continue
                keep(record[kind], kind, {"threads": threads, **found})
                talk(f"{number}/{len(todo)} {what}: {report.summary(kind, found, record['limits'])}")
    except KeyboardInterrupt:
        return False
    return True


def keep(rows: list[dict[str, Any]], kind: str, found: dict[str, Any]) -> None:
    """Put what was found into its list; of the limits of as many threads, the highest."""
    for row in rows if kind == "limits" else []:
        if row["threads"] == found["threads"]:
            row.update({key: max(value, found[key]) for key, value in row.items()})
            return
    rows.append(found)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times recurra beside its peers, after checking that the numbers agree."
    )
    parser.add_argument("--quick", action="store_true", help="a thinned grid, under five minutes")
    parser.add_argument("--grid", default=",".join(grid.GRIDS), help="which of %(default)s, or tiny")
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="numbers of threads, default 1,2")
    parser.add_argument("--json", type=Path, help="where the figures go; the page and the pictures go beside it")
    parser.add_argument("--backend", default="compiled", help="recurra's backend, default %(default)s")
    parser.add_argument("--seconds", type=float, help="for each way and point")
    parser.add_argument("--bars", action="store_true", help="end with 1 where a bar is missed")
    found = parser.parse_args(arguments)
    found.grid = found.grid.split(",")
    unknown = set(found.grid) - {*grid.GRIDS, "tiny"}
    if unknown:
        parser.error(f"there is no grid {', '.join(sorted(unknown))}: known are {', '.join(grid.GRIDS)}, tiny")
    if min(found.threads) < 1:
        parser.error("expected at least 1 thread")
    if found.json is None:
        whole = not found.quick and found.grid == list(grid.GRIDS) and found.backend == "compiled"
        found.json = KEPT if whole else LOOKED_AT
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = read(argv)
    began = time.monotonic()
    record: dict[str, Any] = {
        "quick": arguments.quick,
        "backend": arguments.backend,
        "machine": describe(),
        **{kind: [] for kind in ("limits", "points", "left_out", "streams", "memory", "failed")},
    }
    if busy(record["machine"]):
        talk(f"{busy(record['machine'])}; what has several threads suffers most")
    finished = measure(arguments, record)
    record["complete"] = finished
    record["minutes"] = round((time.monotonic() - began) / 60, 1)
    record["bars"] = [asdict(bar) for bar in bars.judge(record)]
    report.write(record, arguments.json)
    print(report.verdict(record))
    if not finished:
        return 130
    missed = arguments.bars and any(bar["passed"] is False for bar in record["bars"])
    return 1 if report.disagreements(record) or record["failed"] or missed else 0


if __name__ == "__main__":
    sys.exit(main())
