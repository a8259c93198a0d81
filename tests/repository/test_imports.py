"""Import rules that import-linter has no words for: what may be imported, and what nothing may."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
MODEL = next(rule["layers"] for rule in RULES if rule["type"] == "layers")
SCRIPT_FOLDERS = ("data", "docs", "make", "run")


def imported(source: str) -> set[str]:
    """What a source imports, as "module.name", inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODEL)
def test_the_model_imports_torch_numpy_ase_vesin_and_itself(module):
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    own = tuple(f"{name}." for name in MODEL)
    others = {name for name in imported(source) if not f"{name}.".startswith(own)}
    libraries = {name.partition(".")[0] for name in others} - sys.stdlib_module_names
    assert libraries <= {"ase", "numpy", "torch", "vesin"}


def test_nothing_imports_a_maker_or_a_study():
    files = [
        *ROOT.glob("allscaip_lite/**/*.py"),
        *ROOT.glob("data/*/*.py"),
        *ROOT.glob("docs/**/*.py"),
    ]
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported(file.read_text())
        if name.partition(".")[0] in SCRIPT_FOLDERS
    }
    assert len(files) > 60
    assert not found
