"""Checkpoints that are whole or not there, and that notice one wrong bit.

A checkpoint is two files in one folder:

- `step-120-3f9c0a5d2b71.safetensors`, the tensors;
- `last.json`, the commit file: which tensor file, its size, the dtype, shape and digest of each tensor, the
  facts, and a digest of all that. A checkpoint exists from the moment this file is renamed into place.

Several commit files (`last`, `best`) may share one tensor file. The digests find damage; they are no
signature. Nothing that is read is executed. Only one process at a time may save into a folder; any may load.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recurra import files
from recurra.errors import CheckpointError
from recurra.training import tensor_file

_FORMAT, _VERSION = "recurra-checkpoint", 1
_COMMIT_BYTES, _COMMIT_VALUES = 8 * 2**20, 2**16
_FIELDS = {"format": str, "version": int, "tensors_file": str, "size": int, "tensors": dict, "facts": dict}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TENSORS_FILE = re.compile(r"(step-[0-9]{1,20}|tensors)-[0-9a-f]{12}\.safetensors")
_NOT_FINITE = "not-finite"


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found whole: tensors by name, on the CPU, and the facts that were saved with them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save(folder: Path, names: Sequence[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Save the tensors and facts as the checkpoints `names` of the folder; returns the tensor file.

    names: for example `("last",)` or `("last", "best")`; the tensors are written once. At every moment each
        name has its old checkpoint or this one; the names take this one in the order given.
    tensors: dense tensors of floating, integer or bool dtype, on any device. Tensors that share memory are
        written each in full.
    facts: what JSON can hold (str keys; str, int, float, bool, None, list, dict), and floats that are not
        finite, too. `facts["step"]`, if there, is a whole number and names the tensor file.

    The commit file holds at most 2**16 values in 8 MiB: about 10,000 tensors, and facts of moderate size.

    Tensor files that no commit file names, and what a killed process left of its save, are removed. Raises
    CheckpointError if a tensor or a fact cannot be kept, or the disk is full. Each name then has its old
    checkpoint still; only where the disk ran full between two names, the first has this one already.
    """
    folder = Path(folder)
    for name in names:
        _check_name(name)
    plain = tensor_file.plain(tensors)
    record = _record(plain, facts)
    files.make_folder(folder)
    _sweep(folder)
    try:
        _write_tensors(folder, record, plain)
        for name in names:
            _commit(folder, name, record)
    except BaseException:
        with contextlib.suppress(CheckpointError):
            _sweep(folder)
        raise
    _sweep(folder)
    return _tensors_path(folder, record)


def load(folder: Path, name: str = "last") -> Checkpoint:
    """The checkpoint of that name, every bit of it verified; takes no more memory than its files are large.

    Raises CheckpointError if there is no such checkpoint, or it is damaged, or `save` did not write it. The
    message names the file and the tensor, and the other checkpoints of the folder that are whole.
    """
    folder = Path(folder)
    try:
        return _load(folder, name)
    except CheckpointError as problem:
        raise CheckpointError(f"{problem}; {_advice(folder, name)}") from problem


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into the module's parameters and buffers, which stay where they are: ties stay tied.

    Names, shapes and dtypes must be those of `module.state_dict()`. Raises CheckpointError, with the module
    unchanged, listing what is missing, what is too much and what does not fit.
    """
    own = module.state_dict()
    problems = [f"missing: {name}" for name in own if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in own]
    for name in own:
        if name in tensors and _kind(own[name]) != _kind(tensors[name]):
            problems.append(f"{name} is {_kind(own[name])} here, {_kind(tensors[name])} in the checkpoint")
    problems = problems or _torn_ties(own, tensors)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"the checkpoint does not fit this {type(module).__name__}: {'; '.join(problems[:8])}{more}. "
            "Build the model with the settings that the checkpoint was trained with"
        )
    module.load_state_dict(dict(tensors))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is no name for a checkpoint: up to 64 letters, digits, '-' and '_', like 'last'"
        )


def _tensors_path(folder: Path, record: dict[str, Any]) -> Path:
    return files.inside(folder, record["tensors_file"])


# Saving


def _record(plain: dict[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the commit file will hold, found fit to be read again before anything is written."""
    table = tensor_file.describe(plain)
    digest = files.digest(json.dumps(table).encode())
    try:
        kept = _encode(dict(facts), "facts")
    except RecursionError as problem:
        raise CheckpointError("the facts are nested too deeply, or hold themselves") from problem
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "tensors_file": f"{_stem(facts)}-{digest[:12]}.safetensors",
        "size": tensor_file.size(table, "the checkpoint"),
        "tensors": table,
        "facts": kept,
    }
    text = _text(record)
    if len(text) > _COMMIT_BYTES:
        raise CheckpointError(
            f"the facts and the table of tensors take {len(text)} bytes as JSON, more than {_COMMIT_BYTES}: "
            "keep what is large in tensors"
        )
    files.parse_json(text, "the commit file, with the facts and the table of tensors,", _COMMIT_VALUES)
    return record


def _stem(facts: Mapping[str, Any]) -> str:
    step = facts.get("step")
    if step is None:
        return "tensors"
    if type(step) is not int or not 0 <= step < 10**20:
        raise CheckpointError(f"facts['step'] must be a whole number, 0 or more, but is {step!r}")
    return f"step-{step}"


