"""The course as a static site: every lesson run once and written as a page, with an index.

In: the notebooks. Out: a folder of HTML files that need no kernel, no network and no server:
formulas become MathML, pictures and views are inside the page, and solutions are folded.
`python -m allscaip_lite.site --out site`, or `make site`. A run that was stopped goes on: a lesson
is run again only when it, or the package, has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import DictLoader, pass_context
from latex2mathml.converter import convert as to_mathml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from allscaip_lite import __version__
from allscaip_lite.classroom import BESIDE, marks, student_copy

PACKAGE = Path(__file__).parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
SECONDS_A_CELL = 600
TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
main { max-width: 62rem; margin: 0 auto; padding: 0 1rem 4rem; }
nav.course { font: 15px/1.5 system-ui, sans-serif; padding: 1rem 0; display: flex; gap: 1.5rem; }
math[display="block"] { margin: .6rem 0; font-size: 1.1em; }
details.solution > summary { cursor: pointer; font: 15px/1.5 system-ui, sans-serif; }
</style>
{%- endblock -%}
{%- block body_header -%}
{{ super() }}
<nav class="course"><a href="index.html">All lessons</a>{{ resources.neighbours }}</nav>
{%- endblock -%}
"""
INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1.0">
<title>allscaip-lite: the course</title>
<style>
body {{ font: 17px/1.6 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }}
h1 {{ font-size: 1.7rem; margin-bottom: .3rem; }}
ol {{ list-style: none; padding: 0; }}
li {{ border-top: 1px solid #ddd; padding: .8rem 0; }}
li a {{ font-weight: 600; font-size: 1.1rem; }}
li p {{ margin: .2rem 0 0; }}
footer {{ color: #666; font-size: .9rem; border-top: 1px solid #ddd; padding-top: .8rem; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #ddd; }}
  a {{ color: #8ab4f8; }} li, footer {{ border-color: #333; }} }}
</style></head><body>
<h1>allscaip-lite: the course</h1>
<p>How attention takes the place of physics in an interatomic potential, a part of the model at a
time. Each page is a notebook that was run; to run and change it yourself, clone the package and
type <code>make lab</code>.</p>
<ol>
{lessons}
</ol>
<footer>{footer}</footer>
</body></html>
"""
ITEM = '<li><a href="{page}">{title}</a>{about}</li>'
WIDGET = "<p><em>Here the notebook shows a view that needs a kernel: run it to see it.</em></p>"
SOLUTION = "<details class='solution'><summary>Solution</summary><pre>{code}</pre></details>"


class SiteError(ValueError):
    """A lesson that cannot be run or written; the message says which, and where."""


@dataclass(frozen=True)
class Lesson:
    """One page: its file's stem, title, first paragraph (Markdown) and executed notebook."""

    stem: str
    title: str
    about: str
    notebook: nbformat.NotebookNode


# --- formulas -----------------------------------------------------------------------------------


class _Renderer(IPythonRenderer):
    """Markdown as nbconvert renders it, but for formulas, which become MathML."""

    def inline_math(self, body: str) -> str:
        return to_mathml(body.strip(), display="inline")

    def block_math(self, body: str) -> str:
        return to_mathml(body.strip(), display="block")

    def latex_environment(self, name: str, body: str) -> str:
        return to_mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", display="block")


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        cell = context.get("cell", {})
        path = context.get("resources", {}).get("metadata", {}).get("path", "")
        renderer = _Renderer(
            escape=False,
            embed_images=True,
            path=path,
            attachments=cell.get("attachments", {}),
            exclude_anchor_links=True,
        )
        return MarkdownWithMath(renderer=renderer).render(source)


# --- lessons ------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Of all that a lesson's outputs depend on: the notebook, what lies beside it, the package."""
    digest = hashlib.sha256(path.read_bytes())
    beside = [p for p in path.parent.rglob("*") if p.suffix in BESIDE]
    package = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".js", ".c", ".safetensors")]
    for file in sorted([*beside, *package]):
        if not any(part.startswith(".") for part in file.relative_to(file.anchor).parts[-3:]):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def run_lesson(path: Path, kept: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run now, or taken from `kept` if nothing has changed since.

    Raises `SiteError`, with the cell's own message, where a cell fails.
    """
    before = kept / f"{path.stem}-{fingerprint(path)}.ipynb"
    if before.exists():
        print(f"{path.stem}: nothing has changed since it was run", flush=True)
        return nbformat.read(before, as_version=4)
    print(f"{path.stem}: running", flush=True)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, resources=place, timeout=SECONDS_A_CELL, kernel_name="python3"
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise SiteError(f"{path.name} does not run: {error.ename}: {error.evalue}") from error
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.glob(f"{path.stem}-*.ipynb"):
        old.unlink()
    partial = before.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(before)
    return notebook


def heading(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    """Title and first paragraph of a lesson, from its first cell."""
    text = notebook.cells[0].source if notebook.cells else ""
    title = re.search(r"^#\s+(.+)$", text, re.MULTILINE)
    if not title:
        raise SiteError("the first cell has no title: a line that begins with '# '")
    paragraphs = [p.strip() for p in text[title.end() :].split("\n\n") if p.strip()]
    return title[1].strip(), paragraphs[0] if paragraphs else ""


def without_widgets(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Widgets live in a kernel; a line takes their place, and progress bars go."""
    mime = "application/vnd.jupyter.widget-view+json"
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if mime in output.get("data", {}):
                bar = "%|" in output.data.get("text/plain", "")
                output.data = nbformat.from_dict({"text/html": "" if bar else WIDGET})
    return notebook


def fold_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Exercises as students get them, each solution folded below its check."""
    stubs = student_copy(nbformat.v4.upgrade(notebook))["cells"]
    cells, answers = [], []
    for cell, stub in zip(notebook.cells, stubs, strict=True):
        mark = marks(cell)
        if mark:
            answers += [cell.source] if mark.get("solution") else []
            cell = nbformat.from_dict({**cell, "source": stub["source"], "outputs": []})
        cells.append(cell)
        if mark.get("grade") and answers:
            code = html.escape("\n\n".join(answers))
            cells.append(nbformat.v4.new_markdown_cell(SOLUTION.format(code=code)))
            answers = []
    return nbformat.from_dict({**notebook, "cells": cells})


def write_site(notebooks: Sequence[Path], out: Path) -> list[Path]:
    """Run the notebooks and write their pages and `index.html`; the files written.

    Raises `SiteError` or `FileNotFoundError`; pages of an earlier site stay as they are then.
    """
    if not notebooks:
        raise FileNotFoundError("no notebooks: name the folder or the files")
    lessons = []
    for path in sorted(notebooks):
        try:
            executed = run_lesson(path, out / ".executed")
            page = without_widgets(fold_solutions(executed))
            lessons.append(Lesson(path.stem, *heading(executed), page))
        except ValueError as error:
            raise SiteError(f"{path.name}: {error}") from error
    exporter = _Exporter(
        extra_loaders=[DictLoader({"lesson.html.j2": TEMPLATE})], template_file="lesson.html.j2"
    )
    written = []
    for index, lesson in enumerate(lessons):
        beside = []
        for step, arrow in ((-1, "← {}"), (1, "{} →")):
            if 0 <= index + step < len(lessons):
                other = lessons[index + step]
                label = html.escape(arrow.format(other.title))
                beside.append(f'<a href="{other.stem}.html">{label}</a>')
        resources = {
            "neighbours": "".join(beside),
            "metadata": {"name": lesson.title, "path": str(notebooks[0].parent)},
        }
        page, _ = exporter.from_notebook_node(lesson.notebook, resources)
        written.append(out / f"{lesson.stem}.html")
        written[-1].write_text(page, encoding="utf-8")
    render = MarkdownWithMath(renderer=_Renderer(escape=False)).render
    items = "\n".join(
        ITEM.format(
            page=f"{lesson.stem}.html", title=html.escape(lesson.title), about=render(lesson.about)
        )
        for lesson in lessons
    )
    footer = f"Written by allscaip-lite {__version__}."
    written.append(out / "index.html")
    written[-1].write_text(INDEX.format(lessons=items, footer=footer), encoding="utf-8")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the course and write it as a static site."""
    parser = argparse.ArgumentParser(prog="python -m allscaip_lite.site", description=main.__doc__)
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="files or folders (default: the course)"
    )
    parser.add_argument("--out", type=Path, default=Path("site"), help="default: site")
    args = parser.parse_args(arguments)
    try:
        paths = []
        for path in args.notebooks or [NOTEBOOKS]:
            paths += sorted(path.glob("*.ipynb")) if path.is_dir() else [path]
        written = write_site([path.resolve() for path in paths], args.out)
    except (SiteError, OSError) as error:
        print(f"site: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsite: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    total = sum(path.stat().st_size for path in written) / 2**20
    print(f"{len(written)} pages, {total:.1f} MB: open {args.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
