"""Where and when a number was made, which every stored result says of itself."""

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from sleepedu.fast import cpp as kernel


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a measurement has to say about where and when it was made: machine, versions, commit, time."""
    return {
        "device": device.type,
        "processor": _processor(device),
        "threads": torch.get_num_threads(),
        "kernel": device.type == "cpu" and kernel.is_available(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "commit": _commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        described = Path("/proc/cpuinfo").read_text()
        return next(line.split(":", 1)[1].strip() for line in described.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit the library stands at, "" outside a checkout of its own."""
    command = ["git", "rev-parse", "HEAD", "--show-cdup"]
    folder = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or no answer in time
        return ""
    commit, *up = done.stdout.split()
    return "" if up else commit  # an installed package may lie inside the checkout of another project
