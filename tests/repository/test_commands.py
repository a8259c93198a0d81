"""The command line: arguments go in, errors are one line, every command answers."""

from __future__ import annotations

import ast
import shlex
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from allscaip_lite import cli
from allscaip_lite.errors import InputError

PACKAGE = Path(__file__).resolve().parents[2] / "allscaip_lite"


def run_with(monkeypatch, capsys, behaviour, *arguments: str) -> tuple[int, str]:
    """Exit status and error text of `allscaip-lite train` with a stand-in for the training."""
    from types import ModuleType

    module = ModuleType("allscaip_lite.training.loop")
    module.add_arguments = lambda parser: parser.add_argument("--data")
    module.run = behaviour
    monkeypatch.setitem(sys.modules, module.__name__, module)
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
        (InputError("the cutoff must be positive"), "allscaip-lite: the cutoff must be positive\n"),
        (FileNotFoundError("no data set in x"), "allscaip-lite: no data set in x\n"),
        (RuntimeError("Could not determine home directory."), "set HOME to a folder"),
        (ModuleNotFoundError("no tblite", name="tblite.interface"), "allscaip-lite[labels-xtb]"),
    ],
)
def test_a_mistake_is_one_clear_line(monkeypatch, capsys, error, words):
    status, text = run_with(monkeypatch, capsys, raising(error))
    assert status == 2
    assert words in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [KeyError("weight"), ValueError("of an array"), ModuleNotFoundError("x", name="ase.x")],
)
def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch, capsys, error):
    with pytest.raises(type(error)):
        run_with(monkeypatch, capsys, raising(error))


def test_a_library_s_value_error_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(ValueError, match="invalid literal"):
        run_with(monkeypatch, capsys, lambda args: int("a"))  # this file stands for a library


@pytest.mark.parametrize(
    "text, words",
    [
        ("evaluate lite ''", "data: an empty text is no path"),
        ("train --data ' ' --out x", "--data: an empty text is no path"),
        ("data describe ''", "data: an empty text is no path"),
        ("relax O --fmax nan", "--fmax: nan is not finite"),
        ("md x.xyz --pressure inf", "--pressure: inf is not finite"),
    ],
)
def test_paths_are_not_empty_and_numbers_are_finite(capsys, text, words):
    with pytest.raises(SystemExit):
        cli.main(shlex.split(text))
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", [InputError, KeyboardInterrupt])
def test_the_message_comes_after_the_progress_bars(monkeypatch, capsys, kind):
    def progress():
        yield from tqdm(range(3))

    def run(args):
        bar = progress()
        next(bar)
        raise kind("no")

    lines = run_with(monkeypatch, capsys, run)[1].splitlines()
    assert lines[-1].startswith("allscaip-lite: ")


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    status, text = run_with(monkeypatch, capsys, raising(KeyboardInterrupt()))
    assert status == 130
    assert "goes on from what it saved last" in text


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
        tree = ast.parse((PACKAGE / f"{command.module.replace('.', '/')}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"add_arguments", "run"} <= functions, command.module


def test_info_prints_configuration_size_and_card(tmp_path, capsys):
    from allscaip_lite import PRESETS, AllScAIP, cli
    from allscaip_lite.checkpoints import save_model

    model = AllScAIP(PRESETS["lite"])
    save_model(model, tmp_path / "model.safetensors", card={"errors": {"energy": [1.5, 2 / 3]}})
    assert cli.main(["info", str(tmp_path / "model.safetensors")]) == 0
    text = capsys.readouterr().out
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,}" in text
    assert f"  hidden_size: {model.config.hidden_size}\n" in text
    assert "  errors:\n    energy: [1.5, 0.666667]\n" in text

    assert cli.main(["info", str(tmp_path / "absent.safetensors")]) == 2
    assert "absent.safetensors" in capsys.readouterr().err
