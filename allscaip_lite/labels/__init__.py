"""Reference methods that label structures: GFN2-xTB, wB97M-V, PBE, SPC/Fw, CHGNet."""

from __future__ import annotations

from typing import Any

from ase import Atoms

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
