"""Structures out of files, whatever wrote them: the one reader of all commands.

In: a file of any format that ASE reads, or the package's own `.aselmdb`. Out: `ase.Atoms`, with the
charge and multiplicity that the file states in `info`, and labels as it has them. ASE's own reader
drops what a database keeps beside the atoms, and what inputs and outputs of programs say of charge
and spin; it guesses elements, and takes sites that are occupied in part. What is guessed is said.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.io.formats import ioformats, open_with_compression
from ase.utils import string2index

from allscaip_lite.data.aselmdb import Dataset, atoms_of_row
from allscaip_lite.data.checks import check_atoms
from allscaip_lite.errors import DataError, InputError, StructureWarning
from allscaip_lite.files import listed_paths

DATABASES = ("db", "json", "aselmdb")  # names of formats in ASE
BEYOND = 100  # lines behind the end of a file that a reader may ask for
# Text of which ASE takes what is left where it was cut short, by format: how it says its number of
# atoms, and how it ends.
COUNTS = {
    "dlp4": r".*\n\s*\d+\s+\d+\s+(\d+)",
    "gen": r"\s*(\d+)\s",
    "gromacs": r".*\n\s*(\d+)\s*\n",
    "mol": r"(?:.*\n){3} *(\d+)",
    "rmc6f": r"(?s:.*)Number of atoms:\s*(\d+)",
    "sdf": r"(?:.*\n){3} *(\d{1,3})",
}
ENDS = {
    "dmol-car": r"\nend\s*\nend\s*\Z",
    "gromos": r"\nEND\s*\Z",
    "proteindatabank": r"\nEND.*\s*\Z",
    "res": r"\nEND",
    "runnerdata": r"\nend\s*\Z",
    "turbomole": r"\n\$end",
}
# How texts state charge and multiplicity, which ASE drops, by format.
STATES = {
    "cjson": (r'"totalCharge"\s*:\s*(-?\d+)', r'"totalSpinMultiplicity"\s*:\s*(\d+)'),
    "espresso-in": (r"tot_charge\s*=\s*([-+]?\d+)", "(?!)"),  # the latter is nowhere
    "gamess-us-out": (r"CHARGE OF MOLECULE\s*=\s*(-?\d+)", r"(?:SPIN|STATE) MULT\w+\s*=\s*(\d+)"),
    "gaussian-out": (
        r"Charge\s*=\s*(-?\d+)\s+Mult",
        r"Charge\s*=\s*-?\d+\s+Multiplicity\s*=\s*(\d+)",
    ),
    "nwchem-in": (r"(?im)^[ \t]*charge\s+([-+]?\d+)", r"(?im)^[ \t]*mult\s+(\d+)"),
    "nwchem-out": (r"Charge\s*:\s*(-?\d+)", r"Spin multiplicity\s*:\s*(\d+)"),
    "orca-output": (r"Total Charge\s+Charge\s+\.+\s+(-?\d+)", r"Multiplicity\s+Mult\s+\.+\s+(\d+)"),
}
FULL = 0.99  # of a site
# An atom of a PDB file whose columns 77 and 78 name no element: ASE takes CA for calcium.
NO_ELEMENT = r"(?m)^(?:ATOM  |HETATM)(?:.{0,70}|.{70}(?: | {2}.*))$"
NO_CELL = (1.0, 1.0, 1.0, 90.0, 90.0, 90.0)  # Å and degrees: what PDB files say for none


def is_there(path: str | Path) -> bool:
    """Whether something has this name; nothing has one that is too long, as SMILES may be."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def file_and_index(name: str | Path, index: str = ":") -> tuple[str, str]:
    """A path and ASE's index: `run.traj@7` is 7 of run.traj, unless a file is called so."""
    path = str(name)
    if "@" in path and not is_there(path):
        path, _, index = path.rpartition("@")
    return path, index


