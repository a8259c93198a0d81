"""How many minutes a lesson takes a student, by its length.

In: the notebooks. Out: a line for each: minutes of reading, and those that its exercises with code
state. A minute is 120 words, or 20 lines of code, or a figure; a prediction takes two. These rates
are assumed, no class was timed. What is marked as optional, and questions for paper and discussion,
come on top.

    python -m notebooks.tools.minutes
"""

from __future__ import annotations

import re
from pathlib import Path

from notebooks.tools.class_copies import COURSE, exercises, read_notebook, source

WORDS, LINES = 120, 20  # a minute


def minutes(path: Path) -> tuple[int, int]:
    """Minutes of reading, and of the exercises with code, of one notebook."""
    notebook = read_notebook(path)
    reading, optional = 0.0, 0  # optional: the level of the heading that says so, 0 outside of it
    for cell in notebook["cells"]:
        lines = source(cell).splitlines()
        if cell["cell_type"] == "code":
            if not optional:
                reading += sum(map(bool, lines)) / LINES + source(cell).count("\nshow(")
            continue
        for line in lines:
            level = len(line) - len(line.lstrip("#"))
            if level and (not optional or level <= optional):
                optional = level if "(optional" in line else 0
            if line == "## Exercises":
                break
            if not optional:
                reading += len(re.sub(r"\$[^$]*\$", "x", line).split()) / WORDS
                reading += 2 * line.count("Predict first")
        else:
            continue
        break
    stated = 0
    for exercise in exercises(notebook):
        statement = source(notebook["cells"][exercise.check - 2])
        stated += int(re.search(r"(\d+) min", statement)[1])
    return round(reading), stated


if __name__ == "__main__":
    for path in sorted(COURSE.glob("*.ipynb")):
        reading, stated = minutes(path)
        together = reading + stated
        print(f"{path.stem:30} reading {reading:3}, exercises {stated:3}, together {together:3}")
