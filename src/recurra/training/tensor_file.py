"""Tensors as one safetensors file, and a table of what the file must hold, down to the bit.

The table is kept elsewhere (in the commit file of a checkpoint): for each tensor, in the order of the file,
its dtype, shape and digest. It fixes every byte of the header, so a header is never parsed, only compared.
The format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import BufferedReader
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from recurra.errors import CheckpointError
from recurra.files import digest

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Table = dict[str, dict[str, Any]]


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in one piece, in the order of the file: wide dtypes first, then by name.

    Copies only what is not so already. Raises CheckpointError for what the file cannot hold.
    """
    found = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    return dict(sorted(found.items(), key=lambda item: (-item[1].element_size(), item[0])))


def describe(tensors: Mapping[str, Tensor]) -> Table:
    """The table of tensors that are `plain`."""
    return {
        name: {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "digest": digest(raw(tensor))}
        for name, tensor in tensors.items()
    }


def header(table: Table, where: str) -> bytes:
    """The bytes before the first tensor. Raises CheckpointError, naming `where`, if this is no table."""
    entries, end = {}, 0
    for name, entry in table.items():
        begin, end = end, end + _size(name, entry, where)
        entries[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def size(table: Table, where: str) -> int:
    """The bytes that the whole file takes. Raises CheckpointError as `header` does."""
    return len(header(table, where)) + sum(_size(name, entry, where) for name, entry in table.items())


def write(file: BinaryIO, table: Table, tensors: Mapping[str, Tensor]) -> None:
    """Write the file for tensors that are `plain`, and their table."""
    file.write(header(table, "the table"))
    for tensor in tensors.values():
        file.write(raw(tensor))


def read(file: BufferedReader, where: str, table: Table) -> dict[str, Tensor]:
    """The tensors, every byte of the file checked. Memory is taken only as far as the file reaches.

    Raises CheckpointError, naming `where` and the tensor, if this is not the file that the table describes.
    """
    actual, needed = os.fstat(file.fileno()).st_size, size(table, where)
    if actual != needed:
        raise CheckpointError(f"{where} is damaged: it has {actual} bytes, and its tensors take {needed}")
    start = header(table, where)
    if file.read(len(start)) != start:
        raise CheckpointError(f"{where} is damaged: its header does not list the tensors that were saved")
    tensors = {}
    for name, entry in table.items():
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        data = raw(tensor)
        if file.readinto(data) != len(data) or digest(data) != entry["digest"]:
            raise CheckpointError(f"{where} is damaged: tensor {name!r} is not what was saved")
        if tensor.dtype is torch.bool and tensor.view(torch.uint8).gt(1).any():
            raise CheckpointError(f"{where}: tensor {name!r} is bool, but has values other than 0 and 1")
        tensors[name] = tensor
    return tensors


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor that is `plain`, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _plain(name: str, tensor: Tensor) -> Tensor:
    if not name or name == "__metadata__":
        raise CheckpointError(f"{name!r} is no name for a tensor of a checkpoint: give it another")
    if type(tensor) not in (Tensor, nn.Parameter):
        fault = f"is a {type(tensor).__name__}"
    elif tensor.is_meta:
        fault = "has no values (it is on the meta device)"
    elif tensor.is_nested:
        fault = "is nested"
    elif tensor.layout is not torch.strided:
        fault = f"has the layout {tensor.layout}"
    elif tensor.dtype not in _NAMES:
        fault = f"is {tensor.dtype}"
    else:
        return tensor.detach().cpu().resolve_neg().contiguous()
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
    raise CheckpointError(f"tensor {name!r} {fault}: a checkpoint holds dense tensors with values, of {known}")


def _size(name: str, entry: Any, where: str) -> int:
    """The bytes that the tensor of this entry takes. Raises CheckpointError if it is no entry of a table."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "digest"}:
        raise CheckpointError(f"{where}: tensor {name!r} must have a dtype, a shape and a digest")
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where}: tensor {name!r} must have a shape of at most 64 sizes, 0 or more each")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: tensor {name!r} must have a dtype among {', '.join(DTYPES)}")
    if math.prod(max(n, 1) for n in shape) >= 2**60:
        raise CheckpointError(f"{where}: tensor {name!r} has a shape that is too large even for an empty tensor")
    return math.prod(shape) * DTYPES[dtype].itemsize
