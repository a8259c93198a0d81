"""GFN2-xTB, spin-polarised: an ASE calculator, and labels.

In: `ase.Atoms` with charge and spin multiplicity in `atoms.info`. Out: the same with energy (eV),
forces (eV/Å), the stress (eV/Å³) of a periodic system, and metadata as OMol25 has them
(arXiv:2505.08762).

Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019); spin polarisation: Neugebauer
et al., J. Comput. Chem. 44, 2120 (2023). Computed by the tblite library.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, CalculatorError

from allscaip_lite.electrons import lowest_multiplicity, stated_charge_and_spin
from allscaip_lite.labels import LabelError, with_labels


class GFN2xTB(Calculator):
    """ASE calculator: GFN2-xTB with spin polarisation.

    Charge and spin multiplicity come from `atoms.info["charge"]` and `["spin"]`; absent means
    neutral and the lowest multiplicity. Results: energy (eV), forces (N, 3) (eV/Å), stress (6,)
    (eV/Å³) of a periodic system, Mulliken charges (N,) (e), homo_lumo_gap [eV], one number for each
    occupied spin channel.
    `accuracy` scales tblite's SCF thresholds (smaller is tighter). A step of a trajectory starts
    from the electronic state of the step before; `reset()` forgets it.

    Raises CalculatorError for a multiplicity that the electron count forbids and for an SCF that
    does not converge.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "charges"]

    def __init__(self, accuracy: float = 1.0) -> None:
        super().__init__()
        self.accuracy = accuracy
        self._key: tuple[Any, ...] | None = None
        self._tblite: Any = None
        self._state: Any = None

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last call; charge and spin in `atoms.info` count too."""
        changes = super().check_state(atoms, tol)
        if self._key is not None and _charge_and_spin(atoms) != self._key[:2]:
            changes.append("info")
        return changes

    def reset(self) -> None:
        super().reset()
        self._key, self._tblite, self._state = None, None, None

    def calculate(self, *arguments: Any, **named: Any) -> None:
        from tblite.exceptions import TBLiteRuntimeError
        from tblite.interface import Calculator as TBLite

        super().calculate(*arguments, **named)
        atoms = self.atoms
        assert atoms is not None
        charge, spin = _charge_and_spin(atoms)
        positions = atoms.positions / units.Bohr
        lattice = atoms.cell.array / units.Bohr if atoms.pbc.any() else None
        key = (charge, spin, tuple(atoms.numbers), tuple(atoms.pbc))
        try:
            if key != self._key:
                self._state = None
                self._tblite = TBLite(
                    "GFN2-xTB", atoms.numbers, positions, charge, spin - 1, lattice, atoms.pbc
                )
                self._tblite.set("verbosity", 0)
                self._tblite.set("accuracy", self.accuracy)
                self._tblite.add("spin-polarization", 1.0)
                self._key = key
            else:
                self._tblite.update(positions, lattice)
            self._state = self._tblite.singlepoint(self._state)
        except TBLiteRuntimeError as error:
            self.reset()
            raise CalculatorError(
                f"GFN2-xTB failed for {atoms.symbols}, charge {charge}, "
                f"multiplicity {spin}: {error}"
            ) from error
        energy = float(self._state["energy"]) * units.Hartree
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": -np.asarray(self._state["gradient"]) * (units.Hartree / units.Bohr),
            "charges": np.asarray(self._state["charges"]),
            "homo_lumo_gap": _gaps(self._state, spin),
        }
        if lattice is not None:
            stress = np.asarray(self._state["virial"]) * (units.Hartree / atoms.get_volume())
            self.results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def _charge_and_spin(atoms: Atoms) -> tuple[int, int]:
    """Not checked against the number of electrons, which tblite does."""
    charge, spin = stated_charge_and_spin(atoms)
    charge = charge or 0
    return charge, spin or lowest_multiplicity(atoms, charge)


def _gaps(state: Any, spin: int) -> list[float]:
    """HOMO–LUMO gaps in eV: one of a singlet, of alpha and beta spins else."""
    levels = np.atleast_2d(state["orbital-energies"]) * units.Hartree
    filled = np.atleast_2d(state["orbital-occupations"]) > 0.5
    gaps = []
    for level, full in zip(levels, filled, strict=True):
        if full.any() and not full.all():
            gaps.append(round(float(level[~full].min() - level[full].max()), 6))
    return gaps[:1] if spin == 1 else gaps


def results_of(atoms: Atoms) -> dict[str, Any]:
    """What `GFN2xTB` finds for a structure, from scratch: it depends on the structure alone.

    Raises LabelError where the SCF does not converge, or charge and spin are impossible.
    """
    calculator = GFN2xTB(accuracy=0.1)
    try:
        calculator.calculate(atoms)
    except CalculatorError as error:
        raise LabelError(str(error)) from error
    return calculator.results


def label(atoms: Atoms, max_force: float = np.inf) -> Atoms:
    """The structure with energy (eV), forces (N, 3) (eV/Å), stress if periodic, and metadata.

    `info` of the result is that of `atoms`, whose charge and multiplicity count (absent: neutral
    and the lowest), and: charge, spin, num_atoms, num_electrons, composition, homo_lumo_gap (eV),
    label. Raises LabelError where the SCF fails, a number is not finite, or a component of a force
    is above `max_force` (eV/Å).
    """
    results = results_of(atoms)
    largest = np.abs(results["forces"]).max()
    if not (np.isfinite([results["energy"], largest]).all() and largest < max_force):
        raise LabelError(f"{atoms.symbols} has a force of {largest:.1f} eV/Å")
    return with_labels(
        Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=atoms.info),
        results,
        f"GFN2-xTB, spin-polarised (tblite {version('tblite')})",
        *_charge_and_spin(atoms),
        homo_lumo_gap=results["homo_lumo_gap"],
    )
