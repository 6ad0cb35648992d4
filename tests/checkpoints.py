"""Small checkpoints, compared to the bit and changed on purpose."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bits(a[name]) == bits(b[name])
        for name in a
    )


def small(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((2, 3), value),
        "half": torch.tensor([value, -0.0, math.nan], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "step": torch.tensor(7),
        "none": torch.empty(0, 4),
    }


def tensors_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of a commit file and give it the digest it then needs."""
    record = json.loads(path.read_text()) | changes
    record.pop("digest")
    record["digest"] = hashlib.blake2b(json.dumps(record).encode(), digest_size=32).hexdigest()
    path.write_text(json.dumps(record) + "\n")
