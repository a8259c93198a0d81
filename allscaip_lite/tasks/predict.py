"""Energies and forces of structures: `allscaip-lite predict`.

In: files that ASE reads, or SMILES where RDKit is installed. Out: a line a structure, and a file
with the results if one is asked for. `relax` and `vibrations` read their structures here too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.formats import UnknownFileTypeError, filetype, ioformats
from ase.stress import full_3x3_to_voigt_6_stress
from tqdm import tqdm

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.data.batches import fill_batches
from allscaip_lite.data.checks import check_apart
from allscaip_lite.data.reading import file_and_index, is_there, read_structures
from allscaip_lite.electrons import charge_and_spin, state_where_missing
from allscaip_lite.errors import WAYS, InputError
from allscaip_lite.files import atomic_write, check_writable
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.structures import check_structure

MAX_ATOMS = 400  # of a batch


def inputs(args: argparse.Namespace) -> Iterator[tuple[str, Atoms]]:
    """Each structure that the arguments name, after its name in messages.

    `--charge` and `--spin` count for structures that state none. Raises FileNotFoundError for what
    is neither a file nor SMILES, DataError for a file that ASE cannot read, StructureError for
    what no model can answer for.
    """
    for word in args.structures:
        known = is_there(file_and_index(word)[0])
        for name, atoms in read_structures(word) if known else _from_smiles(word):
            state_where_missing(atoms, name, args.charge, args.spin)
            check_structure(atoms, name)
            check_apart(atoms, name)
            atoms.calc = None
            yield name, atoms


def _from_smiles(word: str) -> Iterator[tuple[str, Atoms]]:
    """One conformer of a molecule, or of several side by side, at a minimum of a force field."""
    absent = f"{word}: no such file"
    if Path(word).suffix.removeprefix(".") in ase.io.formats.ioformats or Path(word).suffix in (
        ".aselmdb",
        ".xyz",
    ):
        raise FileNotFoundError(absent)
    try:
        from rdkit import Chem, rdBase
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{absent}; SMILES need RDKit: pip install 'allscaip-lite[labels-xtb]'"
        ) from error
    from allscaip_lite.labels.sampling import assemble, embed, parse_system

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(word.partition("|")[0])
        if molecule is None or not molecule.GetNumAtoms():
            raise FileNotFoundError(f"{absent}, and no SMILES")
        system = parse_system("", word)
        generator = np.random.default_rng(0)
        parts = [embed(part, generator, 1, wary=True)[0] for part in system.parts]
    atoms = assemble(parts, generator, 2.2) if len(parts) > 1 else parts[0]
    atoms.info = {"charge": system.charge, "spin": system.multiplicity, "smiles": word}
    yield word, atoms


def calculator_of(args: argparse.Namespace, dtype: torch.dtype | None = None) -> AllScAIPCalculator:
    """The calculator that the arguments describe."""
    return AllScAIPCalculator(
        args.model, args.device, dtype, args.kernels, outside_training=args.outside_training
    )


def check_format(file: Path, structures: int) -> bool:
    """Whether the format of a name keeps energies, forces, charge and spin: two of ASE's do.

    Raises `InputError`, before any work, where the format cannot hold the structures.
    """
    check_writable(file)
    try:
        form = ioformats[filetype(str(file), read=False)]
        writes = form.can_write and not (form.single and structures > 1)
    except (KeyError, UnknownFileTypeError):
        writes = False
    if not writes:
        raise InputError(
            f"--out {file}: give a format in which ASE writes {structures} structures, such as "
            ".extxyz"
        )
    return form.name in ("extxyz", "traj")


def write(file: Path, structures: list[Atoms]) -> None:
    """Write structures with their results, in ASE's format of the file's name.

    Raises InputError for a format that cannot hold them.
    """
    try:
        with atomic_write(file) as partial:
            ase.io.write(partial, structures if len(structures) > 1 else structures[0])
    except (UnknownFileTypeError, NotImplementedError, TypeError) as error:
        raise InputError(f"--out {file}: a format that ASE writes, such as .extxyz") from error


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of all commands on structures."""
    parser.add_argument(
        "structures",
        nargs="+",
        help="files that ASE reads (FILE@0:10 for some of their structures), or SMILES",
    )
    parser.add_argument("--model", default="lite", help="a name, or a file (default: lite)")
    parser.add_argument("--charge", type=int, help="of structures that state none (default: 0)")
    parser.add_argument(
        "--spin", type=int, help="multiplicity of structures that state none (default: the lowest)"
    )
    add_outside_option(parser)
    add_kernels_option(parser)
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")


def add_outside_option(parser: argparse.ArgumentParser) -> None:
    """The option `--outside-training` of a command."""
    parser.add_argument(
        "--outside-training",
        choices=WAYS,
        default="warn",
        help="where a structure has what the model did not see in training: warn, stop, or neither",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite predict`."""
    parser.description = (
        "Energies and forces of structures: files of any format that ASE reads, or SMILES where "
        "RDKit is installed, of which one conformer is made."
    )
    add_common_arguments(parser)
    parser.add_argument("--out", type=Path, help="write the structures with results, as .extxyz")


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite predict`."""
    found = list(inputs(args))
    if args.out and not check_format(args.out, len(found)):
        raise InputError(
            f"--out {args.out}: this format drops energies, forces, charge or spin: give .extxyz "
            "or .traj"
        )
    calculator = calculator_of(args)
    uncertain = calculator.model.posterior is not None
    done: list[Atoms] = []
    head = f"{'energy (eV)':>18} {'± (eV)':>9} {'largest force (eV/Å)':>21} {'pressure (bar)':>15}"
    print(f"{head}  charge  multiplicity  structure")
    groups = list(fill_batches([len(atoms) for _, atoms in found], MAX_ATOMS))
    for members in tqdm(groups, disable=len(groups) < 2):
        results = calculator.model.predict(
            [found[index][1] for index in members],
            outside_training=args.outside_training,
            uncertainty=uncertain,
        )
        for index, result in zip(members, results, strict=True):
            name, atoms = found[index]
            labels = {"energy": result.energy, "forces": result.forces}
            pressure = ""
            if result.stress is not None:
                labels["stress"] = full_3x3_to_voigt_6_stress(result.stress)
                pressure = f"{-np.trace(result.stress) / 3 / units.bar:.0f}"
            doubt = "" if result.uncertainty is None else f"{result.uncertainty:.3f}"
            largest = np.linalg.norm(result.forces, axis=1).max()
            charge, spin = charge_and_spin(atoms, name)
            tqdm.write(
                f"{result.energy:18.4f} {doubt:>9} {largest:21.4f} {pressure:>15}  "
                f"{charge:+6d}  {spin:12d}  {name}"
            )
            atoms.calc = SinglePointCalculator(atoms, **labels)
            done.append(atoms)
    if args.out:
        write(args.out, done)
        print(f"written: {args.out}")
