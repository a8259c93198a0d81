"""Every lesson is built alike: aims, sections, a summary, exercises that check themselves."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from notebooks.tools.class_copies import (
    LESSON_FILES,
    exercises,
    marks,
    read_notebook,
    source,
    student_copy,
)
from notebooks.tools.minutes import minutes

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem != "00_tour"]
# What a lesson may import besides Python's own: the packages of the lab.
ALLOWED = {
    "IPython",
    "MDAnalysis",
    "allscaip_lite",
    "ase",
    "data",  # the makers' shared modules, in the copy of the repository that the lab is in
    "fairchem",  # where it is installed
    "ipywidgets",
    "matplotlib",
    "nglview",
    "numpy",
    "py3Dmol",
    "scipy",
    "tblite",
    "torch",
    "tqdm",
}


def texts(path: Path, kind: str) -> list[str]:
    return [source(cell) for cell in read_notebook(path)["cells"] if cell["cell_type"] == kind]


def code_of(text: str) -> str:
    """Without the lines that only IPython understands."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("%", "!")))


def test_the_course_is_there() -> None:
    names = [path.stem[:2] for path in NOTEBOOKS]
    assert names == sorted(set(names)) and {"00", "01", "02", "03", "04", "05", "06", "07"} <= set(
        names
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_aims_come_first_and_a_title(path: Path) -> None:
    first = read_notebook(path)["cells"][0]
    assert first["cell_type"] == "markdown" and source(first).startswith("# ")
    assert re.search(r"\*\*After this (lesson|notebook) you can\*\*", source(first))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_says_what_it_needs_and_ends_with_summary_and_exercises(path: Path) -> None:
    words = texts(path, "markdown")
    assert "You need:" in words[0] and re.search(r"minute|second", words[0])
    whole = "\n".join(words)
    assert whole.index("## Summary") < whole.index("## Exercises")
    found = exercises(read_notebook(path))
    assert len(found) >= 3
    headings = [i for i, cell in enumerate(read_notebook(path)["cells"]) if _is_heading(cell)]
    assert min(found[0].answers) > headings[-1], "sections go on after the exercises"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_minutes_in_the_tables_are_those_of_its_length(path: Path) -> None:
    reading, exercises_too = minutes(path)
    stated = -(-(reading + exercises_too) // 5) * 5
    assert reading <= 50 and stated <= 90  # what docs/teaching.md plans for a session
    root = path.parents[1]
    assert f"| `{path.stem}` | {stated} |" in (root / "docs" / "teaching.md").read_text("utf-8")
    row = re.search(rf"(?m)^\| \[{path.stem[:2]}\].*$", (root / "README.md").read_text("utf-8"))
    assert f" | {stated} | " in row[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_sections_are_numbered_without_a_gap(path: Path) -> None:
    numbers = re.findall(r"(?m)^## (\d+)\. ", "\n".join(texts(path, "markdown")))
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)] and numbers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_names_where_its_ideas_come_from_and_what_to_read_next(path: Path) -> None:
    whole = "\n".join(texts(path, "markdown"))
    debts = re.split(r"(?m)^(?:## |\*\*)Where the ideas come from", whole)
    assert len(debts) == 2 and "To read next:" in debts[1].partition("## Exercises")[0]


def _is_heading(cell: dict) -> bool:
    return cell["cell_type"] == "markdown" and bool(re.search(r"(?m)^## ", source(cell)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_imports_what_the_lab_has_and_is_no_second_model(path: Path) -> None:
    for text in texts(path, "code"):
        for node in ast.walk(ast.parse(code_of(text))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = []
            for name in names:
                root = name.partition(".")[0]
                assert root in ALLOWED or root in sys.stdlib_module_names, name
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                assert not any("Module" in base for base in bases), f"{node.name} is a model"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_lines_can_be_read(path: Path) -> None:
    wide = [
        line
        for text in texts(path, "code")
        for line in text.splitlines()
        if len(line) > 100 and not line.lstrip().startswith(('f"', '"', "f'"))
    ]
    assert not wide


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_figure_has_a_text_for_those_who_cannot_see_it(path: Path) -> None:
    shown = 0
    for text in texts(path, "code"):
        for node in ast.walk(ast.parse(code_of(text))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "plt.show", "show(…) of notebook.plots takes the text"
                shown += called == "show"
    assert shown or "plt." not in "".join(texts(path, "code"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_exercise_says_how_hard_it_is_and_how_long_it_takes(path: Path) -> None:
    notebook = read_notebook(path)
    for exercise in exercises(notebook):
        statement = source(notebook["cells"][exercise.check - 2])
        assert re.search(r"(?i)(easy|medium|hard)[^.]*\d+ min", statement), exercise.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_asks_for_a_prediction_a_derivation_and_an_opinion(path: Path) -> None:
    """The last two are graded by hand: a question, and an answer with points that students lack."""
    cells = read_notebook(path)["cells"]
    by_hand = [
        (source(cells[index - 1]), source(cell), marks(cell)["points"])
        for index, cell in enumerate(cells)
        if cell["cell_type"] == "markdown" and marks(cell).get("solution")
    ]
    assert len(by_hand) == 2
    (paper, _, _), (opinion, _, _) = by_hand
    assert re.search("(?i)on paper", paper) and re.search(r"(?i)\bopen\b", opinion)
    for question, answer, points in by_hand:
        assert re.search(r"\d+ min", question) and points >= 3 and re.search(r"(?i)point", answer)
    assert "**Predict first" in "".join(texts(path, "markdown"))
    rows = (path.parents[1] / "docs" / "teaching.md").read_text(encoding="utf-8")
    kinds = re.findall(rf"(?m)^\| {path.stem[:2]} \*\S+\* \| (on paper|open)?", rows)
    assert kinds == [""] * len(exercises(read_notebook(path))) + ["on paper", "open"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_check_does_not_give_the_answer_away(path: Path) -> None:
    """No line of a solution stands in the check that follows it."""
    cells = read_notebook(path)["cells"]
    for exercise in exercises(read_notebook(path)):
        check = source(cells[exercise.check])
        assert "assert" in check and "Right" in check
        for index in exercise.answers:
            inside = re.search(
                r"### BEGIN SOLUTION(.*)### END SOLUTION", source(cells[index]), re.DOTALL
            )
            lines = [line.strip() for line in inside[1].splitlines() if len(line.strip()) > 25]
            assert not [line for line in lines if line.removeprefix("return ") in check]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_valid_notebook_for_a_python_kernel(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)  # first, for validating gives new names
    nbformat.validate(notebook)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(source(cell).strip() for cell in notebook["cells"]), "an empty cell"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_that_it_reads_are_there_and_go_into_the_class(path: Path) -> None:
    code = "\n".join(texts(path, "code"))
    for name in set(re.findall(r"[\"'](molecules/[^\"']+)[\"']", code)):
        assert (path.parent / name).is_file(), name
        assert Path(name).suffix in LESSON_FILES, f"the class would not get {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_links_to_nothing_outside_of_its_folder(path: Path) -> None:
    """Copies of a lesson are in a folder of their own, where such a link would lead nowhere."""
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(texts(path, "markdown")))
    outside = [link for link in links if not re.match(r"https?://|#|attachment:", link)]
    assert not [
        link for link in outside if not (path.parent / link).resolve().is_relative_to(path.parent)
    ]
    assert all((path.parent / link.partition("#")[0]).exists() for link in outside)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_exercise_is_statement_answer_and_check_in_a_row(path: Path) -> None:
    notebook, asked = read_notebook(path), []
    for exercise in exercises(notebook):
        assert exercise.answers == (exercise.check - 1,), exercise.name
        statement = notebook["cells"][exercise.check - 2]
        assert statement["cell_type"] == "markdown"
        asked.append(int(re.match(r"\*\*(\d+)\. ", source(statement))[1]))
    assert asked == [*range(1, len(asked) + 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stub_is_a_function_that_says_what_it_takes_and_that_the_check_calls(path: Path) -> None:
    notebook = read_notebook(path)
    stubs = student_copy(notebook)["cells"]
    for exercise in exercises(notebook):
        body = ast.parse(source(stubs[exercise.answers[0]])).body
        assert body and all(isinstance(node, ast.FunctionDef) for node in body), exercise.name
        assert all(ast.get_docstring(function) for function in body), exercise.name
        check = source(stubs[exercise.check])
        assert any(f"{function.name}(" in check for function in body), exercise.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_assertion_that_students_see_says_what_is_wrong(path: Path) -> None:
    notebook = read_notebook(path)
    stubs = student_copy(notebook)["cells"]
    for exercise in exercises(notebook):
        silent = [
            ast.unparse(node.test)
            for node in ast.walk(ast.parse(source(stubs[exercise.check])))
            if isinstance(node, ast.Assert) and node.msg is None
        ]
        assert not silent, f"{exercise.name}: no message after {silent}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nbgrader_takes_it_and_makes_the_same_student_copy(path: Path) -> None:
    nbgrader = pytest.importorskip("nbgrader.preprocessors", reason="nbgrader is not installed")
    import nbformat

    theirs = nbformat.read(path, as_version=4)
    # those of `nbgrader generate_assignment`, but for its database and its test templates
    steps = ["LockCells", "ClearSolutions", "ClearOutput", "CheckCellMetadata", "ComputeChecksums"]
    steps += ["ClearHiddenTests", "ClearMarkScheme", "ComputeChecksums", "CheckCellMetadata"]
    for name in steps:
        theirs, _ = getattr(nbgrader, name)().preprocess(theirs, {})
    ours = student_copy(json.loads(path.read_text(encoding="utf-8")))
    for mine, other in zip(ours["cells"], theirs.cells, strict=True):
        assert mine["source"].strip() == other.source.strip()
        if marks(mine).get("locked"):
            assert other.metadata.editable is False and mine["metadata"]["editable"] is False


def test_a_part_of_the_bundled_data_is_not_replaced(monkeypatch, capsys) -> None:
    from allscaip_lite.errors import DataError
    from allscaip_lite.notebook.lessons import open_data

    monkeypatch.setenv("ALLSCAIP_DATA", "of/mine")
    train, val = open_data("train", part="ethanol"), open_data("val", part="ethanol")
    assert "ethanol/train.aselmdb: 200 structures" in capsys.readouterr().out
    runs = [{atoms.info["source"].split("/")[2] for atoms in data} for data in (train, val)]
    assert {str(atoms.symbols) for atoms in val} == {"C2OH6"} and not runs[0] & runs[1]
    with pytest.raises(DataError, match="copy of the repository"):
        open_data("train", part="propanol")


@pytest.mark.slow
def test_the_lesson_on_released_models_runs_with_a_file_of_their_kind(
    monkeypatch, tmp_path, capsys
):
    """Random weights in the official format, with neither of the two encodings: as with 85M."""
    plt = pytest.importorskip("matplotlib.pyplot")
    from allscaip_lite import AllScAIP
    from allscaip_lite.checkpoints import save_official
    from allscaip_lite.config import PRESETS
    from allscaip_lite.notebook import plots

    small = PRESETS["85M"].replace(hidden_size=64, num_layers=2, num_heads=2)
    file = save_official(AllScAIP(small).eval(), tmp_path / "theirs.pt")
    plt.switch_backend("Agg")
    monkeypatch.setenv("ALLSCAIP_MODEL", str(file))
    monkeypatch.delenv("ALLSCAIP_DATA", raising=False)
    monkeypatch.chdir(NOTEBOOKS[0].parent)
    monkeypatch.setattr(plots, "show", lambda text: plt.close("all"))
    scope = {"__name__": "__main__"}
    (lesson,) = (path for path in NOTEBOOKS if path.stem == "11_released_model")
    for text in texts(lesson, "code"):
        exec(text, scope)
    printed = capsys.readouterr().out
    assert "official format: theirs.pt" in printed and scope["without"] is scope["model"]
    assert list(scope["curves"]) == ["the model of the file"] and printed.count("Right.") == 3
