"""What a result was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor_name() -> str:
    """What the maker calls this processor, where the system tells; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_name(device: torch.device) -> str:
    """What the maker calls a GPU, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
