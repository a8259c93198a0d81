"""Labels as the package keeps them: the one check of all that is written and read.

In: energies, forces and stresses in the shapes and under the names that programs use. Out: energy
as one number (eV), forces (N, 3) (eV/Å), stress (6,) (eV/Å³, ASE's signs and Voigt order), all
finite; or an error that says what was found.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from scipy.spatial import cKDTree

from allscaip_lite.errors import COINCIDENT, DataError

LABELS = ("energy", "forces", "stress")
Labels = dict[str, Any]  # by names of LABELS: a float, arrays (N, 3) and (6,)
# REF_energy, DFT-forces, energy_ref, total_energy (eV), virials …: the quantity, and words by it
_WORD = r"(?:reference|ref|dft|qm|target|label|total|tot|potential|ev|ang(?:strom)?|a)"
_SPELLING = re.compile(
    rf"(?:{_WORD}[^a-z0-9]*)*(energy|forces?|stress|virials?)[^a-z0-9]*(?:{_WORD}[^a-z0-9]*)*"
)
SYMMETRIC = 1e-3  # of the largest component: a stress that is less symmetric is something else
# What rounding may take from a label, relative to its size and in its unit; of a total energy, a
# large number of which small differences count, no more than float32 or three decimals do.
ROUNDING = {"energy": (1e-7, 1e-3), "forces": (1e-5, 1e-5), "stress": (1e-5, 1e-5)}
# Units that energies of other programs are in, in eV.
UNITS = {
    "hartree": units.Hartree,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
}
SHORT = 0.2  # Å, of a step of a trajectory
STEPS = 10  # of it, that say whether forces belong to energies
BOUND = (0.99, 1.03)  # energies of molecules over those of their atoms by `free_atom`


def check_atoms(atoms: Atoms, where: str) -> None:
    """Raise `DataError`, naming it, for an atom without an element or a place, or none."""
    if not isinstance(atoms, Atoms):
        raise DataError(f"{where} is a {type(atoms).__name__}, not an ase.Atoms")
    if not len(atoms):
        raise DataError(f"{where} has no atoms")
    for index, number in enumerate(atoms.numbers):
        if not 0 < number < len(chemical_symbols) or number % 1:
            raise DataError(f"{where}: atom {index} has the atomic number {number}, of no element")
    for name, values in (("positions", atoms.positions), ("cell", atoms.cell.array)):
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).all(1)))
            raise DataError(f"{where}: row {row} of its {name} is not finite")


def check_apart(atoms: Atoms, where: str) -> None:
    """Raise `DataError`, naming it, where two atoms stand on one spot."""
    if len(same := cKDTree(atoms.positions).query_pairs(COINCIDENT, output_type="ndarray")):
        first, second = same[0]
        raise DataError(
            f"{where}: atoms {first} and {second} stand on one spot: remove the duplicate"
        )


def checked_labels(
    found: Mapping[str, Any],
    natoms: int,
    where: object,
    required: Collection[str] = ("energy", "forces"),
) -> Labels:
    """Energy, forces and stress among `found`, in the package's shapes.

    Args:
        found: values by their names; others than `LABELS` are left out.
        natoms: how many atoms the structure has.
        where: what messages call the structure, its file and its place there included.
        required: labels that must be there.

    Returns:
        The labels that are there.

    Raises:
        DataError: for a label that is missing, has another shape or is not finite.
    """
    labels: Labels = {}
    for name in LABELS:
        if found.get(name) is not None:
            labels[name] = _SHAPES[name](_numbers(found[name], name, where), natoms, where)
            if not np.isfinite(labels[name]).all():
                raise DataError(f"{where}: {name} is not finite; leave the structure out")
    if lacking := [name for name in required if name not in labels]:
        raise DataError(f"{where} has no {' and no '.join(lacking)}; {_listed(found)}")
    return labels


def free_atom(number: int) -> float:
    """Energy in hartree of all electrons of a neutral atom, to 1 % beyond beryllium.

    E = −0.7687 Z^(7/3) + Z²/2 − 0.2699 Z^(5/3), of Thomas and Fermi with the corrections of Scott
    and Schwinger (B.-G. Englert and J. Schwinger, Phys. Rev. A 32, 26 (1985)).
    """
    return -0.7687 * number ** (7 / 3) + number**2 / 2 - 0.2699 * number ** (5 / 3)


def _of_all_electrons(atoms: Atoms) -> float:
    """Energy in eV of the atoms, each alone and neutral."""
    return units.Hartree * sum(free_atom(int(number)) for number in atoms.numbers)


def unit_of_total(atoms: Atoms, energy: float) -> str | None:
    """The unit of `UNITS` in which a number is the energy of all electrons; None of any other.

    Energies in eV without the core electrons are of the size of hartree, and some come as near: of
    GFN2-xTB one in twenty. Hydrogen and helium alone tell nothing.
    """
    total = _of_all_electrons(atoms)
    low, high = BOUND
    names = (name for name, unit in UNITS.items() if low < energy * unit / total < high)
    return next(names, None) if atoms.numbers.max() > 2 else None


def check_size(atoms: Atoms, energy: float, where: object) -> None:
    """Raise `DataError` for an energy (eV) larger than all electrons of the atoms can have."""
    total = _of_all_electrons(atoms)
    if abs(energy) > 1.5 * abs(total) and atoms.numbers.max() > 2:
        raise DataError(
            f"{where}: an energy of {energy:.6g} eV, where all electrons of its atoms have about "
            f"{total:.3g}: leave the structure out, or convert its unit to eV"
        )


def agreement(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """By how much `one` is as large as `other`, a least-squares fit, and how well that fits: ±1
    where the one is the other times a number, 0 where it has nothing of it.
    """
    product = float((one * other).sum())
    sizes = float((one * one).sum()), float((other * other).sum())
    return product / max(sizes[1], 1e-30), product / max(math.sqrt(sizes[0] * sizes[1]), 1e-30)


def work_between(first: Atoms, second: Atoms) -> tuple[float, float] | None:
    """Energy difference of two labelled structures and the forces' work on the way, with the other
    sign, in eV; None of structures that are not of one trajectory with short steps.
    """
    if not np.array_equal(first.numbers, second.numbers):
        return None
    way = second.positions - first.positions
    if np.abs(way).max() > SHORT or not np.allclose(first.cell.array, second.cell.array):
        return None
    one, other = first.calc.results, second.calc.results
    work = 0.5 * ((one["forces"] + other["forces"]) * way).sum()
    return other["energy"] - one["energy"], -float(work)


def check_work(found: Sequence[tuple[float, float]], where: object) -> None:
    """Raise `DataError` where energies follow the forces, but not as -dE/dr does in eV/Å."""
    if len(found) < STEPS:
        return
    factor, fit = agreement(*np.array(found).T)
    if abs(fit) > 0.95 and not 0.5 < factor < 2:
        raise DataError(
            f"{where}: from frame to frame its energies change by {factor:.3g} times what its "
            "forces say: give forces, -dE/dr and not the gradient, in eV/Å (1 hartree/bohr is "
            "51.4221 eV/Å), and energies in eV"
        )


def labels_under_any_name(atoms: Atoms, where: object, taken: Counter[str]) -> Labels:
    """`checked_labels` of a structure that another program wrote.

    Names such as REF_energy, total_energy or forces_dft count, in the calculator, `info` and
    `arrays`, and a virial (3, 3) in eV, which is -stress · volume.

    Args:
        atoms: the structure; its calculator is not asked to compute.
        where: what messages call it.
        taken: counts the names, other than the package's own, that labels were read from, and the
            virials that were not.

    Raises:
        DataError: as `checked_labels`, and for labels of one kind that contradict each other.
    """
    results = held_results(atoms)
    keys: dict[str, Any] = {**atoms.info, **atoms.arrays, **results}
    candidates: dict[str, dict[str, Any]] = {}
    moving = bool(atoms.get_momenta().any())  # a total energy may have the kinetic one in it
    pairs = [(str(k), v) for p in (results, atoms.info, atoms.arrays) for k, v in p.items()]
    for key, value in sorted(pairs, key=lambda pair: "tot" in pair[0].lower()):
        match = _SPELLING.fullmatch(key.strip().lower())
        if match and value is not None:
            kind = {"force": "forces", "virials": "virial"}.get(match[1], match[1])
            if "tot" not in key.lower() or not (moving or kind in candidates):
                candidates.setdefault(kind, {}).setdefault(key, value)
        elif value is not None and re.search("stress(?!es)|virial(?!s)", key.lower()):
            taken[f"no stress from {key} (a name without a unit is needed, and eV/Å³)"] += 1
    _virial_as_stress(atoms, where, candidates, taken)
    found: Labels = {}
    for kind, spellings in candidates.items():
        for key, value in spellings.items():
            label = checked_labels({kind: value}, len(atoms), f"{where}, {key}", ())[kind]
            if kind not in found:
                found[kind], first = label, key
                if key != kind:
                    taken[f"{kind} from {key}"] += 1
            elif not np.allclose(found[kind], label, *ROUNDING[kind]):
                raise DataError(
                    f"{where}: {first} and {key} are different, and both may be the {kind}: keep "
                    "the right one"
                )
    free = results.get("free_energy")
    if free is not None and "energy" in found and abs(found["energy"] - free) > 1e-3 * len(atoms):
        taken["energy and not free_energy, which the forces are the slope of (smearing)"] += 1
    try:
        return checked_labels(found, len(atoms), where)
    except DataError as error:
        raise DataError(
            f"{where} has no {' and no '.join(k for k in LABELS[:2] if k not in found)}; "
            f"{_listed(keys)}. Call them energy and forces, or compute them and let ASE write "
            "them: atoms.get_forces(); ase.io.write('mine.extxyz', atoms)"
        ) from error


def held_results(atoms: Atoms) -> dict[str, Any]:
    """What the calculator, if there is one, holds of this very structure; nothing is computed."""
    if atoms.calc is None:
        return {}
    held = dict(getattr(atoms.calc, "results", {}))
    for name in LABELS:
        try:
            value = atoms.calc.get_property(name, atoms, allow_calculation=False)
        except PropertyNotImplementedError:
            value = None
        if value is None:
            held.pop(name, None)  # of the structure before a change
        else:
            held[name] = value
    return held


def _virial_as_stress(
    atoms: Atoms, where: object, candidates: dict[str, dict[str, Any]], taken: Counter[str]
) -> None:
    for key, value in candidates.pop("virial", {}).items():
        virial = np.asarray(_numbers(value, key, where)).squeeze()
        if virial.size != 9 or atoms.cell.rank < 3 or not atoms.pbc.all():
            reason = "no cell" if virial.size == 9 else f"shape {virial.shape}, not (3, 3)"
            taken[f"no stress from {key} ({reason})"] += 1
        else:
            stress = -virial.reshape(3, 3) / atoms.cell.volume
            candidates.setdefault("stress", {})[f"{key} (−{key}/volume)"] = stress


def _numbers(value: Any, name: str, where: object) -> np.ndarray:
    try:
        if np.asarray(value).dtype.kind in "bc":  # which would be numbers, but not as meant
            raise TypeError("truth values or complex numbers")
        return np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        shown = reprlib.repr(value)
        raise DataError(f"{where}: its {name} is {shown}, not numbers") from error


def _energy(value: np.ndarray, natoms: int, where: object) -> float:
    if value.size != 1:
        raise DataError(f"{where}: its energy has shape {value.shape}; one number is needed")
    return float(value.item())


def _forces(value: np.ndarray, natoms: int, where: object) -> np.ndarray:
    if value.shape != (natoms, 3):
        if value.squeeze().shape not in ((3 * natoms,), (natoms, 3)):
            raise DataError(
                f"{where}: its forces have shape {value.shape}; {natoms} atoms need ({natoms}, 3)"
            )
        value = value.reshape(natoms, 3)
    return value


def _stress(value: np.ndarray, natoms: int, where: object) -> np.ndarray:
    if value.shape == (6,):
        return value
    if value.size == 6:
        return value.reshape(6)
    if value.size != 9:
        raise DataError(f"{where}: its stress has shape {value.shape}; (6,) or (3, 3) is needed")
    matrix = value.reshape(3, 3)
    if np.abs(matrix - matrix.T).max() > SYMMETRIC * np.abs(matrix).max():
        raise DataError(f"{where}: its stress is not symmetric: {matrix.round(5).tolist()}")
    return full_3x3_to_voigt_6_stress(matrix)


_SHAPES = {"energy": _energy, "forces": _forces, "stress": _stress}


def _listed(found: Mapping[str, Any]) -> str:
    names = sorted(set(map(str, found)) - {"numbers", "positions"})
    return f"what is there: {', '.join(names)}" if names else "nothing else is there"
