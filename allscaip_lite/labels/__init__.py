"""Reference methods that label structures: GFN2-xTB, wB97M-V, PBE, SPC/Fw, CHGNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.electrons import stated_charge_and_spin
from allscaip_lite.errors import InputError


class LabelError(InputError):
    """A structure that a method cannot label, or a geometry that cannot be made."""


def counts_of(atoms: Atoms, charge: int = 0) -> dict[str, Any]:
    """What OMol25's metadata count: atoms, electrons (all of them) and the formula."""
    return {
        "num_atoms": len(atoms),
        "num_electrons": int(atoms.numbers.sum()) - charge,
        "composition": atoms.get_chemical_formula("hill"),
    }


def with_labels(
    atoms: Atoms, results: Mapping[str, Any], label: str, charge: int, spin: int, **more: Any
) -> Atoms:
    """A structure, given its labels: those of energy, forces and stress that are in `results`; and
    `label` (the method's name), charge, spin, `counts_of` and `more` in its `info`.
    """
    labels = {name: results[name] for name in ("energy", "forces", "stress") if name in results}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info |= {"charge": charge, "spin": spin, **counts_of(atoms, charge), **more}
    atoms.info["label"] = label
    return atoms


def check_cell(atoms: Atoms, method: str, vacuum: float) -> None:
    """Raise LabelError for what a periodic method cannot take: a charge, a cell of less than three
    vectors, or not more than `vacuum` (Å) to the image along a direction that is not periodic.
    """
    charge, _ = stated_charge_and_spin(atoms)
    if charge:
        raise LabelError(f"{atoms.symbols}: {method} takes neutral structures, not {charge:+d}")
    if atoms.cell.rank < 3:
        raise LabelError(f"{atoms.symbols}: {method} takes structures in a cell of three vectors")
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    gaps = heights * (1 - np.ptp(atoms.get_scaled_positions(wrap=False), axis=0))
    narrow = ~atoms.pbc & (gaps <= vacuum)
    if narrow.any():
        raise LabelError(
            f"{atoms.symbols}: {gaps[narrow][0]:.1f} Å of vacuum along a direction that is not "
            f"periodic; {method} sees all as periodic and needs more than {vacuum:g} Å of vacuum"
        )
