"""A run as JSON, as a page, as pictures, and as a few lines.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bars
import pictures
from bars import fastest_peer, ratio, share
from machine import busy
from recurra.files import replacing

Record = dict[str, Any]
Row = dict[str, Any]

WAYS = ("recurra", "recurra.nn", "torch.nn", "eager", "torch.compile", "JAX scan")
STREAMS = ("recurra", "torch.nn cell", "ONNX Runtime")


def number(value: float | None, digits: int = 3) -> str:
    """Three digits that count, without an exponent."""
    if value is None:
        return "-"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}"


def summary(kind: str, found: Row, limits: list[Row]) -> str:
    """One measurement in a line."""
    if kind == "limits":
        return f"{found['flops'] / 1e9:.0f} GFLOP/s, {found['copied'] / 1e9:.0f} GB/s"
    reasons = [f"{way} {word}: {why}" for word in ("wrong", "refused") for way, why in reasons_of(found, word).items()]
    if kind == "points":
        value, part = ratio(found), share(found, limits)
        told = [f"{way} {number(ms)} ms" for way, ms in found["milliseconds"].items()]
        if value:
            told.append(f"{number(value)} times the fastest peer")
        if part is not None:
            told.append(f"{100 * part:.0f} % of the limit")
    elif kind == "streams":
        told = [f"{way} {each['p50']:,.0f} ns" for way, each in found["nanoseconds"].items()]
    else:
        told = [f"{found['bytes'] / 1e6:,.1f} MB, {number(found['milliseconds'])} ms"] if "bytes" in found else []
    return ", ".join(told + reasons)


def reasons_of(found: Row, word: str) -> dict[str, str]:
    """Why ways have no figure: ``wrong`` or ``refused``."""
    value = found.get(word, {})
    return {found["path"]: value} if isinstance(value, str) else value


def disagreements(record: Record) -> list[str]:
    """Every way whose numbers were wrong."""
    return [
        f"{what(row)}: {way}: {why}"
        for kind in ("points", "streams", "memory")
        for row in record[kind]
        for way, why in reasons_of(row, "wrong").items()
    ]


def what(row: Row) -> str:
    if "grid" in row:
        return bars.name(row)
    return f"{row['cell']} H{row['size']}" if "size" in row else f"{row['cell']} B{row['B']} T{row['T']} H{row['H']}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def bars_table(record: Record) -> str:
    word = {True: "PASS", False: "FAIL", None: "not measured"}
    rows = [[bar["aim"], word[bar["passed"]], bar["worst"]] for bar in record["bars"]]
    lines = [["bar", "", "worst point"], ["---", "---", "---"], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def training_table(rows: list[Row], limits: list[Row]) -> str:
    ways = [way for way in WAYS if any(way in row["milliseconds"] for row in rows)]
    lines = []
    for row in rows:
        part, value = share(row, limits), ratio(row)
        times = [number(row["milliseconds"].get(way)) for way in ways]
        lines.append(
            [bars.name(row), *times, fastest_peer(row) or "-", number(value), "-" if part is None else f"{part:.0%}"]
        )
    return table(["ms", *ways, "fastest peer", "ratio", "share"], lines)


def streaming_table(rows: list[Row]) -> str:
    def cell(row: Row, way: str) -> str:
        found = row["nanoseconds"].get(way)
        return f"{found['p50']:,.0f} / {found['p99']:,.0f}" if found else "-"

    return table(
        ["ns a step, p50 / p99", *STREAMS],
        [[f"{row['cell']} H{row['size']}", *(cell(row, way) for way in STREAMS)] for row in rows],
    )


def memory_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        peak = f"{row['bytes'] / 1e6:,.1f}" if "bytes" in row else "-"
        lines.append([what(row), row["path"], peak, number(row.get("milliseconds"))])
    return table(["step", "path", "peak, MB", "ms"], lines)


def page(record: Record, drawn: list[str]) -> str:
    """The run as Markdown; ``drawn`` are the file names of its pictures."""
    machine = record["machine"]
    other = f"; {busy(machine)}" if busy(machine) else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# Speed{' (quick)' if record['quick'] else ''}\n",
        f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['features']) or 'no vector features'}, "
        f"{machine['system']}; {versions}. recurra's backend: {record['backend']}. "
        f"{'One run' if record['complete'] else 'An interrupted run'} of {record['minutes']} minutes{other}.\n",
        "A training step is the forward pass and the gradients to the input and to every weight, float32; all ways "
        "start from the same weights and agree with a float64 oracle to "
        "1e-4 of the largest number of each result, or have no figure. Medians of turns taken one after another. "
        "*ratio*: time of the fastest peer over that of recurra, above 1 recurra is faster. *share*: necessary "
        "operations (6 B T for each weight of a product) over time and the measured limit of fused multiply-adds.\n",
    ]
    if record["bars"]:
        parts += ["## Bars\n", "On the largest number of threads.\n", bars_table(record)]
    parts += [f"![{name}]({name})\n" for name in drawn]
    for limit in record["limits"]:
        threads = limit["threads"]
        parts.append(f"## Threads: {threads}\n")
        parts.append(f"Limit {limit['flops'] / 1e9:.0f} GFLOP/s, copies {limit['copied'] / 1e9:.0f} GB/s.\n")
        rows = [row for row in record["points"] if row["threads"] == threads]
        for name in dict.fromkeys(row["grid"] for row in rows):
            part = [row for row in rows if row["grid"] == name]
            parts += [f"### {name}\n", training_table(part, record["limits"])]
        streamed = [row for row in record["streams"] if row["threads"] == threads]
        if streamed:
            parts += ["### Streaming\n", streaming_table(streamed)]
    if record["memory"]:
        parts += ["## Memory\n", "By how much the process grew.\n", memory_table(record["memory"])]
    parts += without_figures(record)
    return "\n".join(parts)


def without_figures(record: Record) -> list[str]:
    """What has none, and why; the same reason once."""
    lines: dict[str, list[str]] = {}
    for kind in ("points", "streams", "memory"):
        for row in record[kind]:
            for word in ("wrong", "refused"):
                for way, why in reasons_of(row, word).items():
                    lines.setdefault(f"{way}: {word}: {why}", []).append(what(row))
    for each in record["failed"]:
        lines.setdefault(each["why"], []).append(each["what"])
    if record["left_out"]:
        lines["more operations than a run takes up"] = [bars.name(row) for row in record["left_out"]]
    if not lines:
        return []
    told = [f"- {why}: {', '.join(dict.fromkeys(places))}\n" for why, places in lines.items()]
    return ["## Without a figure\n", "".join(told)]


def scoreboard(record: Record) -> str:
    """What docs/scoreboard.md shows of the run that is kept."""
    machine = record["machine"]
    other = f"; {busy(machine)}" if busy(machine) else ""
    lines = []
    for limit in record["limits"]:
        rows = [row for row in record["points"] if row["threads"] == limit["threads"]]
        for cell in dict.fromkeys(row["cell"] for row in rows):
            part = [row for row in rows if row["cell"] == cell]
            means = [bars.mean_ratio(part, way) for way in (None, "torch.nn", "eager", "JAX scan")]
            shares = [found for row in part if (found := share(row, record["limits"])) is not None]
            best = f"{max(shares):.0%}" if shares else "-"
            lines.append([cell, str(limit["threads"]), *(number(mean) for mean in means), best, str(len(part))])
    head = ["cell", "threads", "fastest peer", "torch.nn", "eager", "JAX scan", "best share of the limit", "points"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}, "
        f"backend {record['backend']}{other}:\n\n{table(head, lines)}\n{bars_table(record)}"
    )


def verdict(record: Record) -> str:
    """The last lines of a run."""
    word = {True: "PASS", False: "FAIL", None: "  - "}
    lines = [f"{word[bar['passed']]}  {bar['aim']}: {bar['worst']}" for bar in record["bars"]]
    lines += [f"WRONG  {each}" for each in disagreements(record)]
    lines += [f"FAILED  {each['what']}: {each['why']}" for each in record["failed"]]
    return "\n".join(lines)


def save(path: Path, text: str) -> None:
    with replacing(path) as handle:
        handle.write(text.encode())


def write(record: Record, path: Path) -> None:
    """``path`` and, beside it, the page and the pictures with the same stem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, json.dumps(record, indent=1) + "\n")
    drawn = []
    for name, svg in pictures.draw(record).items():
        drawn.append(f"{path.stem}-{name}.svg")
        save(path.with_name(drawn[-1]), svg)
    save(path.with_suffix(".md"), page(record, drawn))


if __name__ == "__main__":
    print(scoreboard(json.loads(Path(sys.argv[1]).read_text())))
