"""What a result was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """What the maker calls this processor, where the system tells; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
