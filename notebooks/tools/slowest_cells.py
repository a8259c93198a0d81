"""Which cells of executed notebooks took longest, from the times that Jupyter keeps with each cell.

In: a folder of notebooks that nbmake has run with `--overwrite`. Out: a line for each of the
slowest cells, with its first line of code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple


class Cell(NamedTuple):
    """An executed cell: its time in seconds, its notebook, its place there and its first line."""

    seconds: float
    notebook: str
    index: int
    line: str


def executed_cells(folder: Path) -> list[Cell]:
    """All cells with times in the notebooks of a folder, the slowest first."""
    found = []
    for path in sorted(folder.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for index, cell in enumerate(notebook["cells"]):
            times = cell["metadata"].get("execution", {})
            if {"iopub.execute_input", "shell.execute_reply"} <= times.keys():
                began = datetime.fromisoformat(times["iopub.execute_input"])
                ended = datetime.fromisoformat(times["shell.execute_reply"])
                line = "".join(cell["source"]).lstrip().partition("\n")[0]
                found.append(Cell((ended - began).total_seconds(), path.stem, index, line))
    return sorted(found, reverse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the slowest cells of a folder of executed notebooks."""
    parser = argparse.ArgumentParser(
        prog="python -m notebooks.tools.slowest_cells", description=main.__doc__
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10, help="how many (default: 10)")
    args = parser.parse_args(arguments)
    cells = executed_cells(args.folder)
    total = sum(cell.seconds for cell in cells)
    print(f"The slowest of {len(cells)} cells, which took {total:.0f} s together:")
    for seconds, notebook, index, line in cells[: args.count]:
        print(f"{seconds:8.1f} s  {notebook}, cell {index}: {line[:60]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
