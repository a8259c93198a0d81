"""The course as a static site, from two small notebooks of its own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

pytest.importorskip("latex2mathml", reason="the site extra is not installed")

from allscaip_lite import site

MARKS = {"schema_version": 3, "task": False, "grade": False, "locked": False, "solution": False}
CHECK = {"grade": True, "locked": True, "points": 1}


def lesson(path: Path, *cells: nbformat.NotebookNode) -> Path:
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return path


@pytest.fixture
def course(tmp_path: Path) -> list[Path]:
    md, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    answer = code(
        "def twice(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION",
        metadata={"nbgrader": MARKS | {"grade_id": "a", "solution": True}},
    )
    check = code(
        "assert twice(3) == 6\nprint('right answer')",
        metadata={"nbgrader": MARKS | CHECK | {"grade_id": "b"}},
    )
    about = md("# Sums & limits\n\nWhat $a_i$ is.\n\nMore.\n\n$$\\frac{1}{2}$$")
    first = lesson(
        tmp_path / "01_sums.ipynb",
        about,
        code("from pathlib import Path\nPath('ran').open('a').write('x')\nprint(6 * 7)"),
        answer,
        check,
    )
    return [first, lesson(tmp_path / "02_more.ipynb", md("# More\n\nText."))]


def test_pages_need_nothing_from_outside(course: list[Path], tmp_path: Path) -> None:
    assert site.main([*map(str, course), "--out", str(tmp_path / "site")]) == 0
    index, page = ((tmp_path / "site" / n).read_text() for n in ("index.html", "01_sums.html"))
    assert 'href="01_sums.html">Sums &amp; limits</a>' in index and 'href="02_more.html"' in index
    assert "<mi>a</mi>" in index and "More." not in index  # the first paragraph only
    assert "<mfrac>" in page and "42" in page and "$$" not in page
    assert 'href="02_more.html">More →</a>' in page
    for text in (index, page):
        assert "<script src" not in text and "unpkg" not in text and "cdnjs" not in text
    before, solution = page.split("<summary>Solution</summary>")
    assert "YOUR CODE HERE" in before and "BEGIN" not in before
    assert "return 2 * x" in solution
    assert page.count("right answer") == 1  # in the check's code: an answer's output would tell


def test_a_lesson_is_run_again_only_when_it_changed(course: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "site"
    for _ in range(2):
        site.write_site(course, out)
    assert (tmp_path / "ran").read_text() == "x"
    notebook = nbformat.read(course[0], as_version=4)
    notebook.cells[1].source += "\nprint('anew')"
    nbformat.write(notebook, course[0])
    site.write_site(course, out)
    assert (tmp_path / "ran").read_text() == "xx"
    assert "anew" in (out / "01_sums.html").read_text()


def test_a_lesson_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = nbformat.v4.new_code_cell("1 / 0")
    broken = lesson(tmp_path / "03_broken.ipynb", nbformat.v4.new_markdown_cell("# B"), code)
    assert site.main([str(broken), "--out", str(tmp_path / "site")]) == 2
    assert "03_broken.ipynb does not run: ZeroDivisionError" in capsys.readouterr().err
    untitled = lesson(tmp_path / "04.ipynb", nbformat.v4.new_markdown_cell("no title"))
    assert site.main([str(untitled), "--out", str(tmp_path / "site")]) == 2
    assert "has no title" in capsys.readouterr().err
    assert site.main([str(tmp_path / "none"), "--out", str(tmp_path / "site")]) == 2
