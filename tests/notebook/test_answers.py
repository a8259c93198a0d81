"""Checks of the lessons refuse wrong answers with a message that helps, and take every right one.

`answers/NN.toml` holds, for each exercise of lesson NN, at least three wrong answers that a student
would give, and two right ones that look different from the solution:

    before = ["graph-02"]      # ids of the cells that the answers and checks need, in order
    setup = "curves = {}"      # optional code after them, in place of cells that are slow

    [[gap.wrong]]              # the exercise of the cells gap-answer and gap-check
    why = "the sign of the force"
    says = "sign"              # a part of the message that the student reads
    code = '''...'''           # what the student writes in place of the whole answer cell

    [[gap.right]]
    why = "with np.trapezoid"
    code = '''...'''
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from notebooks.tools.class_copies import exercises, marks, read_notebook, source, student_copy

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow  # each lesson loads its model and runs its first cells

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FILES = sorted((Path(__file__).parent / "answers").glob("*.toml"))


@functools.cache
def lesson(name: str) -> tuple[dict[str, Any], dict[str, dict[str, str]], dict[str, Any]]:
    """The data of a lesson, the texts of its exercises, and the names that its cells define."""
    data = tomllib.loads((FILES[0].parent / f"{name}.toml").read_text(encoding="utf-8"))
    (path,) = NOTEBOOKS.glob(f"{name}_*.ipynb")
    notebook = read_notebook(path)
    student = student_copy(notebook)["cells"]
    found = {}
    for exercise in exercises(notebook):
        answer, check = notebook["cells"][exercise.answers[0]], notebook["cells"][exercise.check]
        found[marks(check)["grade_id"].removesuffix("-check")] = {
            "solution": source(answer),
            "check": source(check),
            "student's check": source(student[exercise.check]),
        }
    cells = {cell["id"]: source(cell) for cell in notebook["cells"]}
    scope: dict[str, Any] = {"__name__": "__main__"}
    for text in [*(cells[cell] for cell in data["before"]), data.get("setup", "")]:
        exec(text, scope)
    return data, found, scope


def given(kind: str) -> list[Any]:
    """(lesson, exercise, answer) of all answers of a kind, with their reasons as names."""
    cases = []
    for path in FILES:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        for exercise, answers in data.items():
            for answer in answers.get(kind, []) if isinstance(answers, dict) else []:
                name = f"{path.stem}-{exercise}-{answer['why']}"
                cases.append(pytest.param(path.stem, exercise, answer, id=name))
    return cases


@pytest.fixture(autouse=True)
def _in_the_folder_of_the_lessons(monkeypatch):
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(NOTEBOOKS)
    for name in ("ALLSCAIP_MODEL", "ALLSCAIP_DATA"):
        monkeypatch.delenv(name, raising=False)


def run(name: str, answer: str, check: str) -> None:
    """An answer and a check after the cells that they need; what they change is forgotten."""
    scope = dict(lesson(name)[2])
    exec(answer, scope)
    exec(check, scope)


def test_each_lesson_has_answers():
    lessons = {path.stem[:2] for path in NOTEBOOKS.glob("*.ipynb")}
    assert {path.stem for path in FILES} == lessons


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_each_exercise_has_wrong_and_right_answers(name):
    data, found, _ = lesson(name)
    named = {key for key, value in data.items() if isinstance(value, dict)}
    assert named == found.keys()
    for exercise in found:
        assert len(data[exercise]["wrong"]) >= 3, exercise
        assert len(data[exercise]["right"]) >= 2, exercise


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_the_solutions_are_right(name):
    for texts in lesson(name)[1].values():
        run(name, texts["solution"], texts["check"])


@pytest.mark.parametrize("name, exercise, answer", given("right"))
def test_a_right_answer_is_taken(name, exercise, answer):
    texts = lesson(name)[1][exercise]
    run(name, answer["code"], texts["check"])


@pytest.mark.parametrize("name, exercise, answer", given("wrong"))
def test_a_wrong_answer_is_refused_with_a_message_that_helps(name, exercise, answer):
    texts = lesson(name)[1][exercise]
    with pytest.raises(AssertionError) as caught:
        run(name, answer["code"], texts["student's check"])
    message = str(caught.value)
    assert re.search(re.escape(answer["says"]), message), message


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_a_forgotten_return_is_refused_with_a_message_that_says_so(name):
    for exercise, texts in lesson(name)[1].items():
        functions = [f for f in ast.parse(texts["solution"]).body if isinstance(f, ast.FunctionDef)]
        empty = "".join(f"def {f.name}({ast.unparse(f.args)}): pass\n" for f in functions)
        with pytest.raises(AssertionError) as caught:
            run(name, empty, texts["student's check"])
        assert re.search(r"(?i)\breturns?\b", str(caught.value)), f"{exercise}: {caught.value}"
