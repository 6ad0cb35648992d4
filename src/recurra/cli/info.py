"""What a run is, and what this machine is."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from recurra import __version__
from recurra.cli.talk import closing, print_json, table
from recurra.errors import CheckpointError
from recurra.training.progress import duration


def info(path: Path, json: bool) -> int:
    from recurra.training.checkpoint import load
    from recurra.training.run import Run

    if path.is_file():
        folder, name, rows = path.parent, path.stem, {}
        if path.suffix != ".json":
            raise CheckpointError(f"{path} is no checkpoint: name the .json beside it, such as last.json")
    else:
        run = Run.open(path)
        folder, name, rows = run.checkpoints, "best", _run_rows(run)
        if not (folder / "best.json").exists():
            name = "last"
    if path.is_file() or (folder / f"{name}.json").exists():
        rows |= _checkpoint_rows(name, load(folder, name))
    if json:
        print_json(rows)
        return 0
    table(str(path), {k: f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else v for k, v in rows.items()})
    if path.is_dir():
        closing({}, [f"recurra sample {path}", f"recurra evaluate {path}", f"recurra resume {path}"])
    return 0


def _run_rows(run: Any) -> dict[str, Any]:
    from recurra.tasks.language_config import LanguageConfig
    from recurra.training.config import settings

    config = run.settings(LanguageConfig)
    rows: dict[str, Any] = {"task": run.task}
    for each in settings(LanguageConfig).values():
        value = getattr(getattr(config, each.section), each.name)
        rows[each.name] = "none" if value is None else value
    evaluations = [e for e in run.read_metrics() if e.get("validation_loss") is not None]
    if evaluations:
        best = min(evaluations, key=lambda e: e["validation_loss"])
        rows["best validation loss"] = f"{best['validation_loss']:.4f} nats at update {best['step']}"
    rows["files"] = ", ".join(sorted(p.name for p in run.path.iterdir() if not p.name.startswith(".")))
    return rows


def _checkpoint_rows(name: str, checkpoint: Any) -> dict[str, Any]:
    weights = {k: t for k, t in checkpoint.tensors.items() if k.startswith("model.")}
    position = checkpoint.facts.get("position", {})
    rows: dict[str, Any] = {
        "checkpoint": name,
        "updates taken": position.get("step"),
        "updates skipped": position.get("skipped"),
    }
    rows["units seen"] = position.get("seen")
    rows["trained for"] = duration(position.get("seconds", 0))
    rows["parameters"] = sum(t.numel() for t in weights.values())
    for key, tensor in weights.items():
        rows[key.removeprefix("model.")] = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return rows


def env(json: bool) -> int:
    import torch

    rows: dict[str, Any] = {
        "recurra": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": _processor(),
        "processor features": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    for package in ("torch", "numpy", "llvmlite", "safetensors", "cyclopts", "matplotlib", "tokenizers", "tensorboard"):
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["GPU"] = "none that PyTorch can use"
    if torch.cuda.is_available():
        rows["GPU"] = ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
        rows["CUDA"] = torch.version.cuda
        rows["GPU driver"] = _driver()
    if json:
        print_json(rows)
    else:
        table("recurra on this machine", rows)
    return 0


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text(errors="replace").splitlines()[0] if version.exists() else "unknown"
