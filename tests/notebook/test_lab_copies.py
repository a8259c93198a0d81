"""Student copies for `make lab`: made, renewed, and never written over someone's work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from notebooks.tools.lab_copies import write_lab

CHECK = 'assert half(4) == 2, "half of 4 is 2"\nprint("Right.")'


def write_course(course: Path, answer: str, title: str = "# Halves") -> None:
    def mark(name: str, **values: object) -> dict:
        rest = {"solution": False, "grade": False, "locked": False, "task": False}
        return {"nbgrader": {"schema_version": 3, "grade_id": name, **rest, **values}}

    def code(text: str, metadata: dict) -> dict:
        return {
            "cell_type": "code",
            "id": str(metadata["nbgrader"]["grade_id"]),
            "metadata": metadata,
            "source": text,
            "outputs": [],
            "execution_count": None,
        }

    solution = f"def half(x):\n    ### BEGIN SOLUTION\n    return {answer}\n    ### END SOLUTION"
    cells = [
        {"cell_type": "markdown", "id": "title", "metadata": {}, "source": title},
        code(solution, mark("answer", solution=True)),
        code(CHECK, mark("check", grade=True, locked=True, points=1)),
    ]
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    course.mkdir(exist_ok=True)
    (course / "01_half.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    (course / "molecules").mkdir(exist_ok=True)
    (course / "molecules" / "water.xyz").write_text("3\n")


@pytest.fixture
def course(tmp_path: Path) -> Path:
    write_course(tmp_path / "course", "x / 2")
    return tmp_path / "course"


def names(lab: Path) -> set[str]:
    return {path.relative_to(lab).as_posix() for path in lab.rglob("[!.]*") if path.is_file()}


def test_students_get_stubs_and_the_files_that_lessons_read(course, tmp_path):
    lab = tmp_path / "lab"
    assert write_lab(course, lab) == []
    assert names(lab) == {"01_half.ipynb", "molecules/water.xyz"}
    text = (lab / "01_half.ipynb").read_text()
    assert "x / 2" not in text
    assert "NotImplementedError" in text
    assert "x / 2" in (course / "01_half.ipynb").read_text()


def test_an_untouched_copy_is_renewed_when_its_lesson_changes(course, tmp_path):
    lab = tmp_path / "lab"
    write_lab(course, lab)
    write_course(course, "x / 2", title="# Halves, said better")
    assert write_lab(course, lab) == []
    assert names(lab) == {"01_half.ipynb", "molecules/water.xyz"}
    assert "said better" in (lab / "01_half.ipynb").read_text()


def test_work_is_kept_and_a_newer_lesson_put_beside_it_once(course, tmp_path):
    lab = tmp_path / "lab"
    write_lab(course, lab)
    mine = lab / "01_half.ipynb"
    work = mine.read_text().replace("raise NotImplementedError()", "return x * 0.5")
    mine.write_text(work)
    assert write_lab(course, lab) == []
    assert (mine.read_text(), names(lab)) == (work, {"01_half.ipynb", "molecules/water.xyz"})

    write_course(course, "x / 2", title="# Halves, said better")
    (said,) = write_lab(course, lab)
    assert "01_half.ipynb holds your work" in said and "01_half-2.ipynb" in said
    assert mine.read_text() == work
    assert "said better" in (lab / "01_half-2.ipynb").read_text()
    assert write_lab(course, lab) == []  # said once

    (lab / "01_half-2.ipynb").write_text("work as well")
    write_course(course, "x / 2", title="# Halves, once more")
    assert len(write_lab(course, lab)) == 1
    assert (lab / "01_half-2.ipynb").read_text() == "work as well"
    assert "once more" in (lab / "01_half-3.ipynb").read_text()


def test_a_deleted_copy_is_made_again_and_a_strange_file_is_not_replaced(course, tmp_path):
    lab = tmp_path / "lab"
    lab.mkdir()
    (lab / "01_half.ipynb").write_text("of somebody, from before")
    assert len(write_lab(course, lab)) == 1
    assert (lab / "01_half.ipynb").read_text() == "of somebody, from before"
    (lab / "01_half.ipynb").unlink()
    assert write_lab(course, lab) == []
    assert "NotImplementedError" in (lab / "01_half.ipynb").read_text()
