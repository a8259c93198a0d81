"""What studies share: tables and figures of their pages, and the memory that a measurement took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from allscaip_lite.errors import InputError
from allscaip_lite.files import store_text
from allscaip_lite.notebook.plots import plain_numbers

if TYPE_CHECKING:  # a measured process loads no library of pictures
    from matplotlib.figure import Figure

MARKS = ("<!-- table: written by run.py -->", "<!-- end of the table -->")


def insert_table(page: Path, text: str) -> None:
    """Put a table into a page, between the two lines of `MARKS`; the rest of the page stays.

    A page that does not exist gets the marks and the table. Raises `InputError` for a page without
    marks.
    """
    old = page.read_text() if page.exists() else "\n".join(MARKS) + "\n"
    begin, end = (old.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        raise InputError(
            f"{page} has no place for a table: write the lines {MARKS[0]} and {MARKS[1]} into it"
        )
    store_text(page, f"{old[: begin + len(MARKS[0])]}\n\n{text.rstrip()}\n\n{old[end:]}")


def save_figure(figure: Figure, file: Path) -> None:
    """The same figure gives the same file; its logarithmic axes have plain numbers."""
    plain_numbers(figure)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def peak_memory(device: str) -> float:
    """GiB: the most this process held in memory, or on a GPU the most PyTorch allocated."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # not ru_maxrss: on Linux that starts at the peak of the process that started this one
        (line,) = [s for s in status.read_text().splitlines() if s.startswith("VmHWM")]
        return int(line.split()[1]) / 2**20
    import resource  # not there on Windows

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