def _encode(value: Any, where: str) -> Any:
    """The value as JSON can hold it: itself, but for floats that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {_NOT_FINITE: repr(float(value))}
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str or key == _NOT_FINITE:
                raise CheckpointError(f"{where} has the key {key!r}: keys must be strings, and not {_NOT_FINITE!r}")
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, int) and value.bit_length() > 2048:
        raise CheckpointError(f"{where} is a number of {value.bit_length()} bits: at most 2048 can be kept")
    if value is None or isinstance(value, str | int):
        return value
    raise CheckpointError(
        f"{where} is a {type(value).__name__}: facts are str, int, float, bool, None, list or dict of these"
    )


def _text(record: dict[str, Any]) -> bytes:
    """The commit file, byte for byte: the record and its digest."""
    digest = files.digest(json.dumps(record, allow_nan=False).encode())
    return json.dumps(record | {"digest": digest}, allow_nan=False).encode() + b"\n"


def _write_tensors(folder: Path, record: dict[str, Any], plain: dict[str, Tensor]) -> None:
    with files.replacing(_tensors_path(folder, record), record["size"]) as file:
        tensor_file.write(file, record["tensors"], plain)


def _commit(folder: Path, name: str, record: dict[str, Any]) -> None:
    files.write_atomically(files.inside(folder, f"{name}.json"), _text(record))


def _sweep(folder: Path) -> None:
    """Remove the temporary files of savers, and tensor files whose name stands in no commit file.

    The names are looked for in the bytes, so that a damaged commit file still keeps its tensors for repair.
    """
    try:
        stale = [
            path
            for path, target in files.temporaries(folder).items()
            if target.endswith(".json") or _TENSORS_FILE.fullmatch(target)
        ]
        commits = [path for path in folder.glob("*.json") if path.is_file()]
        named = b" ".join(path.read_bytes() for path in commits if path.stat().st_size <= _COMMIT_BYTES)
        stale += [
            path for path in folder.iterdir() if _TENSORS_FILE.fullmatch(path.name) and path.name.encode() not in named
        ]
        for path in stale:
            os.unlink(path)
    except OSError as problem:
        raise CheckpointError(f"{folder} cannot be tidied: {problem}; the checkpoints in it are whole") from problem


# Loading


def _load(folder: Path, name: str) -> Checkpoint:
    record, file = _open(folder, name)
    path = _tensors_path(folder, record)
    with file:
        try:
            tensors = tensor_file.read(file, str(path), record["tensors"])
        except OSError as problem:
            raise CheckpointError(f"{path} cannot be read: {problem}") from problem
    return Checkpoint(tensors, _decode(record["facts"]))


def _open(folder: Path, name: str) -> tuple[dict[str, Any], BufferedReader]:
    """The record and its tensor file, open: a save that replaces both in between does not part them."""
    _check_name(name)
    path = files.inside(folder, f"{name}.json")
    record = _read_record(path)
    while True:
        try:
            return record, files.open_regular(_tensors_path(folder, record))
        except CheckpointError:
            before, record = record, _read_record(path)
            if record == before:
                raise


def _read_record(path: Path) -> dict[str, Any]:
    text = files.read_bytes(path, _COMMIT_BYTES)
    record = files.parse_json(text, str(path), _COMMIT_VALUES)
    if record.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no checkpoint: its format must be {_FORMAT!r}")
    if record.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {record.get('version')!r}, and this recurra reads {_VERSION}"
        )
    record.pop("digest", None)
    if text != _text(record):
        raise CheckpointError(f"{path} is damaged: it does not have the digest recorded in it")
    if {key: type(value) for key, value in record.items()} != _FIELDS:
        raise CheckpointError(f"{path} is no checkpoint: its fields must be {', '.join(_FIELDS)}, digest")
    if not _TENSORS_FILE.fullmatch(record["tensors_file"]):
        raise CheckpointError(f"{path} names {record['tensors_file']!r}, which is no tensor file of a checkpoint")
    if record["size"] != tensor_file.size(record["tensors"], str(path)):
        raise CheckpointError(f"{path} is no checkpoint: its tensors do not take {record['size']} bytes")
    return record


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NOT_FINITE} and value[_NOT_FINITE] in ("nan", "inf", "-inf"):
            return float(value[_NOT_FINITE])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _advice(folder: Path, name: str) -> str:
    whole = []
    for path in sorted(folder.glob("*.json")):
        if path.stem != name:
            with contextlib.suppress(CheckpointError):
                _load(folder, path.stem)
                whole.append(path.stem)
    if not whole:
        return f"no other checkpoint in {folder} is whole: bring one back from a copy, or start afresh"
    others = " and ".join(whole)
    return f"the checkpoint {others} is whole: use it, or copy {whole[0]}.json to {name}.json to resume from it"


# Fitting


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{' on meta' if value.is_meta else ''}"


def _torn_ties(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """What is one tensor in the module but two different ones in the checkpoint."""
    first: dict[Any, str] = {}
    torn = []
    for name, tensor in own.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        other = first.setdefault(place, name)
        if other != name:
            pair = tensor_file.plain({name: tensors[name], other: tensors[other]})
            if tensor_file.raw(pair[name]) != tensor_file.raw(pair[other]):
                torn.append(f"{other} and {name} are one tensor here, two different ones in the checkpoint")
    return torn
