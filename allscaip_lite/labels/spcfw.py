"""Labels of waters: SPC/Fw, the potential of `allscaip_lite.spcfw`."""

from __future__ import annotations

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.electrons import stated_charge_and_spin
from allscaip_lite.labels import LabelError, counts_of
from allscaip_lite.spcfw import SPCFw


def label(atoms: Atoms) -> Atoms:
    """The structure with energy, forces, the stress of a box, and metadata in `info`.

    Raises LabelError for what is charged or no singlet, InputError for what is not water.
    """
    charge, spin = stated_charge_and_spin(atoms)
    if charge or (spin or 1) != 1:
        raise LabelError(f"{atoms.symbols}: SPC/Fw takes neutral singlets")
    labelled = atoms.copy()
    method = SPCFw()
    method.calculate(labelled)
    names = ("energy", "forces", "stress") if labelled.pbc.any() else ("energy", "forces")
    labels = {name: method.results[name] for name in names}
    labelled.calc = SinglePointCalculator(labelled, **labels)
    labelled.info |= {
        "charge": 0,
        "spin": 1,
        **counts_of(labelled),
        "label": "SPC/Fw, Ewald sums for Coulomb and dispersion",
    }
    return labelled
