"""Labels of waters: SPC/Fw, the potential of `allscaip_lite.spcfw`."""

from __future__ import annotations

from ase import Atoms

from allscaip_lite.electrons import stated_charge_and_spin
from allscaip_lite.labels import LabelError, with_labels
from allscaip_lite.spcfw import SPCFw


def label(atoms: Atoms) -> Atoms:
    """The structure with energy, forces, the stress of a box, and metadata in `info`.

    Raises LabelError for what is charged or no singlet, InputError for what is not water.
    """
    charge, spin = stated_charge_and_spin(atoms)
    if charge or (spin or 1) != 1:
        raise LabelError(f"{atoms.symbols}: SPC/Fw takes neutral singlets")
    method = SPCFw()
    method.calculate(atoms)
    names = ("energy", "forces", "stress") if atoms.pbc.any() else ("energy", "forces")
    results = {name: method.results[name] for name in names}
    return with_labels(
        atoms.copy(), results, "SPC/Fw, Ewald sums for Coulomb and dispersion", charge=0, spin=1
    )
