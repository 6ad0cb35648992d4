"""The floors of the house: who may import whom, what importing costs, and what no file may hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import recurra

SOURCE = Path(recurra.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

FOUNDATION = {"cell", "errors", "taps", "cells", "explanation", "unroll"}
LIBRARY = FOUNDATION | {"shapes", "attention", "decoding", "stream", "nn", "compiler", "inspect"}

# For each room, what it may import. "cells" stands for the file or the folder, whichever there is.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "taps": {"errors"},
    "cell": {"errors", "taps"},
    "cells": {"cell", "errors", "taps"},
    "explanation": {"errors"},
    "unroll": {"cell", "errors", "explanation", "taps"},
    "compiler": {"cell", "errors", "files", "taps"},
    "shapes": FOUNDATION | {"attention"},
    "attention": FOUNDATION,
    "decoding": FOUNDATION | {"stream", "shapes", "attention"},
    "stream": {"cell", "compiler", "errors", "explanation", "unroll"},
    "nn": FOUNDATION,
    "inspect": LIBRARY,
    "export": LIBRARY,
    "data": {"cell", "errors", "files"},
    "training": LIBRARY | {"data", "files"},
    "tasks": LIBRARY | {"data", "files", "training"},
    "serving": LIBRARY | {"data", "training", "tasks", "export"},
    "cli": LIBRARY | {"data", "training", "tasks", "serving", "export"},
    "__main__": {"cli"},
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """The dotted names that code imports, at the top, inside functions, or through import_module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def rooms_in(names: set[str]) -> set[str]:
    """The rooms of the house among dotted names; a name of the front door counts as the room it is from."""
    rooms = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "recurra" and len(parts) > 1 and parts[1] != "__version__":
            home = getattr(recurra, "_homes", {}).get(parts[1], f"recurra.{parts[1]}")
            rooms.add(home.split(".")[1])
    return rooms


def forbidden(path: Path, source: str) -> set[str]:
    """The rooms that a file imports and must not."""
    room = room_of(path)
    package = ("recurra", *path.relative_to(SOURCE).parent.parts)
    tree = ast.parse(source)
    if room == "unroll":
        # The one door to the compiler.
        door = "choose_backend"
        tree.body = [node for node in tree.body if getattr(node, "name", None) != door]
    return rooms_in(imports(tree, package)) - MAY_IMPORT[room] - {room}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_room_stands_on_its_own_floor(path):
    if room_of(path) == "__init__":
        assert rooms_in(imports(ast.parse(path.read_text()), ("recurra",))) == set()
        return
    assert room_of(path) in MAY_IMPORT, "a new room: say in MAY_IMPORT what it may import"
    assert forbidden(path, path.read_text()) == set()


def test_nothing_but_the_command_line_imports_it_and_nothing_but_that_serves():
    assert [room for room, allowed in MAY_IMPORT.items() if "cli" in allowed] == ["__main__"]
    assert [room for room, allowed in MAY_IMPORT.items() if "serving" in allowed] == ["cli"]
    assert not MAY_IMPORT["training"] & {"tasks", "cli", "serving"}
    assert not MAY_IMPORT["data"] & {"tasks", "training"}


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("cell.py", "import recurra.unroll", {"unroll"}),
        ("cell.py", "from recurra import errors, Recurrent", {"unroll"}),
        ("cell.py", "def f():\n    from recurra.cells import LSTM", {"cells"}),
        ("cell.py", "from .unroll import loop", {"unroll"}),
        ("cells/gru.py", "from ..unroll import loop", {"unroll"}),
        ("cells/gru.py", "from .initial import initialise\nfrom ..cell import Cell", set()),
        ("unroll.py", "from recurra.compiler import build", {"compiler"}),
        ("unroll.py", "def choose_backend(asked):\n    from recurra.compiler import build", set()),
        ("unroll.py", "def another(asked):\n    from recurra.compiler import build", {"compiler"}),
        ("training/loop.py", "import importlib\nimportlib.import_module('recurra.tasks.text')", {"tasks"}),
        ("tasks/text.py", "from recurra.cli import main", {"cli"}),
        ("data/text.py", "from recurra import __version__", set()),
    ],
)
def test_the_test_of_floors_can_tell(file, source, expected):
    assert forbidden(SOURCE / file, source) == expected


# --- what importing costs ---


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has after it."""
    code = f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return set(run.stdout.split())


def test_importing_the_front_door_imports_nothing_else():
    got = imported_by("import recurra; dir(recurra); recurra.__version__")
    assert {name for name in got if name.split(".")[0] == "recurra"} == {"recurra"}
    assert not {name.split(".")[0] for name in got} & {"torch", "numpy"}


@pytest.mark.parametrize("module", ["errors", "files", "cli", "training.config", "data.files"])
def test_what_must_start_fast_does_not_import_torch(module):
    assert "torch" not in imported_by(f"import recurra.{module}")


def test_the_test_of_imports_can_tell():
    assert "torch" in imported_by("from recurra import Recurrent")


def test_importing_draws_no_random_number_and_sets_nothing():
    code = (
        "import torch, random; torch.manual_seed(1); random.seed(1); "
        "before = (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), "
        "torch.get_num_threads(), torch.is_grad_enabled()); "
        "import recurra; recurra.Cell, recurra.Recurrent, recurra.Stream, recurra.cells, recurra.nn; "
        "after = (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), "
        "torch.get_num_threads(), torch.is_grad_enabled()); "
        "assert before == after"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# --- the front door ---


def test_the_front_door_has_few_names():
    assert len(recurra.__all__) == len(set(recurra.__all__)) <= 16
    assert set(recurra.__all__) <= set(dir(recurra))


@pytest.mark.parametrize("name", recurra.__all__)
def test_every_name_of_the_front_door_opens(name):
    assert getattr(recurra, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error_with_the_known_ones():
    with pytest.raises(AttributeError, match="has no attribute 'recurent': known are Cell, State"):
        _ = recurra.recurent


# --- what no file may hold ---


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system"}
MENTIONS = {
    ast.Attribute: {"torch.load", "torch.package", "torch.jit.load", "torch.hub.load"},
    ast.keyword: {"allow_pickle=True", "shell=True"},
}


def dangers(source: str) -> list[str]:
    """Code that runs what was read from a file, or could."""
    tree = ast.parse(source)
    found = [name for name in imports(tree, ("recurra",)) if name.split(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append(ast.unparse(node.func))
        elif type(node) in MENTIONS and ast.unparse(node) in MENTIONS[type(node)]:
            found.append(ast.unparse(node))
    return sorted(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_runs_what_it_reads(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval('1')",
        "exec('x = 1')",
        "import torch\ntorch.load('x')",
        "import torch\nload = torch.load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_the_test_of_dangers_can_tell(source):
    assert dangers(source)


def test_the_test_of_dangers_lets_pass_what_is_harmless():
    assert not dangers("import re\nre.compile('x')\nmodel.eval()\nnp.load(file, allow_pickle=False)")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
