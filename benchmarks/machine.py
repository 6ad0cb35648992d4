"""The machine and the versions, without names or paths of the one or the other."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers import PEERS_PYTHON

# Above this others are at work, and the times are theirs, too.
BUSY = 0.5
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
HERE, THERE = ("torch", "numpy", "llvmlite"), ("jax", "jaxlib", "onnxruntime")


def describe() -> dict[str, Any]:
    """Processor, cores, how busy it is with other work, settings of the threads, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in known],
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "settings": {key: value for key, value in os.environ.items() if key.startswith(("GOMP_", "OMP_", "KMP_"))},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in HERE}, **of_peers()},
    }


def of_peers() -> dict[str, str]:
    """The versions in the environment of the peers, where there is one."""
    if not PEERS_PYTHON.exists():
        return {}
    code = f"from importlib.metadata import version\nfor name in {THERE}: print(name, version(name))"
    printed = subprocess.run([str(PEERS_PYTHON), "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in printed.splitlines())


def busy(machine: dict[str, Any]) -> str:
    """What is to be said of a machine with other work on it, or nothing."""
    load = machine["load"] or 0.0
    return f"the machine had other work on it before the run, a load of {load}" if load > BUSY else ""
