"""Copies of the lessons for a class: for students without solutions, for instructors with them.

In: notebooks whose exercises carry nbgrader's marks. Out: a folder with a `student` and an
`instructor` copy of each. nbgrader takes the notebooks too; this script follows its rules, so that
a class does not need it:

- a *solution cell* holds the answer between `### BEGIN SOLUTION` and `### END SOLUTION`; students
  get a stub in its place (of the whole cell where nothing is marked);
- a *check cell* (nbgrader: autograder tests) is worth points, is locked, and raises an error that
  says what is wrong with the answer. Only instructors get what stands between
  `### BEGIN HIDDEN TESTS` and `### END HIDDEN TESTS`.

`python notebooks/tools/class_copies.py --check` also runs both copies of each notebook: with its
solution every check must pass, with the stub every check must fail, and no other cell may fail.
Cell metadata: nbgrader's schema, version 3.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CODE_STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # nbgrader's own
TEXT_STUB = "YOUR ANSWER HERE"
LESSON_FILES = (".xyz", ".json", ".csv", ".png")  # suffixes of files that lessons read
COURSE = Path(__file__).parents[1]
SECONDS_A_CELL = 600

Notebook = dict[str, Any]  # as nbformat writes it


class ClassroomError(ValueError):
    """A notebook with marks that break the rules; the message says which cell, and why."""


@dataclass(frozen=True)
class Exercise:
    """A check cell and the solution cells before it, by their indices in the notebook."""

    name: str
    points: float
    answers: tuple[int, ...]
    check: int


# --- one notebook -------------------------------------------------------------------------------


def read_notebook(path: Path) -> Notebook:
    """Read a notebook; `ClassroomError` for a file that is no notebook of format 4."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClassroomError(f"{path} is not a notebook: {error}") from error
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4:
        raise ClassroomError(f"{path} is not a notebook of format 4")
    return notebook


def marks(cell: dict[str, Any]) -> dict[str, Any]:
    """nbgrader's metadata of a cell; empty where it has none."""
    return cell["metadata"].get("nbgrader", {})


def source(cell: dict[str, Any]) -> str:
    """The text of a cell, which nbformat may keep as a list of lines."""
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def exercises(notebook: Notebook) -> list[Exercise]:
    """The exercises of a notebook, in order.

    Raises `ClassroomError` where marks break the rules: every solution cell is followed by a check,
    every check has a solution cell before it, code between its marks, points, and a unique name.
    """
    found: list[Exercise] = []
    answers: list[int] = []
    names: set[str] = set()
    for index, cell in enumerate(notebook["cells"]):
        mark, text = marks(cell), source(cell)
        where = f"cell {index} ({mark.get('grade_id') or cell.get('id', 'no name')})"
        marked = "### BEGIN SOLUTION" in text or "### END SOLUTION" in text
        if not mark:
            if marked:
                raise ClassroomError(f"{where} holds a solution, but no nbgrader metadata say so")
            continue
        if mark.get("schema_version") != 3:
            raise ClassroomError(f"{where}: nbgrader's schema_version is not 3")
        missing = {"grade_id", "grade", "solution", "locked", "task"} - set(mark)
        if missing:
            raise ClassroomError(f"{where}: nbgrader's metadata lack {sorted(missing)}")
        if not re.fullmatch(r"[\w-]+", str(mark["grade_id"])) or mark["grade_id"] in names:
            raise ClassroomError(f"{where}: grade_id must be a name of letters, given only once")
        names.add(mark["grade_id"])
        if mark["solution"]:
            if mark["locked"]:
                raise ClassroomError(f"{where}: students must be able to edit a solution cell")
            if cell["cell_type"] == "code" and not marked:
                raise ClassroomError(f"{where}: no ### BEGIN SOLUTION and ### END SOLUTION")
            _without(text, "SOLUTION", CODE_STUB, where)  # raises where marks do not pair
            if not mark["grade"]:
                answers.append(index)
        elif marked:
            raise ClassroomError(f"{where} holds a solution, but is no solution cell")
        elif mark["grade"]:
            if not mark["locked"] or float(mark.get("points", 0)) <= 0:
                raise ClassroomError(f"{where}: a check is locked and worth points")
            if not answers:
                raise ClassroomError(f"{where}: a check without a solution cell before it")
            check = Exercise(mark["grade_id"], float(mark["points"]), tuple(answers), index)
            found.append(check)
            answers = []
    if answers:
        raise ClassroomError(f"cell {answers[0]}: a solution cell that no check follows")
    return found


def _without(text: str, kind: str, stub: str, where: str) -> str:
    """`text` with its regions of a kind (SOLUTION, HIDDEN TESTS) replaced by a stub, indented."""
    lines, inside, indent = [], False, ""
    for line in text.split("\n"):
        begins, ends = f"### BEGIN {kind}" in line, f"### END {kind}" in line
        if begins and not inside:
            inside, indent = True, line[: len(line) - len(line.lstrip())]
            lines += [indent + part for part in stub.split("\n")] if stub else []
        elif ends and inside:
            inside = False
        elif begins or ends:
            raise ClassroomError(f"{where}: ### BEGIN {kind} and ### END {kind} do not pair")
        elif not inside:
            lines.append(line)
    if inside:
        raise ClassroomError(f"{where}: no ### END {kind} after ### BEGIN {kind}")
    return "\n".join(lines)


