"""Versions and dependencies: pyproject, constraints, environment.yml and make agree."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "allscaip_lite"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(lines: list[str]) -> dict[str, Version]:
    """Normalised names and versions of `name==version` lines; other lines are refused."""
    found = {}
    for line in lines:
        name, version = line.split("==")
        assert canonicalize_name(name) not in found, f"{name} is pinned twice"
        found[canonicalize_name(name)] = Version(version)
    return found


def requirements(*extras: str) -> list[Requirement]:
    """The core's requirements and those of the extras, an extra of our own taken apart."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += EXTRAS[extra]
    found = [Requirement(line) for line in lines]
    ours = [r for r in found if r.name == PROJECT["name"]]
    nested = {extra for r in ours for extra in r.extras} - set(extras)
    return requirements(*extras, *nested) if nested else [r for r in found if r not in ours]


@functools.cache
def recipe(target: str) -> str:
    """The commands with which make would make a target from nothing; none of them is run."""
    make = ["make", "--dry-run", "--always-make", f"PYTHON={sys.executable}", target]
    # without the flags of the make that may have started these tests
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(make, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    return run.stdout


def installed_extras(target: str) -> str:
    """The extras that make installs for a target."""
    (extras,) = re.findall(r"--editable [\"']?\.\[([\w,-]+)\]", recipe(target))
    return extras


@pytest.fixture(scope="module")
def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


@pytest.fixture(scope="module")
def environment() -> list:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_constraints_pin_every_dependency_inside_its_range(constraints):
    for requirement in requirements(*EXTRAS):
        name = canonicalize_name(requirement.name)
        assert name in constraints, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(constraints[name]), (
            f"{name}=={constraints[name]} is outside {requirement.specifier} of pyproject.toml"
        )


def test_environment_yml_is_the_environment_of_make_test(constraints, environment):
    (pip,) = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    options = [line for line in pip if line.startswith("--")]
    extras = installed_extras("test")
    assert options == ["--constraint constraints.txt", f"--editable .[{extras}]"]

    listed = pins([line for line in pip if not line.startswith("--")])
    wanted = {canonicalize_name(r.name) for r in requirements(*extras.split(","))}
    assert set(listed) == wanted
    assert listed == {name: constraints[name] for name in wanted}


def test_environment_yml_python_satisfies_the_project(environment):
    (python,) = [e for e in environment if isinstance(e, str) and e.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))


def test_lab_extras_are_part_of_the_test_extras():
    lab = set(installed_extras("lab").split(","))
    test = set(installed_extras("test").split(","))
    assert lab < test <= set(EXTRAS)


def test_viewer_script_has_the_version_of_its_python_package(constraints):
    assert f" 3dmol@{constraints['py3dmol']} " in recipe("lab")


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="an environment that make did not build"
)
def test_make_installed_the_pinned_versions(constraints):
    # setuptools, once imported, puts the packages that it carries inside itself on the path
    path = [place for place in sys.path if "_vendor" not in place]
    found = metadata.distributions(path=path)
    installed = {canonicalize_name(d.name): Version(d.version) for d in found}
    assert len(installed.keys() & constraints.keys()) > 100
    wrong = {
        name: str(version)
        for name, version in installed.items()
        if name in constraints and version.public != constraints[name].public
    }
    assert not wrong


def test_citation_names_this_version():
    from allscaip_lite import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == __version__
    assert citation["license"] == PROJECT["license"]


def test_everything_imported_is_a_declared_dependency():
    distributions = metadata.packages_distributions()
    declared = {canonicalize_name(r.name) for r in requirements(*EXTRAS)}
    missing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in {name.split(".")[0] for name in modules}:
                if module in sys.stdlib_module_names or module == PACKAGE.name:
                    continue
                owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
                if not owners & declared:
                    missing.add(f"{path.name}: {module}")
    assert not missing


@pytest.mark.slow
def test_the_core_needs_no_extra():
    # An extra's import name is its distribution's, or its first word (fairchem-core: fairchem).
    core = {r.name for r in requirements()}
    names = {"torch-sim-atomistic": "torch_sim"}
    extras = {r.name for r in requirements(*EXTRAS)} - core
    extras = {names.get(name, name.split("-")[0]) for name in extras}
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(extras)!r}))  # None: importing it raises ImportError
import allscaip_lite
allscaip_lite.AllScAIP(allscaip_lite.PRESETS["lite"])
for name in allscaip_lite.__all__:
    getattr(allscaip_lite, name)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_pin_can_be_installed_on_the_oldest_python(constraints):
    """Of what is installed here: 3.11.0 is a Python 3.11 too."""
    too_new = {
        name: distribution.metadata["Requires-Python"]
        for distribution in metadata.distributions()
        if (name := canonicalize_name(distribution.metadata["Name"])) in constraints
        and str(constraints[name]) == distribution.version
        and not SpecifierSet(distribution.metadata["Requires-Python"] or "").contains("3.11.0")
    }
    assert not too_new