def read_structures(name: str | Path, index: str = ":") -> Iterator[tuple[str, Atoms]]:
    """Each structure of a file, after the words that name it in messages.

    A name may have ASE's index, as in `run.traj@100:200`; `index` is for those that have none.
    Raises FileNotFoundError for a file that does not exist, DataError for one that ASE cannot read,
    or that holds no structures.
    """
    listed_paths(name)  # raises
    path, index = file_and_index(name, index)
    file = Path(path)
    if not is_there(file):
        raise FileNotFoundError(f"{path}: no such file")
    if file.is_dir():
        raise DataError(f"{path} is a folder: give the files in it")
    if not file.is_file():
        raise DataError(f"{path} is a device or a pipe: write what it gives to a file first")
    wanted = string2index(index)
    if isinstance(wanted, str):
        raise DataError(f"{path}@{index}: give numbers, as in {file.name}@0:10")
    start, step = (wanted.start, wanted.step) if isinstance(wanted, slice) else (wanted, 1)
    first = start or 0
    whole = path if first >= 0 and (step or 1) > 0 else f"{path}@{index}"  # numbers of the part
    count = partly = 0
    try:
        for atoms in _read(file, wanted):
            number = count if whole != path else first + count * (step or 1)
            check_atoms(atoms, where := f"{whole}, structure {number}")
            yield f"{where} ({atoms.symbols})", atoms
            count += 1
            partly += _partly_occupied(atoms)
    except InputError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} asks for more memory than there is") from error
    except Exception as error:  # ASE's readers raise whatever their parsing comes across
        if isinstance(error, OSError) and error.filename:  # the system's, not a parser's
            raise
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        place = f" after structure {count - 1}" if count else ""
        raise DataError(f"{path} is not a file that ASE can read{place} ({reason})") from error
    if partly:
        _say(
            file, f"sites of {partly} of its structures are occupied in part, and taken as a whole"
        )
    if not count:
        raise DataError(f"{name} has no structures")


def read_structure(name: str | Path) -> Atoms:
    """The last structure of a file, as ASE takes it, or the one of an index: `run.traj@7`."""
    return [atoms for _, atoms in read_structures(name, "-1")][-1]


def _read(file: Path, wanted: int | slice) -> Iterator[Atoms]:
    suffix = file.suffix.removeprefix(".").lower()
    kind = suffix if suffix == "aselmdb" else ase.io.formats.filetype(str(file))
    if kind in DATABASES:
        return _read_database(file, kind, wanted)
    if kind.startswith("lammps") and not _names_elements(file):
        raise DataError(
            f"{file} has types of atoms and not their elements: write a dump with a column element "
            "(dump_modify … element O H), a data file with masses, or turn it into .extxyz"
        )
    form = ioformats[kind]
    read = (
        _read_lines(file, kind, wanted)
        if form.acceptsfd and not form.isbinary
        else ase.io.iread(str(file), index=wanted, format=kind, do_not_split_by_at_sign=True)
    )
    if kind in COUNTS | ENDS | STATES or kind == "gromacs":
        return _with_the_text(file, kind, read)
    return read


def _read_lines(file: Path, kind: str, wanted: int | slice) -> Iterator[Atoms]:
    options: dict[str, Any] = {"attach_calculator": True} if kind == "gaussian-in" else {}
    with (
        open_with_compression(str(file), "rb") as content,
        _Lines(content, encoding=ioformats[kind].encoding or "utf-8-sig") as lines,
    ):
        for atoms in ase.io.iread(lines, index=wanted, format=kind, **options):
            yield _with_parameters(atoms) if options else atoms


def _names_elements(file: Path) -> bool:
    """Whether a file of LAMMPS tells elements or masses; ASE takes type 1 for hydrogen."""
    with open_with_compression(str(file), "rb") as lines:
        heads = (line.split() for line in lines if re.match(rb"ITEM: ATOMS|\s*Masses\b", line))
        return bool({b"element", b"mass", b"Masses"} & {*next(heads, [])})