def instructor_copy(notebook: Notebook) -> Notebook:
    """The notebook with its solutions, without outputs. Raises what `exercises` raises."""
    exercises(notebook)
    cells = []
    for cell in notebook["cells"]:
        cell = {**cell, "metadata": dict(cell["metadata"]), "source": source(cell)}
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        cells.append(cell)
    return {**notebook, "cells": cells}


def student_copy(notebook: Notebook) -> Notebook:
    """The notebook with stubs for solutions, without hidden tests and outputs.

    Locked cells cannot be edited or deleted in Jupyter. Raises what `exercises` raises.
    """
    copy = instructor_copy(notebook)
    for index, cell in enumerate(copy["cells"]):
        mark, where = marks(cell), f"cell {index}"
        stub = CODE_STUB if cell["cell_type"] == "code" else TEXT_STUB
        if mark.get("solution"):
            whole = "### BEGIN SOLUTION" not in cell["source"]
            cell["source"] = stub if whole else _without(cell["source"], "SOLUTION", stub, where)
        if mark.get("grade"):
            cell["source"] = _without(cell["source"], "HIDDEN TESTS", "", where)
        if mark:
            cell["metadata"] |= {"deletable": False}
            if mark.get("locked"):
                cell["metadata"] |= {"editable": False}
    return copy


# --- a class ------------------------------------------------------------------------------------


def write_class(notebooks: Iterable[Path], out: Path) -> dict[str, list[Exercise]]:
    """Write `out/student/*.ipynb` and `out/instructor/*.ipynb`; the exercises of each notebook.

    The files that lessons read (`molecules/*.xyz`) are copied too. Earlier copies are replaced,
    after all new ones are made. Raises `ClassroomError`, `FileNotFoundError`.
    """
    notebooks = sorted(Path(path) for path in notebooks)
    if not notebooks:
        raise FileNotFoundError("no notebooks: name the folder or the files")
    found, copies = {}, []
    for path in notebooks:
        try:
            notebook = read_notebook(path)
            found[path.stem] = exercises(notebook)
            copies.append((path, student_copy(notebook), instructor_copy(notebook)))
        except ClassroomError as error:
            raise ClassroomError(f"{path.name}: {error}") from error
    for name, which in (("student", 1), ("instructor", 2)):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for made in copies:
            text = json.dumps(made[which], indent=1, ensure_ascii=False) + "\n"
            (folder / made[0].name).write_text(text, encoding="utf-8")
        for source_folder in {path.parent for path in notebooks}:
            for file in source_folder.rglob("*"):
                hidden = any(part.startswith(".") for part in file.relative_to(source_folder).parts)
                if file.suffix in LESSON_FILES and file.is_file() and not hidden:
                    target = folder / file.relative_to(source_folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
    return found


def run_notebook(path: Path) -> dict[int, str]:
    """Run all cells of a notebook in its folder, also after errors; errors by cell, a line each.

    The file is not changed. Needs nbclient, which comes with JupyterLab.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": SECONDS_A_CELL, "allow_errors": True, "kernel_name": "python3"}
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, resources=place, **options).execute()
    errors = {}
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                errors[index] = f"{output.ename}: {output.evalue}".strip().splitlines()[0]
    return errors


def faults(found: Sequence[Exercise], solved: dict[int, str], stubbed: dict[int, str]) -> list[str]:
    """What is wrong with a notebook, from the errors of its two copies, by cell.

    Args:
        found: its exercises.
        solved: errors of the instructor copy.
        stubbed: errors of the student copy.
    """
    checks = {exercise.check: exercise.name for exercise in found}
    answers = {index for exercise in found for index in exercise.answers}
    wrong = [f"{checks.get(i, f'cell {i}')} fails with the solution: {solved[i]}" for i in solved]
    wrong += [f"{name} passes on the stub" for i, name in checks.items() if i not in stubbed]
    others = [i for i in stubbed if i not in checks and i not in answers]
    return wrong + [f"cell {i} fails in the student copy: {stubbed[i]}" for i in others]


def check_class(out: Path, found: dict[str, list[Exercise]]) -> list[str]:
    """Run both copies of each notebook; a line for each fault, none if all is right."""
    wrong = []
    for stem, of_notebook in found.items():
        print(f"{stem}: running both copies", flush=True)
        solved = run_notebook(out / "instructor" / f"{stem}.ipynb")
        stubbed = run_notebook(out / "student" / f"{stem}.ipynb")
        wrong += [f"{stem}: {line}" for line in faults(of_notebook, solved, stubbed)]
    return wrong


# --- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Write student and instructor copies of the course; with --check, run them too."""
    parser = argparse.ArgumentParser(
        prog="python notebooks/tools/class_copies.py", description=main.__doc__
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="files or folders (default: the course)"
    )
    parser.add_argument("--out", type=Path, default=Path("class"), help="default: class")
    parser.add_argument("--check", action="store_true", help="run both copies of each notebook")
    args = parser.parse_args(arguments)
    try:
        paths = []
        for path in args.notebooks or [COURSE]:
            paths += sorted(path.glob("*.ipynb")) if path.is_dir() else [path]
        found = write_class(paths, args.out)
        for stem, of_notebook in found.items():
            points = sum(exercise.points for exercise in of_notebook)
            print(f"{stem}: {len(of_notebook)} exercises, {points:g} points")
        wrong = check_class(args.out, found) if args.check else []
    except (ClassroomError, OSError) as error:
        print(f"class_copies: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nclass_copies: stopped; the same command starts again", file=sys.stderr)
        return 130
    for line in wrong:
        print(line, file=sys.stderr)
    if args.check and not wrong:
        print("every check passes on the solution and fails on the stub")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
