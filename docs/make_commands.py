"""Write docs/commands.md from the parser of `allscaip-lite`, as `--help` shows it.

    python docs/make_commands.py

A test compares the page with what this script would write.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from allscaip_lite import cli

PAGE = Path(__file__).with_name("commands.md")
INTRODUCTION = """# Commands

Every command of `allscaip-lite`, with its arguments. `python docs/make_commands.py` writes this
page from what `--help` prints. The exit status is 0 when all is done, 2 for a mistake that the
message explains, 130 after Ctrl-C.

[Using the models](using.md) has examples. Scripts that make the data of this repository are in
[`data/`](data.md), those of the studies in [`docs/studies/`](studies.md); each has `--help`.
`make help` lists what `make` does.
"""


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands below a parser that have no further commands below them."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for command in group.choices.values():
            yield from leaves(command)


def values(action: argparse.Action) -> str:
    """What follows an option on the command line: `FILE [FILE ...]`."""
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.metavar is None and action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(action.nargs, int):
        return " ".join(name if isinstance(name, tuple) else [name] * action.nargs)
    forms = {None: "{0}", "?": "[{0}]", "*": "[{0} ...]", "+": "{0} [{0} ...]"}
    return forms[action.nargs].format(name)


def entry(action: argparse.Action) -> str:
    """An argument as an item of a list: how it is typed, what it does, its default."""
    typed = [f"`{option} {values(action)}".rstrip() + "`" for option in action.option_strings]
    text = (action.help or "").replace("*", r"\*") % vars(action)
    notes = ["required"] if action.required and action.option_strings else []
    absent = str(action.default) in ("None", "False", "[]", argparse.SUPPRESS)
    if action.option_strings and not absent:
        shown = action.default if isinstance(action.default, list | tuple) else [action.default]
        notes += [] if "default" in text else [f"default: {' '.join(map(str, shown))}"]
    name = ", ".join(typed) or f"`{values(action)}`"
    note = f" ({', '.join(notes)})" if notes else ""
    return f"- {name}{note}" + (f": {text}" if text else "")


def section(parser: argparse.ArgumentParser) -> str:
    """A command's heading, what it does and its arguments."""
    entries = [
        entry(action)
        for action in parser._actions
        if action.help is not argparse.SUPPRESS and action.dest != "help"
    ]
    about = f"{parser.description[0].upper()}{parser.description[1:].rstrip('.')}."
    return "\n".join([f"## `{parser.prog}`", "", about, "", *entries, ""])


def page() -> str:
    """The whole page."""
    names = [*cli.COMMANDS, *cli.DATA_COMMANDS]
    commands = list(leaves(cli._parser(names)))
    return INTRODUCTION + "".join(f"\n{section(command)}" for command in commands)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
