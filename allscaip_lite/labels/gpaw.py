"""PBE and RPBE in plane waves by GPAW: labels of crystals, slabs and molecules in a cell.

In: `ase.Atoms`, neutral. Out: the same with energy (eV), forces (eV/Å), stress (eV/Å³) and
metadata. PBE is the functional of OMat24 (arXiv:2410.12771), there with a Hubbard U for some oxides
and fluorides, which is left out here; RPBE without spin is OC20's (arXiv:2010.09990). GPAW:
J. J. Mortensen et al., J. Chem. Phys. 160, 092503 (2024).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
from ase import Atoms

from allscaip_lite.electrons import lowest_multiplicity
from allscaip_lite.labels import LabelError, check_cell, with_labels

REACH = 6.0  # Å: a wider gap between atoms along a vector of the cell is vacuum
# Half as many k-points are enough where a quarter of the atoms and more are ANIONS and they show a
# gap of more than GAP (eV). In silicon they show one too, and are too few.
ANIONS = "N O F P S Cl Se Br Te I".split()
GAP = 1.0
# The moments (μB) from which a ferromagnetic state is sought; a structure of other elements alone
# has none, nor has one whose atoms have less than NO_MOMENT with half as many k-points.
MOMENTS = {"V": 2.0, "Cr": 3.0, "Mn": 4.0, "Fe": 3.0, "Co": 2.0, "Ni": 1.0}
NO_MOMENT = 0.1
# GPAW's stress is that at a fixed number of plane waves. At a fixed cutoff its diagonal is less by
# a sum over atoms (eV) over the volume (Francis and Payne, J. Phys. Condens. Matter 2, 4395, 1990):
# this at 600 eV, from `data/gpaw/make.py --set cutoff`; other elements have little.
PULAY = {"N": 0.88, "O": 0.58, "F": -0.17, "Ti": 0.08}


@dataclass(frozen=True)
class Level:
    """A functional and its numerical settings.

    Attributes:
        functional: By GPAW's name.
        magnetic: Whether structures with an element of MOMENTS are spin-polarised.
        cutoff: Of the plane waves, eV.
        density: Of k-points, Å: a vector of length a has 2π/a times this, rounded up; half of that
            is enough for ions with a gap.
        stress: Whether there is one.
        pulay: By element, what takes GPAW's stress to that of a fixed cutoff, as PULAY has it.
        width: Of Gaussian smearing, eV.
    """

    functional: str
    magnetic: bool
    cutoff: float
    density: float
    stress: bool = True
    pulay: Mapping[str, float] = field(default_factory=dict)
    width: float = 0.1

    @property
    def name(self) -> str:
        """As labels say it in `info["label"]`."""
        return f"{self.functional}, {self.cutoff:g} eV, {self.density:g} Å"


LEVELS = {
    "pbe": Level("PBE", True, 600.0, 3.0, pulay=PULAY),
    "rpbe": Level("RPBE", False, 500.0, 2.5, stress=False),
}


def k_points(atoms: Atoms, density: float) -> tuple[int, ...]:
    """How many k-points each vector of the cell has: one where there is a vacuum along it.

    Raises LabelError for what `check_cell` refuses, and for a molecule with unpaired electrons.
    """
    check_cell(atoms, "GPAW", REACH)
    inverse = np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    places = np.sort(atoms.get_scaled_positions() % 1, axis=0)
    gaps = np.diff(places, axis=0, append=places[:1] + 1).max(axis=0) / inverse
    vacuum = gaps > REACH
    if vacuum.all() and lowest_multiplicity(atoms, 0) > 1:
        raise LabelError(f"{atoms.symbols}: a molecule with unpaired electrons is not taken")
    counts = np.where(vacuum, 1, np.ceil(2 * np.pi * density * inverse - 1e-6))
    return tuple(map(int, counts))


def moments(atoms: Atoms) -> np.ndarray | None:
    """The magnetic moments (N,) (μB) to start from; None where no element has one."""
    found = np.array([MOMENTS.get(symbol, 0.0) for symbol in atoms.symbols])
    return found if found.any() else None


def label(atoms: Atoms, level: str | Level = "pbe") -> Atoms:
    """The structure with energy, forces, stress, and metadata in `info`.

    The energy is the free energy of the smeared electrons, which the forces derive from. Its zero
    are free atoms without spin. The multiplicity in `info` is the lowest that the number of
    electrons allows; `magnetic_moment` (μB) is that of the cell.

    Args:
        atoms: A crystal, a slab or a molecule with paired electrons, in a cell.
        level: One of LEVELS, or another.

    Returns:
        A copy with labels.

    Raises:
        LabelError: `k_points` does not take it, or the cycle does not converge.
        ModuleNotFoundError: GPAW is not installed.
    """
    from gpaw import KohnShamConvergenceError

    level = LEVELS[level] if isinstance(level, str) else level
    started = time.process_time()
    start = moments(atoms) if level.magnetic else None
    few, many = (k_points(atoms, level.density * part) for part in (0.5, 1.0))
    try:
        work = _computed(atoms, level, few, start)
        if many != few and not _ions_with_gap(work):
            if start is not None and np.abs(work.get_magnetic_moments()).max() <= NO_MOMENT:
                start = None
            work = _computed(atoms, level, many, start)
        results = {
            "energy": float(work.get_potential_energy(force_consistent=True)),
            "forces": work.get_forces(),
        }
        if level.stress:
            pulay = sum(level.pulay.get(symbol, 0.0) for symbol in work.symbols)
            results["stress"] = work.get_stress()
            results["stress"][:3] -= pulay / work.get_volume()
    except KohnShamConvergenceError as error:
        raise LabelError(f"{atoms.symbols}: the cycle did not converge") from error
    return with_labels(
        atoms.copy(),
        results,
        f"{level.name} (GPAW {version('gpaw')})",
        charge=0,
        spin=lowest_multiplicity(atoms, 0),
        magnetic_moment=round(float(work.get_magnetic_moment()), 4),
        seconds=round(time.process_time() - started, 1),
    )


def _computed(
    atoms: Atoms, level: Level, counts: tuple[int, ...], start: np.ndarray | None
) -> Atoms:
    """A copy with GPAW as its calculator and the cycle converged, from moments (N,), or none."""
    from gpaw import GPAW

    work = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    work.set_initial_magnetic_moments(start)
    work.calc = GPAW(
        mode={"name": "pw", "ecut": level.cutoff},
        xc=level.functional,
        kpts={"size": counts, "gamma": False},
        # of order 0: unlike cold smearing, it has one Fermi level and not several
        occupations={"name": "methfessel-paxton", "order": 0, "width": level.width},
        eigensolver="davidson",  # a quarter faster than the default
        convergence={"eigenstates": 1e-6},
        maxiter=150,
        txt=None,
    )
    work.get_potential_energy()
    return work


def _ions_with_gap(work: Atoms) -> bool:
    """Whether there are anions, and bands are full or empty and more than GAP apart."""
    unpaired = work.get_magnetic_moment()
    pairs = (work.numbers.sum() - unpaired) / 2
    homo, lumo = work.calc.get_homo_lumo()
    anions = np.isin(work.symbols, ANIONS).mean() >= 1 / 4
    return bool(anions and abs(pairs - round(pairs)) < 0.01 and lumo - homo > GAP)
