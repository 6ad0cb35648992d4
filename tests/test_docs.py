"""The words of the project are true: code blocks, commands, tables, links and examples.

A ```python block is run, and what it prints must be the ```text block after it, if there is one. In a
```console block each line after ``$`` is a command: it is parsed, run where that is cheap, and the output shown
must be what it prints, numbers aside.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cyclopts import CycloptsError

from recurra import cells
from recurra.cell import Cell
from recurra.cli import run as recurra_command
from recurra.cli.app import app
from recurra.tasks.language_config import LanguageConfig
from recurra.training.config import Setting, settings
from test_floors import FILES, SOURCE, imports, room_of, rooms_in

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    kind: str
    line: int
    text: str


class Command(NamedTuple):
    line: str
    output: list[str]


def blocks(page: Path) -> list[Block]:
    found, begun = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if begun is None and (fence := re.fullmatch(r"```(\w*)", line)):
            begun = (fence[1], number + 1, [])
        elif begun is not None and line == "```":
            found.append(Block(begun[0], begun[1], "\n".join(begun[2]) + "\n"))
            begun = None
        elif begun is not None:
            begun[2].append(line)
    assert begun is None, f"{page.name}: a block is never closed"
    return found


def commands(block: Block) -> list[Command]:
    found: list[Command] = []
    for line in block.text.splitlines():
        if block.kind == "sh":
            found.append(Command(line.partition(" #")[0].strip(), []))
        elif line.startswith("$ "):
            found.append(Command(line[2:], []))
        else:
            found[-1].output.append(line)
    return found


# Python


def run_python(page: Path, block: Block, shared: dict) -> str:
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, shared)
    return printed.getvalue()


# Commands. Training is cut short by the environment; what the page shows was printed by whole runs.

SHORT = {"RECURRA_UPDATES": "6", "RECURRA_HIDDEN_SIZE": "16", "RECURRA_EMBEDDING_SIZE": "8"}
SHOWN = ("train", "resume", "evaluate", "info")


class Shell:
    """Runs the commands of one page, in this process where they are recurra's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.chdir(folder)
        license = (ROOT / "LICENSE").read_text()
        folder.joinpath("texts").mkdir()
        for name in ("corpus.txt", "other.txt", "texts/one.txt", "texts/two.txt"):
            folder.joinpath(name).write_text(license)

    def run(self, command: Command) -> None:
        words = list(shlex.shlex(command.line, posix=True, punctuation_chars="|>"))
        typed, target = b"", None
        if ">" in words:
            words, target = words[: words.index(">")], words[-1]
        if "|" in words:
            before, words = words[: words.index("|")], words[words.index("|") + 1 :]
            typed = subprocess.run(before, cwd=self.folder, check=True, capture_output=True).stdout
        environment = dict(SHORT)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        program, *arguments = words
        assert hasattr(self, f"_{program}"), f"there is no way to check {command.line}"
        printed = getattr(self, f"_{program}")(arguments, typed, environment, command)
        if target is not None:
            self.folder.joinpath(target).write_text(printed)

    def _recurra(self, arguments: list[str], typed: bytes, environment: dict, command: Command) -> str:
        mistake = any(line.startswith("recurra: error:") for line in command.output)
        if not mistake:
            parse(arguments)
        if arguments[0] in ("demo", "env"):
            return ""
        out, err = io.StringIO(), io.StringIO()
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
            for name, value in environment.items():
                patch.setenv(name, value)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = recurra_command(arguments)
        printed = out.getvalue() + err.getvalue()
        assert (code != 0) == mistake, f"{command.line} ended with {code}: {printed}"
        if arguments[0] in SHOWN and "^C" not in command.output:
            missing = [line for line in command.output if line != "..." and form(line) not in forms(printed)]
            assert not missing, f"{command.line} does not print {missing}, but: {printed}"
        return out.getvalue()

    def _python(self, arguments: list[str], *_: object) -> str:
        assert arguments[0] == "-c"
        result = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
        assert not result.stderr
        return result.stdout

    def _torchrun(self, arguments: list[str], *_: object) -> str:
        # Run by test_processes.py; here only parsed.
        at = arguments.index("-m")
        assert arguments[at + 1] == "recurra"
        arguments = arguments[at + 2 :]
        parse(arguments)
        if arguments[0] == "train":
            assert recurra_command([*arguments, "--print-config"]) == 0
        return ""

    def _make(self, arguments: list[str], *_: object) -> str:
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
        return ""

    def _pip(self, arguments: list[str], *_: object) -> str:
        assert arguments[:2] == ["install", "-e"]
        extras = re.fullmatch(r"\.(?:\[(.*)\])?", arguments[2])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extras
        assert set((extras[1] or "text").split(",")) <= set(project["optional-dependencies"])
        return ""

    def _tensorboard(self, *_: object) -> str:
        return ""


def parse(arguments: list[str]) -> None:
    try:
        app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as problem:
        raise AssertionError(f"recurra {shlex.join(arguments)}: {problem}") from problem


def form(line: str) -> str:
    """A line without what differs from run to run: numbers, times, and the spaces that make room for them."""
    line = re.sub(r"\d+ min \d\d s", "0 s", line)
    line = re.sub(r"\d[\d,.]*(e-?\d+)?(?<!\.)", "0", line)
    return re.sub(r"[ \t]+", " ", line).strip()


def forms(text: str) -> set[str]:
    return {form(line) for line in text.splitlines()}


@every_page
def test_code_and_commands_do_what_the_page_says(page, tmp_path, monkeypatch):
    shell, shared = Shell(tmp_path, monkeypatch), {"__name__": page.stem}
    printed = None
    for block in blocks(page):
        if block.kind == "python":
            printed = run_python(page, block, shared)
        elif block.kind == "text":
            assert printed == block.text, f"{page.name}, line {block.line}"
        else:
            for command in commands(block):
                shell.run(command)


