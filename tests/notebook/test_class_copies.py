"""Copies for a class: stubs in, solutions out, and a check that notices exercises out of order."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from notebooks.tools import class_copies
from notebooks.tools.class_copies import (
    ClassroomError,
    exercises,
    instructor_copy,
    main,
    read_notebook,
    run_notebook,
    student_copy,
    write_class,
)

ANSWER = '''\
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    y = 2 * x
    return y
    ### END SOLUTION'''
CHECK = """\
assert double(2) == 4, "twice 2 is not that"
### BEGIN HIDDEN TESTS
assert double(-1) == -2
### END HIDDEN TESTS
print("Right.")"""


def cell(kind: str, text: str, **mark: Any) -> dict[str, Any]:
    """A cell; with keywords, nbgrader's metadata of it."""
    made = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    if kind == "code":
        made |= {"execution_count": 3, "outputs": [{"output_type": "stream", "text": "old"}]}
    if mark:
        common = {"schema_version": 3, "task": False, "grade": False, "solution": False}
        made["metadata"]["nbgrader"] = common | {"locked": False} | mark
    return made


def notebook(answer: str = ANSWER, check: str = CHECK, name: str = "double") -> dict[str, Any]:
    """Some text and code, and then one exercise in three cells."""
    found = [
        cell("markdown", "# Twice"),
        cell("code", "ten = 10"),
        cell("markdown", "**1. Double.** Write it."),
        cell("code", answer, grade_id=f"{name}-answer", solution=True),
        cell("code", check, grade_id=f"{name}-check", grade=True, locked=True, points=2),
    ]
    for index, made in enumerate(found):
        made["id"] = f"cell-{index}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel}
    return {"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def save(content: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run_plainly(path: Path) -> dict[int, str]:
    """What `run_notebook` says, without a kernel."""
    scope, errors = {}, {}
    for index, made in enumerate(read_notebook(path)["cells"]):
        if made["cell_type"] != "code":
            continue
        try:
            exec(class_copies.source(made), scope)
        except Exception as error:
            errors[index] = f"{type(error).__name__}: {error}".strip()
    return errors


# --- copies -------------------------------------------------------------------------------------


def test_students_get_a_stub_in_place_of_the_solution():
    original = notebook()
    before = copy.deepcopy(original)
    made = student_copy(original)["cells"]
    assert original == before, "the source was changed"
    assert made[3]["source"] == (
        'def double(x):\n    """Twice x."""\n    # YOUR CODE HERE\n    raise NotImplementedError()'
    )
    assert made[4]["source"] == 'assert double(2) == 4, "twice 2 is not that"\nprint("Right.")'
    assert [class_copies.source(one) for one in original["cells"][:3]] == [
        one["source"] for one in made[:3]
    ]
    assert all(one["outputs"] == [] and one["execution_count"] is None for one in made[3:])
    assert made[3]["metadata"]["deletable"] is False and "editable" not in made[3]["metadata"]
    assert made[4]["metadata"]["deletable"] is made[4]["metadata"]["editable"] is False
    assert "deletable" not in made[1]["metadata"]


def test_instructors_keep_solutions_and_hidden_tests():
    made = instructor_copy(notebook())["cells"]
    assert (made[3]["source"], made[4]["source"]) == (ANSWER, CHECK)
    assert all(one["outputs"] == [] for one in made if one["cell_type"] == "code")


def test_two_regions_become_two_stubs_and_an_unmarked_text_answer_goes_as_a_whole():
    twice = "### BEGIN SOLUTION\na = 1\n### END SOLUTION\nb = 2\n"
    twice += "if b:\n    ### BEGIN SOLUTION\n    c = 3\n    ### END SOLUTION"
    content = notebook(answer=twice)
    asked = cell(
        "markdown", "Because of Pauli.", grade_id="why", solution=True, grade=True, points=1
    )
    content["cells"].append(asked)
    made = student_copy(content)["cells"]
    stub = "# YOUR CODE HERE\nraise NotImplementedError()"
    inside = "    # YOUR CODE HERE\n    raise NotImplementedError()"
    assert made[3]["source"] == f"{stub}\nb = 2\nif b:\n{inside}"
    assert made[5]["source"] == "YOUR ANSWER HERE"
    assert "editable" not in made[5]["metadata"]


def test_exercises_are_listed_with_their_places():
    content = notebook()
    content["cells"] += notebook(name="second")["cells"][3:]
    first, second = exercises(content)
    assert (first.name, first.points, first.answers, first.check) == ("double-check", 2, (3,), 4)
    assert (second.name, second.answers, second.check) == ("second-check", (5,), 6)


# --- marks that are not in order ----------------------------------------------------------------


def answer_mark(**changes: Any) -> Callable[[dict], None]:
    return lambda content: content["cells"][3]["metadata"]["nbgrader"].update(changes)


def check_mark(**changes: Any) -> Callable[[dict], None]:
    return lambda content: content["cells"][4]["metadata"]["nbgrader"].update(changes)


def text(index: int, old: str, new: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        made = content["cells"][index]
        assert old in class_copies.source(made)
        made["source"] = class_copies.source(made).replace(old, new)

    return change


MALFORMED = {
    "no end": (text(3, "    ### END SOLUTION", ""), "END SOLUTION"),
    "no beginning": (text(3, "    ### BEGIN SOLUTION\n", ""), "do not pair"),
    "nested": (text(3, "    y = 2 * x", "    ### BEGIN SOLUTION"), "do not pair"),
    "no marks": (
        lambda c: [text(3, f"    ### {w} SOLUTION", "")(c) for w in ("BEGIN", "END")],
        "no ###",
    ),
    "hidden tests left open": (text(4, "### END HIDDEN TESTS\n", ""), "HIDDEN TESTS"),
    "solution without metadata": (
        lambda c: c["cells"][3]["metadata"].clear(),
        "no nbgrader metadata",
    ),
    "solution in a check": (text(4, "print", "### BEGIN SOLUTION\nprint"), "no solution cell"),
    "check without an answer": (lambda c: c["cells"].pop(3), "without a solution cell"),
    "answer without a check": (lambda c: c["cells"].pop(4), "no check follows"),
    "a name twice": (check_mark(grade_id="double-answer"), "only once"),
    "a name with a blank": (check_mark(grade_id="my check"), "name of letters"),
    "no points": (check_mark(points=0), "worth points"),
    "a check that can be edited": (check_mark(locked=False), "locked"),
    "an answer that cannot": (answer_mark(locked=True), "able to edit"),
    "another schema": (answer_mark(schema_version=2), "schema_version"),
    "a mark missing": (lambda c: c["cells"][4]["metadata"]["nbgrader"].pop("task"), "task"),
}


@pytest.mark.parametrize("change, words", MALFORMED.values(), ids=MALFORMED)
def test_malformed_marks_are_refused_and_nothing_is_written(tmp_path, capsys, change, words):
    content = notebook()
    change(content)
    good = save(notebook(), tmp_path / "lessons" / "01_good.ipynb")
    bad = save(content, tmp_path / "lessons" / "02_bad.ipynb")
    with pytest.raises(ClassroomError, match=words):
        student_copy(content)
    assert main([str(good), str(bad), "--out", str(tmp_path / "class"), "--check"]) == 2
    said = capsys.readouterr().err
    assert "02_bad.ipynb" in said and words in said and said.count("\n") == 1
    assert not (tmp_path / "class").exists()


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"nbformat": 3, "worksheets": []}'])
def test_what_is_no_notebook_is_refused(tmp_path, content):
    path = tmp_path / "x.ipynb"
    path.write_text(content)
    with pytest.raises(ClassroomError, match="not a notebook"):
        read_notebook(path)
    assert main([str(path), "--out", str(tmp_path / "class")]) == 2


def test_an_empty_folder_is_said(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "class")]) == 2
    assert "no notebooks" in capsys.readouterr().err


