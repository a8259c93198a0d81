"""Import rules that import-linter has no words for: what may be imported, and what nothing may."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import allscaip_lite

ROOT = Path(__file__).resolve().parents[2]
RULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
MODEL = next(rule["layers"] for rule in RULES if rule["type"] == "layers")
SCRIPT_FOLDERS = ("data", "docs", "make", "run")
# by the makers of data
SHARED = ("data.xtb.systems.", "data.xtb.splits.", "data.crystals.prototypes")
# by studies and lessons besides
STUDIED = (
    "data.long_range.ions.",
    "data.long_range.curves.",
    "data.water.boxes.",
    "data.xtb.sets.",
    "docs.studies.report.",
)


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
    """They share eight modules, and by no detour: `import_module` is for the tests."""
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
        and not (name.startswith(SHARED + STUDIED) and file.is_relative_to(ROOT / "data"))
        and not (name.startswith(STUDIED) and file.is_relative_to(ROOT / "docs" / "studies"))
    }
    assert len(files) > 60
    assert not found
    assert not [file for file in files if 'import_module("data' in file.read_text()]


def test_the_command_line_and_workers_that_label_do_without_torch():
    modules = ("cli", "data.convert", "labels.command", "labels.dft", "labels.xtb")
    imports = ", ".join(f"allscaip_lite.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_has_the_names_that_it_imports_when_they_are_used():
    code = (
        "import allscaip_lite as package; assert set(package.__all__) <= set(dir(package)); "
        "from allscaip_lite import *; assert load_model is package.load_model; "
        "assert StructureError.__module__ == 'allscaip_lite.errors'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = allscaip_lite.load_modle