def _with_the_text(file: Path, kind: str, read: Iterator[Atoms]) -> Iterator[Atoms]:
    """What ASE reads of a text, with the charge, multiplicity and cell that it drops.

    Raises EOFError for fewer atoms than the text says; warns where it ends in another way, where it
    states several charges, and of elements that ASE guesses from the names of atoms.
    """
    with open_with_compression(str(file), "rb") as content:
        text = content.read().decode(errors="replace")
    said = re.match(COUNTS.get(kind, "()"), text)
    stated = _stated(file, kind, text)
    cells = re.findall("(?m)^CRYST1.*$", text) if kind == "proteindatabank" else []
    cell = None
    if len(cells) == 1:  # of all its models
        cell = next(ase.io.iread(str(file), 0, kind, do_not_split_by_at_sign=True)).cell
    nameless = kind == "gromacs" or (kind == "proteindatabank" and re.search(NO_ELEMENT, text))
    guessed: dict[str, None] = {}
    for atoms in read:
        if said and said[1] and int(said[1]) > len(atoms):
            raise EOFError(f"it has {len(atoms)} of the {said[1]} atoms that it says")
        atoms.info |= stated
        if cell is not None:
            atoms.set_cell(cell)
            atoms.pbc = True
        if cells and np.allclose(atoms.cell.cellpar(), NO_CELL):
            atoms.set_cell(None)
            atoms.pbc = False
        if nameless:
            names = zip(map(str, atoms.arrays.get("atomtypes", ())), atoms.symbols, strict=True)
            guessed |= {f"{name} as {symbol}": None for name, symbol in names if name[1:].isalpha()}
        yield atoms
    if guessed:
        listed = ", ".join(list(guessed)[:12]) + " …" * (len(guessed) > 12)
        _say(file, f"its atoms have names and no elements, which ASE guesses: {listed}")
    if kind in ENDS and not re.search(ENDS[kind], text):
        _say(file, "it has no line at its end that says so: was it cut short?")


def _stated(file: Path, kind: str, text: str) -> dict[str, int]:
    """Charge and multiplicity of all structures of a text, where it states one of each."""
    stated: dict[str, int] = {}
    if kind in ("mol", "sdf"):
        charged = re.findall(r"\nM  CHG *\d+(.*)", text.partition("M  END")[0])  # atom, charge, …
        if charged:
            stated["charge"] = sum(int(n) for line in charged for n in line.split()[1::2])
    for name, pattern in zip(("charge", "spin"), STATES.get(kind, ()), strict=False):
        found = {int(number) for number in re.findall(pattern, text)}
        if len(found) > 1:
            _say(file, f"it has several values of {name}, {sorted(found)}, of which none was taken")
        elif found:
            stated[name] = found.pop()
    return stated


def _say(file: Path, text: str) -> None:
    warnings.warn(f"{file}: {text}", StructureWarning, stacklevel=2)


def _partly_occupied(atoms: Atoms) -> bool:
    """Whether a site of a CIF or PDB file has several elements, or none now and then."""
    sites = atoms.info.get("occupancy")
    if isinstance(sites, Mapping):
        return any(len(site) > 1 or min(site.values(), default=1) < FULL for site in sites.values())
    shares = atoms.arrays.get("occupancy", np.ones(1))
    return bool(((shares > 0) & (shares < FULL)).any())


class _Lines(io.TextIOWrapper):
    """Text, behind whose end nobody reads for ever because a count of atoms says so."""

    beyond = 0

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]  # as in typeshed
        line = super().readline(size)
        self.beyond = 0 if line else self.beyond + 1
        if self.beyond > BEYOND:
            raise EOFError("it has fewer lines than it says")
        return line


def _read_database(file: Path, kind: str, wanted: int | slice) -> Iterator[Atoms]:
    if kind == "aselmdb":
        data = Dataset(file, labelled=False)
        rows: Iterator[Atoms] = (data[number] for number in range(len(data)))
    else:
        database = ase.db.connect(file, type=kind, serial=True)
        rows = (atoms_of_row(row, f"{file}, row {row.id}") for row in database.select())
    if isinstance(wanted, slice) and all(
        number is None or number >= 0 for number in (wanted.start, wanted.stop)
    ):
        return itertools.islice(rows, wanted.start, wanted.stop, wanted.step)
    listed = list(rows)
    if isinstance(wanted, slice):
        return iter(listed[wanted])
    return iter([listed[wanted]] if -len(listed) <= wanted < len(listed) else [])


def _with_parameters(atoms: Atoms) -> Atoms:
    """With the charge and multiplicity of the calculator's input in `info`."""
    parameters = getattr(atoms.calc, "parameters", {})
    names = {"charge": "charge", "mult": "spin"}
    atoms.info |= {ours: parameters[key] for key, ours in names.items() if key in parameters}
    atoms.calc = None
    return atoms
