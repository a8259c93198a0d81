"""The house itself: versions that agree everywhere, files that stay clean, commands that answer."""

from __future__ import annotations

import ast
import json
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


def makefile_variable(name: str) -> str:
    match = re.search(rf"^{name} := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match, f"the Makefile sets no {name}"
    return match[1]


@pytest.fixture(scope="module")
def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


@pytest.fixture(scope="module")
def environment() -> list:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def git(*arguments: str) -> list[str]:
    """Non-empty output lines of a git command in the repository; skips outside a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def repository_files() -> list[Path]:
    """Files that are, or could be, committed."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


# --- versions -----------------------------------------------------------------------------------


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
    extras = makefile_variable("TEST_EXTRAS")
    assert options == ["--constraint constraints.txt", f"--editable .[{extras}]"]

    listed = pins([line for line in pip if not line.startswith("--")])
    wanted = {canonicalize_name(r.name) for r in requirements(*extras.split(","))}
    assert set(listed) == wanted
    assert listed == {name: constraints[name] for name in wanted}


def test_environment_yml_python_satisfies_the_project(environment):
    (python,) = [e for e in environment if isinstance(e, str) and e.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))


def test_lab_extras_are_part_of_the_test_extras():
    lab = set(makefile_variable("LAB_EXTRAS").split(","))
    test = set(makefile_variable("TEST_EXTRAS").split(","))
    assert lab < test <= set(EXTRAS)


def test_viewer_script_has_the_version_of_its_python_package(constraints):
    assert makefile_variable("VIEWER") == f"3dmol@{constraints['py3dmol']}"


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


# --- files --------------------------------------------------------------------------------------


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


def test_committed_notebooks_carry_no_outputs():
    # The index is read, not the working tree: whoever runs a notebook may also run the tests.
    dirty = []
    for name in git("ls-files", "*.ipynb"):
        notebook = json.loads("\n".join(git("show", f":{name}")))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        if any(cell["outputs"] or cell["execution_count"] is not None for cell in code):
            dirty.append(name)
    assert not dirty, f"clear the outputs of {dirty} before committing"


def test_no_file_mentions_a_machine_or_a_registry():
    slash = "/"  # kept apart, so that this file passes its own test
    machine = rf"(?<![\w.~}}-]){slash}(?:work|root|home|Users|opt){slash}\w"
    registry = r"pypi\.(?:org|python)|pythonhosted\.|registry\.npmjs|download\.pytorch"
    pattern = re.compile(rf"{machine}|{registry}")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and data
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_python_lines_fit_the_house_width():
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in repository_files()
        if path.suffix == ".py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > 100
    ]
    assert not wide


def test_ci_runs_make_test_and_nothing_else():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    commands = [
        line.strip()
        for line in path.read_text().splitlines()
        if line.strip() and not line.startswith(("#", "set -", "cd "))
    ]
    assert commands == ["exec make test"]


def test_weights_and_sample_data_are_not_ignored_by_git():
    committed = ["allscaip_lite/weights/lite.safetensors", "data/sample/train.aselmdb"]
    made = ["data/generated/train.aselmdb", "runs/first/state.pt"]
    # With these options every path is answered by one line, which starts with "::" for no rule.
    lines = git("check-ignore", "--no-index", "--verbose", "--non-matching", *committed, *made)
    # A rule that begins with ! takes back an earlier one.
    ignored = [line.split("\t")[1] for line in lines if not re.match(r"::|[^:]*:\d+:!", line)]
    assert ignored == made


# --- the command line ---------------------------------------------------------------------------


def run_with(monkeypatch, capsys, behaviour, *arguments: str) -> tuple[int, str]:
    """Exit status and error text of `allscaip-lite train` with a stand-in for the training."""
    from types import ModuleType

    from allscaip_lite import cli

    room = ModuleType("allscaip_lite.training.loop")
    room.add_arguments = lambda parser: parser.add_argument("--data")
    room.run = behaviour
    monkeypatch.setitem(sys.modules, room.__name__, room)
    status = cli.main(["train", *arguments])
    return status, capsys.readouterr().err


def raising(error: BaseException):
    """A `run(args)` inside our package that raises."""
    scope = {"__name__": "allscaip_lite.training.loop", "error": error}
    exec("def run(args):\n    raise error", scope)
    return scope["run"]


def test_a_command_gets_its_arguments_and_gives_its_status(monkeypatch, capsys):
    seen = []
    status, _ = run_with(monkeypatch, capsys, lambda args: seen.append(args.data), "--data", "x")
    assert (status, seen) == (0, ["x"])
    assert run_with(monkeypatch, capsys, lambda args: 3)[0] == 3


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("the cutoff must be positive"), "allscaip-lite: the cutoff must be positive\n"),
        (FileNotFoundError("no data set in x"), "allscaip-lite: no data set in x\n"),
        (ModuleNotFoundError("no tblite", name="tblite.interface"), "allscaip-lite[labels-xtb]"),
    ],
)
def test_a_mistake_is_one_clear_line(monkeypatch, capsys, error, words):
    status, text = run_with(monkeypatch, capsys, raising(error))
    assert status == 2
    assert words in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("weight"), ModuleNotFoundError("x", name="ase.x")])
def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch, capsys, error):
    with pytest.raises(type(error)):
        run_with(monkeypatch, capsys, raising(error))


def test_a_library_s_value_error_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(ValueError, match="invalid literal"):
        run_with(monkeypatch, capsys, lambda args: int("a"))  # this file stands for a library


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    status, text = run_with(monkeypatch, capsys, raising(KeyboardInterrupt()))
    assert status == 130
    assert "goes on from its last checkpoint" in text


def test_version_and_a_missing_command(capsys):
    from allscaip_lite import __version__, cli

    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == f"allscaip-lite {__version__}"
    with pytest.raises(SystemExit) as done:
        cli.main([])
    assert done.value.code == 2


def test_every_command_has_a_room_that_offers_it():
    from allscaip_lite.cli import COMMANDS, DATA_COMMANDS

    for command in (*COMMANDS.values(), *DATA_COMMANDS.values()):
        tree = ast.parse((PACKAGE / f"{command.room.replace('.', '/')}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"add_arguments", "run"} <= functions, command.room


def test_info_prints_configuration_size_and_card(tmp_path, capsys):
    from allscaip_lite import PRESETS, AllScAIP, cli
    from allscaip_lite.checkpoints.native import save_model

    model = AllScAIP(PRESETS["lite"])
    save_model(model, tmp_path / "model.safetensors", card={"errors": {"energy": 1.5}})
    assert cli.main(["info", str(tmp_path / "model.safetensors")]) == 0
    text = capsys.readouterr().out
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,}" in text
    assert f"  hidden_size: {model.config.hidden_size}\n" in text
    assert "  errors:\n    energy: 1.5\n" in text

    assert cli.main(["info", str(tmp_path / "absent.safetensors")]) == 2
    assert "absent.safetensors" in capsys.readouterr().err