# --- a class ------------------------------------------------------------------------------------


def test_a_class_has_both_copies_and_the_files_that_lessons_read(tmp_path, capsys):
    home, out = tmp_path / "lessons", tmp_path / "class"
    path = save(notebook(), home / "01_twice.ipynb")
    (home / "molecules").mkdir()
    (home / "molecules" / "water.xyz").write_text("3\n")
    (home / "molecules" / "make.py").write_text("pass\n")
    (home / ".ipynb_checkpoints").mkdir()
    (home / ".ipynb_checkpoints" / "old.xyz").write_text("1\n")
    before = path.read_bytes()
    assert main([str(home), "--out", str(out)]) == 0
    assert "01_twice: 1 exercises, 2 points" in capsys.readouterr().out
    assert path.read_bytes() == before
    for folder in ("student", "instructor"):
        found = {file.relative_to(out / folder) for file in (out / folder).rglob("*.*")}
        assert found == {Path("01_twice.ipynb"), Path("molecules/water.xyz")}
    student, instructor = (
        read_notebook(out / who / "01_twice.ipynb") for who in ("student", "instructor")
    )
    assert student == student_copy(notebook())
    assert instructor == instructor_copy(notebook())


def test_earlier_copies_stay_where_a_notebook_is_not_in_order(tmp_path):
    path = save(notebook(), tmp_path / "lessons" / "01_twice.ipynb")
    write_class([path], tmp_path / "class")
    before = (tmp_path / "class" / "student" / "01_twice.ipynb").read_bytes()
    content = notebook(answer=ANSWER.replace("double", "triple"))
    content["cells"].pop(4)
    save(content, path)
    with pytest.raises(ClassroomError, match="01_twice"):
        write_class([path], tmp_path / "class")
    assert (tmp_path / "class" / "student" / "01_twice.ipynb").read_bytes() == before


