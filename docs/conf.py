"""Settings of the site: pages, API reference and course, made by `make site` without a network.

The source folder is the repository, so that links between pages hold there and on the site. With
SITE_EXECUTE=1 the lessons are run first, and their pages show the outputs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import BuiltinFunctionType

from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxTranslator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from allscaip_lite import __version__  # noqa: E402

project = "allscaip-lite"
author = copyright = "allscaip-lite contributors"  # noqa: A001
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
viewcode_follow_imported_members = False
root_doc = "README"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/**/*.md",
    "data/*/README.md",
    "allscaip_lite/weights/README.md",
    "notebooks/*.ipynb",
]

exclude_patterns = [".*", "**/.*", "build", "class", "dist", "runs", "site"]

html_theme = "furo"
html_title = f"allscaip-lite {__version__}"
html_show_sourcelink = html_copy_source = False
# Formulas become MathML, which browsers draw by themselves: no script, no fonts, no network.
html_math_renderer = "mathml"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
nb_execution_mode = "force" if os.environ.get("SITE_EXECUTE", "0") != "0" else "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # seconds a cell
nb_merge_streams = True
nb_code_prompt_show = "Solution"
nb_code_prompt_hide = "Hide the solution"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # torch's docstrings refer to torch's pages
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
# The package's docstrings write `name` for code, as Markdown does.
default_role = "code"

CONTENTS = """

```{toctree}
:hidden:
:caption: The course
:glob:
notebooks/*
```

```{toctree}
:hidden:
:caption: Use
docs/using
docs/commands
docs/data
docs/cluster
docs/limits
```

```{toctree}
:hidden:
:caption: Measured
:glob:
docs/accuracy
docs/training
docs/speed
docs/studies
docs/studies/*/README
```

```{toctree}
:hidden:
:caption: Reference
docs/code
docs/api/index
docs/glossary
docs/teaching
CONTRIBUTING
CHANGELOG
docs/log
```

```{toctree}
:hidden:
:caption: Cards
:glob:
allscaip_lite/weights/README
data/*/README
```
"""
MODULE = """
## `{1}`

```{{eval-rst}}
.. automodule:: allscaip_lite.{0}.{1}
```
"""
FOLDED = "<details>\n<summary>Solution</summary>\n\n{}\n\n</details>"
REDIRECT = (
    '<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={0}.html">'
)


def prepare(app: Sphinx, name: str, content: list[str]) -> None:
    """Add the README's contents and a package's modules; fold the solutions of a lesson."""
    if name == app.config.root_doc:
        content[0] += CONTENTS
    elif name.startswith("docs/api/"):
        package = Path(name).stem
        for file in sorted((ROOT / "allscaip_lite" / package).glob("[!_]*.py")):
            content[0] += MODULE.format(package, file.stem)
    elif name.startswith("notebooks/"):
        notebook = json.loads(content[0])
        for cell in notebook["cells"]:
            if not cell["metadata"].get("nbgrader", {}).get("solution"):
                continue
            if cell["cell_type"] == "code":
                cell["metadata"].setdefault("tags", []).append("hide-input")
            else:
                cell["source"] = FOLDED.format("".join(cell["source"]))
        content[0] = json.dumps(notebook)


def as_restructured_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """In a docstring |u| is an absolute value, and what is indented after a colon is code."""
    for index, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[index] = "`".join(parts)
    indents = [len(line) - len(line.lstrip()) for line in lines]
    for index in range(len(lines) - 2):
        opens = lines[index].endswith(":") and not lines[index].endswith("::")
        if opens and not lines[index + 1] and indents[index + 2] > indents[index]:
            lines[index] += ":"


def is_foreign(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Leave out what a module has from C code, such as torch's linear."""
    return True if isinstance(obj, BuiltinFunctionType) else None


def formula(translator: SphinxTranslator, node) -> None:  # noqa: ANN001 - inline or block
    """Write a formula as MathML."""
    from docutils import nodes

    display = "inline" if node.tagname == "math" else "block"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def first_page(app: Sphinx, error: Exception | None) -> None:
    """Let the folder's index.html show the README."""
    if error is None and app.builder.format == "html":
        page = Path(app.outdir) / "index.html"
        page.write_text(REDIRECT.format(app.config.root_doc), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", prepare)
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("autodoc-skip-member", is_foreign)
    app.connect("build-finished", first_page)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
