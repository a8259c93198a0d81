"""One's own structures into the package's format: `allscaip-lite data convert`.

In: files of any format that ASE reads, with energies (eV) and forces (eV/Å), and stress where
there is one. Out: one `.aselmdb` file to train on or to evaluate with.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from tqdm import tqdm

from allscaip_lite.data.aselmdb import write_aselmdb
from allscaip_lite.data.checks import (
    UNITS,
    check_apart,
    check_size,
    check_work,
    labels_under_any_name,
    unit_of_total,
    work_between,
)
from allscaip_lite.data.reading import file_and_index, read_structures
from allscaip_lite.electrons import (
    Assumptions,
    charge_and_spin,
    say_assumptions,
    state_charge_and_spin,
    state_where_missing,
)
from allscaip_lite.errors import DataError, StructureError, StructureWarning
from allscaip_lite.files import fingerprint, listed_paths

SAME = 1e-3  # eV; energies of one structure are no farther apart


def convert(
    files: str | Path | Sequence[str | Path],
    charge: int | None = None,
    spin: int | None = None,
    domain: str | None = None,
    progress: bool = True,
) -> Iterator[Atoms]:
    """Structures of files ASE reads, each with energy and forces, charge and spin multiplicity.

    Labels under other names (REF_energy, dft_forces, virial, …) are read too, see
    `checks.labels_under_any_name`; what was read so, and which charges were assumed, is said in
    warnings at the end.

    Args:
        files: names, each with ASE's index perhaps, as in `run.traj@100:200`; all structures are
            read otherwise.
        charge: total charge in e of structures that state none (see `charge_and_spin`).
        spin: multiplicity 2S + 1 of structures that state none.
        domain: their `data_id`; without it that is what a structure says, or the name of the file.
        progress: whether to show a progress bar.

    Yields:
        The structures, one by one.

    Raises:
        FileNotFoundError: for a file that does not exist.
        DataError: for a file that ASE cannot read, and for a structure without energy or forces,
            with labels that `checks` does not take, with a multiplicity its electrons forbid, or
            that came before with another energy; at its end, for a file whose energies are all 0,
            for one whose energies are in another unit than eV (a warning, where they are of one or
            two molecules, and hartree), and for a trajectory whose energies do not follow its
            forces.
    """
    assumed: Assumptions = {}
    taken: Counter[str] = Counter()
    places: dict[str, tuple[str, float]] = {}  # structures by what they are, and their energies
    twice: list[str] = []
    for name in listed_paths(files):
        path, _ = file_and_index(name)
        energies: list[tuple[str, float, str | None]] = []  # formulas, eV, and other units
        work: list[tuple[float, float]] = []
        before: Atoms | None = None
        for where, atoms in tqdm(read_structures(name), desc=path, disable=not progress):
            check_apart(atoms, where)
            labels = labels_under_any_name(atoms, where, taken)
            try:
                state_where_missing(atoms, where, charge, spin)
                state = charge_and_spin(atoms, where, assumed)
            except StructureError as error:
                raise DataError(
                    f"{error}: give the right --charge and --spin (2S + 1, 1 for a closed shell)"
                ) from error
            atoms.info = {"data_id": Path(path).stem, "source": where, **atoms.info}
            state_charge_and_spin(atoms, *state)
            if domain:
                atoms.info["data_id"] = domain
            atoms.calc = SinglePointCalculator(atoms, **labels)
            energy = labels["energy"]
            unit = unit_of_total(atoms, energy)
            energies.append((atoms.get_chemical_formula(), energy, unit))
            if unit is None:
                check_size(atoms, energy, where)
            if before and (step := work_between(before, atoms)):
                work.append(step)
            before = atoms.copy()
            before.calc = atoms.calc
            place = fingerprint([atoms.numbers, atoms.positions, atoms.cell.array, np.array(state)])
            known = places.setdefault(place, (where, energy))
            if known[0] != where:
                twice.append(f"{where} is {known[0]}")
                if abs(energy - known[1]) > SAME:
                    raise DataError(
                        f"{where} is {known[0]}, with an energy that is {energy - known[1]:.4g} eV "
                        "off: keep the right one"
                    )
            yield atoms
        _check_energies(path, energies)
        check_work(work, path)
    say_assumptions(assumed)
    if taken:
        listed = "; ".join(f"{count} structures: {what}" for what, count in taken.items())
        warnings.warn(f"labels under other names: {listed}", StructureWarning, stacklevel=2)
    if twice:
        warnings.warn(
            f"{len(twice)} structures come more than once, and count so often: {twice[0]}",
            StructureWarning,
            stacklevel=2,
        )


def _check_energies(path: str, energies: Sequence[tuple[str, float, str | None]]) -> None:
    """Raise `DataError` for energies of a file that are all 0, or in another unit; or warn of these
    where it may be chance.
    """
    if len(energies) > 1 and not any(energy for _, energy, _ in energies):
        raise DataError(f"{path}: all its energies are 0, which are no labels to learn")
    ((unit, count),) = Counter(unit for *_, unit in energies).most_common(1)
    if unit is None or 2 * count < len(energies):
        return
    text = (
        f"{path}: {count} of its {len(energies)} energies are, in {unit}, what all electrons of "
        f"these atoms have, and are read as eV: multiply them by {UNITS[unit]:.6g}, and the forces "
        "by their unit in eV/Å (1 hartree/bohr is 51.4221 eV/Å)"
    )
    if unit != "hartree" or len({formula for formula, *_ in energies}) > 2:
        raise DataError(text)
    warnings.warn(text, StructureWarning, stacklevel=3)


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data convert`."""
    parser.description = (
        "Convert structures with energies and forces, in any format that ASE reads (extxyz, traj, "
        "OUTCAR, ase.db, ...), into one .aselmdb file to train on or to evaluate with."
    )
    parser.add_argument("files", nargs="+", help="FILE, or FILE@100:200 for some of its structures")
    parser.add_argument("--out", type=Path, required=True, help="file to write (.aselmdb)")
    parser.add_argument("--charge", type=int, help="of structures that say none (default: 0)")
    parser.add_argument(
        "--spin", type=int, help="multiplicity of structures that say none (default: the lowest)"
    )
    parser.add_argument("--domain", help="their data_id (default: theirs, or the name of the file)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data convert`: convert, and say what came out; the exit status."""
    states: Counter[tuple[int, int]] = Counter()
    stresses: Counter[str] = Counter()

    def counted() -> Iterator[Atoms]:
        for atoms in convert(args.files, args.charge, args.spin, args.domain):
            states[atoms.info["charge"], atoms.info["spin"]] += 1
            stresses.update(["stress"] if "stress" in atoms.calc.results else [])
            yield atoms

    number = write_aselmdb(args.out, counted(), overwrite=args.overwrite)
    print(f"{args.out}: {number} structures, {stresses.total()} of them with a stress")
    for (charge, spin), count in sorted(states.items()):
        print(f"  charge {charge:+d}, multiplicity {spin}: {count}", file=sys.stderr)
    return 0