WRONG = {
    "a check that passes on the stub": (
        {"check": "print('fine')"},
        "double-check passes on the stub",
    ),
    "a check that only the hidden part makes fail": (
        {"check": "### BEGIN HIDDEN TESTS\nassert double(2) == 4\n### END HIDDEN TESTS"},
        "double-check passes on the stub",
    ),
    "a solution that is wrong": (
        {"answer": ANSWER.replace("2 * x", "3 * x")},
        "double-check fails with the solution: AssertionError: twice 2 is not that",
    ),
    "a solution that does not run": (
        {"answer": ANSWER.replace("2 * x", "2 * z")},
        "double-check fails with the solution: NameError",
    ),
}


@pytest.mark.parametrize("change, words", WRONG.values(), ids=WRONG)
def test_check_notices(tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.setattr(class_copies, "run_notebook", run_plainly)
    path = save(notebook(**change), tmp_path / "lessons" / "01_twice.ipynb")
    assert main([str(path), "--out", str(tmp_path / "class"), "--check"]) == 1
    captured = capsys.readouterr()
    assert f"01_twice: {words}" in captured.err
    assert captured.err.count("\n") == 1, "one fault, one line"
    assert "every check passes" not in captured.out


def test_check_notices_cells_that_fail_beside_the_exercises(tmp_path, monkeypatch):
    monkeypatch.setattr(class_copies, "run_notebook", run_plainly)
    content = notebook()
    content["cells"].append(cell("code", "twenty = double(ten)"))  # fails on the stub
    content["cells"].append(cell("code", "ten / 0"))  # fails in both
    path = save(content, tmp_path / "lessons" / "01_twice.ipynb")
    wrong = class_copies.check_class(tmp_path / "class", write_class([path], tmp_path / "class"))
    assert [line.split(": ")[1] for line in wrong] == [
        "cell 6 fails with the solution",
        "cell 5 fails in the student copy",
        "cell 6 fails in the student copy",
    ]


def test_check_runs_both_copies_in_a_kernel(tmp_path, capsys):
    pytest.importorskip("nbclient")
    content = notebook()
    content["cells"][1]["source"] = "ten = float(open('beside.csv').read())"
    content["cells"][4]["source"] = CHECK.replace("print", "assert ten == 10, 'not ten'\nprint")
    path = save(content, tmp_path / "lessons" / "01_twice.ipynb")
    (path.parent / "beside.csv").write_text("10")
    assert main([str(path), "--out", str(tmp_path / "class"), "--check"]) == 0
    assert "every check passes on the solution and fails on the stub" in capsys.readouterr().out

    student = tmp_path / "class" / "student" / "01_twice.ipynb"
    before = student.read_bytes()
    (found,) = run_notebook(student).items()
    assert found == (4, "NotImplementedError:")
    assert student.read_bytes() == before, "running changed the file"