@pytest.mark.parametrize(
    "wrong",
    [
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nassert False\n```\n",
        "```console\n$ recurra trian language corpus.txt\n```\n",
        "```console\n$ recurra sample nowhere --heat 3\n```\n",
        "```console\n$ recurra sample nowhere\n```\n",
        "```console\n$ recurra train language nowhere.txt\nrecurra: error: there is no text\n```\n",
        "```console\n$ torchrun --nproc-per-node 2 -m recurra train language a.txt --cells 3\n```\n",
        "```sh\nmake everything\n```\n",
        "```sh\npip install -e '.[all]'\n```\n",
        "```console\n$ rm -r runs\n```\n",
        "```python\n",
    ],
)
def test_a_page_that_is_wrong_is_noticed(wrong, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(wrong)
    with pytest.raises(AssertionError):
        test_code_and_commands_do_what_the_page_says(page, tmp_path, monkeypatch)


def test_only_numbers_and_spaces_may_differ_from_what_a_page_shows():
    assert form("update 410: loss 1.6949  best") == form("update 7:  loss 4.2  best")
    assert form("Trained for 48 s.") == form("Trained for 1 min 05 s.")
    assert form("update 410: loss 1.6949  best") != form("update 410: loss 1.6949  worst")


# Tables


def settings_table() -> str:
    """The table of docs/training.md."""
    lines = ["| section | setting | default | values | |", "| --- | --- | --- | --- | --- |"]
    for each in settings(LanguageConfig).values():
        default = "none" if each.default is None else str(each.default).lower()
        lines.append(f"| {each.section} | `{each.name}` | {default} | {_values(each)} | {each.help} |")
    return "\n".join(lines) + "\n"


def _values(each: Setting) -> str:
    if each.limits["choices"]:
        return " ".join(f"`{choice}`" for choice in each.limits["choices"])
    words = {int: "whole", float: "number", bool: "true, false", str: "text"}[each.kind]
    for limit, what in (("low", "from"), ("above", "above"), ("high", "to"), ("below", "below")):
        if each.limits[limit] is not None:
            words += f" {what} {each.limits[limit]}"
    return f"{words}, or none" if each.optional else words


def test_the_table_of_settings_is_complete():
    assert settings_table() in (ROOT / "docs" / "training.md").read_text(), f"it should be:\n{settings_table()}"


def test_the_readme_names_every_command_and_cell():
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"recurra (?:train )?(\w+)", " ".join(readme.split())))
    known = {name for part in (app, app["train"]) for name in part if not name.startswith("-")} - {"train"}
    assert known <= named
    assert {"language", "sample", "resume"} <= known
    listed = set(re.findall(r"`(\w+)`", readme.partition("## Cells and wrappers")[2].partition("## ")[0]))
    assert listed == {name for name in cells.__all__ if issubclass(getattr(cells, name), Cell)}


def test_the_tree_in_the_architecture_names_every_file():
    tree = (ROOT / "docs" / "architecture.md").read_text().partition("    src/recurra/\n")[2].partition("\n\n")[0]
    room, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        room = name if name.endswith("/") else room if line.startswith(" " * 8) else ""
        if name != room:
            named.add(room + name)
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")}
    assert named == {name for name in there if not name.endswith("/__init__.py")}


def test_the_floors_in_the_architecture_are_those_of_the_source():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("| room | imports |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line) for line in text.splitlines()]
    used: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(path)
        package = ("recurra", *path.relative_to(SOURCE).parent.parts)
        used.setdefault(room, set()).update(rooms_in(imports(ast.parse(path.read_text()), package)) - {room})
    assert {row[0]: set(row[1:]) for row in rows if row} == {
        room: rooms for room, rooms in used.items() if room not in ("__init__", "__main__")
    }


def scoreboard_row(path: Path) -> str:
    """The row of docs/scoreboard.md for a result."""
    result = json.loads(path.read_text())
    training = f"{result['updates']:,} updates ({result['best_update']:,}), {result['minutes']} min"
    return (
        f"| {result['data']} | {result['validation_nats_per_character']} | {result['test_nats_per_character']} "
        f"| {result['parameters']:,} | {training}, threads: {result['threads']} | {result['seed']} "
        f"| [{path.stem}](../benchmarks/results/{path.name}) |\n"
    )


def test_every_result_of_training_has_its_row_on_the_scoreboard():
    scoreboard = (ROOT / "docs" / "scoreboard.md").read_text()
    for path in sorted(ROOT.glob("benchmarks/results/*.json")):
        if "test_nats_per_character" in path.read_text():
            assert scoreboard_row(path) in scoreboard, f"it should have the row:\n{scoreboard_row(path)}"


# Links


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> Iterator[str]:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link
    for path in re.findall(r"`((?:tests|src|docs|examples|benchmarks)/[\w/.-]+)`", text):
        if not (ROOT / path).exists():
            yield path


@every_page
def test_links_and_named_files_are_there(page):
    assert list(dead_links(page)) == []


def test_a_dead_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One Heading\n[a](#one-heading) [b](#two) [c](no.md) [d](page.md#one-heading) `tests/no.py`\n")
    assert list(dead_links(page)) == ["#two", "no.md", "tests/no.py"]


# Examples

ENDS = {
    "hello.py": r"\nhello\n$",
    "own_cell.py": r"error 0\.0\d+ of the target's variance\nshare kept at each step: \[.*0\.9\d.*\]\n$",
    "truncated.py": r"a new stream: (100\.0|9\d\.\d) % right\nwith the state forgotten at each window: [678]\d",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_reach_what_they_are_for(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(ENDS[example.name], capsys.readouterr().out)
