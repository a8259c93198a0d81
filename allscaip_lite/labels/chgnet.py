"""CHGNet 0.3.0, a potential for crystals: an ASE calculator, and labels.

In: `ase.Atoms` that are periodic. Out: the same with energy (eV), forces (eV/Å), stress (eV/Å³) and
metadata. CHGNet was trained on relaxations of the Materials Project (PBE and PBE + U, energies
corrected to one scale): Deng et al., Nature Machine Intelligence 5, 1031 (2023). Computed by the
library chgnet, on one CPU core, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.stress import full_3x3_to_voigt_6_stress

from allscaip_lite.electrons import lowest_multiplicity
from allscaip_lite.labels import LabelError, check_cell, with_labels

REACH = 6.0  # Å, of CHGNet's graph of atoms


class CHGNet(Calculator):
    """ASE calculator: energy (eV), forces (N, 3) (eV/Å) and stress (6,) (eV/Å³) by CHGNet.

    Raises LabelError for what `results_of` does not take.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def calculate(self, *arguments: Any, **named: Any) -> None:
        super().calculate(*arguments, **named)
        assert self.atoms is not None
        self.results = results_of([self.atoms])[0]


@cache
def _network() -> Any:
    from chgnet.model import CHGNet as Network

    network = Network.load(model_name="0.3.0", use_device="cpu", verbose=False)
    return network.requires_grad_(False)  # a tenth faster than with gradients of the weights


def results_of(structures: Sequence[Atoms]) -> list[dict[str, Any]]:
    """What CHGNet gives for each structure, by the names of ASE.

    They are neutral and periodic. Along a direction that is not periodic there has to be a vacuum
    of more than `REACH`. Raises LabelError for what is charged, not periodic, or too close to its
    image.
    """
    from pymatgen.core import Lattice, Structure

    crystals = []
    for atoms in structures:
        if not atoms.pbc.any():
            raise LabelError(f"{atoms.symbols}: CHGNet takes crystals and slabs, not molecules")
        check_cell(atoms, "CHGNet", REACH)
        lattice = Lattice(atoms.cell.array)
        crystals.append(
            Structure(
                lattice, atoms.get_chemical_symbols(), atoms.positions, coords_are_cartesian=True
            )
        )
    found = _network().predict_structure(crystals, task="efs", batch_size=4)
    found = [found] if isinstance(found, dict) else found
    results = []
    for atoms, values in zip(structures, found, strict=True):
        stress = np.asarray(values["s"], dtype=float) * units.GPa
        energy = float(values["e"]) * len(atoms)
        results.append(
            {
                "energy": energy,
                "free_energy": energy,
                "forces": np.asarray(values["f"], dtype=float),
                "stress": full_3x3_to_voigt_6_stress((stress + stress.T) / 2),
            }
        )
    return results


def label(atoms: Atoms) -> Atoms:
    """The structure with energy, forces, stress, and metadata in `info`; see `label_all`."""
    return label_all([atoms])[0]


def label_all(structures: Sequence[Atoms]) -> list[Atoms]:
    """Structures with energy, forces, stress, and metadata in `info`, several at a time.

    The multiplicity in `info` is the lowest that the number of electrons allows: CHGNet knows none.
    Raises LabelError for what CHGNet does not take.
    """
    label = f"CHGNet 0.3.0 (chgnet {version('chgnet')})"
    return [
        with_labels(atoms.copy(), results, label, 0, lowest_multiplicity(atoms, 0))
        for atoms, results in zip(structures, results_of(structures), strict=True)
    ]
