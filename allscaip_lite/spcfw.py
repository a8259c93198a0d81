"""SPC/Fw water: an ASE calculator.

In: whole waters, in vacuum or in a periodic box. Out: energy (eV), forces (eV/Å) and, of a box, the
stress (eV/Å³). Energies are zero for relaxed molecules far from each other.

Wu, Tepper and Voth, J. Chem. Phys. 124, 024503 (2006), with every interaction summed to infinity:
in vacuum over all pairs, in a box over all images, Coulomb and dispersion alike by Ewald sums. So a
box, its supercell and a cluster have one and the same potential.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from scipy.special import erfc
from vesin import NeighborList

from allscaip_lite.errors import InputError

KCAL = units.kcal / units.mol
BOND_LENGTH = 1.012  # Å
BOND_CONSTANT = 1059.162 * KCAL  # eV/Å²; the energy has the factor ½
ANGLE = np.deg2rad(113.24)
ANGLE_CONSTANT = 75.90 * KCAL  # eV/rad²; the factor ½ as well
CHARGES = np.array([-0.82, 0.41, 0.41])  # e, of O, H, H
SIGMA = 3.165492  # Å, between oxygens
EPSILON = 0.1554253 * KCAL
C6 = 4 * EPSILON * SIGMA**6
C12 = 4 * EPSILON * SIGMA**12
COULOMB = units.Hartree * units.Bohr  # e²/4πε₀ in eV Å

CUTOFF = 9.0  # Å, of the real-space sums
# Both sums end where the Gaussian has fallen to exp(-4²): 1e-6 eV a molecule, for any box.
SPLITTING = 4.0 / CUTOFF
WAVE_CUTOFF = 8.0 * SPLITTING

Terms = tuple[float, np.ndarray, np.ndarray]  # energy eV, forces (N, 3) eV/Å, dE/dstrain (3, 3) eV


def are_waters(numbers: np.ndarray) -> bool:
    """Whether atoms of these elements (N,) are whole waters in a row, each as O, H, H."""
    return np.array_equal(numbers, np.tile([8, 1, 1], len(numbers) // 3))


class SPCFw(Calculator):
    """ASE calculator of flexible SPC/Fw water, in vacuum or periodic in all directions.

    Atoms come as O, H, H, one molecule after the other; a molecule may lie across the boundary.
    Results: energy (eV), forces (N, 3) (eV/Å), stress (6,) (eV/Å³, Voigt) of a periodic box, all
    analytic, in double precision. Raises InputError for other structures.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        assert atoms is not None
        if not are_waters(atoms.numbers):
            raise InputError(
                f"{atoms.symbols}: SPC/Fw takes whole waters, atoms in the order O, H, H"
            )
        if atoms.pbc.any() and not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise InputError("SPC/Fw takes vacuum (pbc False) or a cell periodic in all directions")
        cell = atoms.cell.array if atoms.pbc.any() else None
        if cell is None and "stress" in properties:
            raise PropertyNotImplementedError("no stress: the structure is not periodic")
        energy, forces, strain = spcfw(atoms.positions, cell)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if cell is not None:
            stress = (strain + strain.T) / (2 * atoms.get_volume())
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)


def spcfw(positions: np.ndarray, cell: np.ndarray | None) -> Terms:
    """Energy, forces and strain derivative of waters at positions (3W, 3) Å, atoms as O, H, H.

    cell (3, 3) Å has the lattice vectors as rows; None is vacuum. The strain derivative is that of
    a deformation of cell and positions alike.
    """
    if cell is None:
        terms = [_bonded(positions, None), _all_pairs(positions)]
    else:
        terms = [_bonded(positions, cell), _near(positions, cell), _waves(positions, cell)]
    energies, forces, strains = zip(*terms, strict=True)
    return float(sum(energies)), sum(forces), sum(strains)


def _bonded(positions: np.ndarray, cell: np.ndarray | None) -> Terms:
    """Bonds and angles; in a box minus what the Ewald sums count inside molecules."""
    molecules = positions.reshape(-1, 3, 3)
    arms = molecules[:, 1:] - molecules[:, :1]  # (W, 2, 3), O to H
    if cell is not None:
        arms = arms - np.rint(arms @ np.linalg.inv(cell)) @ cell
    lengths = np.linalg.norm(arms, axis=2)  # (W, 2)
    directions = arms / lengths[..., None]
    stretch = lengths - BOND_LENGTH
    energy = BOND_CONSTANT / 2 * (stretch**2).sum()
    gradient = BOND_CONSTANT * stretch[..., None] * directions  # (W, 2, 3), of the arms

    cosine = (directions[:, 0] * directions[:, 1]).sum(1).clip(-1 + 1e-12, 1 - 1e-12)  # (W,)
    bend = np.arccos(cosine) - ANGLE
    energy += ANGLE_CONSTANT / 2 * (bend**2).sum()
    slope = ANGLE_CONSTANT * bend / np.sqrt(1 - cosine**2)  # -dE/dcos
    swapped = directions[:, ::-1] - cosine[:, None, None] * directions
    gradient -= slope[:, None, None] * swapped / lengths[..., None]

    if cell is not None:
        charge = COULOMB * CHARGES[0] * CHARGES[1]
        energy -= (charge / lengths).sum()
        gradient += charge * arms / lengths[..., None] ** 3
        across = arms[:, 1] - arms[:, 0]  # (W, 3), H to H
        distance = np.linalg.norm(across, axis=1)
        charge = COULOMB * CHARGES[1] * CHARGES[2]
        energy -= (charge / distance).sum()
        pull = charge * across / distance[:, None] ** 3
        gradient += np.stack([-pull, pull], axis=1)

    forces = np.concatenate([gradient.sum(1, keepdims=True), -gradient], axis=1)  # (W, 3, 3)
    strain = np.einsum("wab,wac->bc", arms, gradient)
    return energy, forces.reshape(-1, 3), strain


def _all_pairs(positions: np.ndarray) -> Terms:
    """Coulomb and Lennard-Jones energy of all pairs of different molecules, in vacuum."""
    i, j = np.triu_indices(len(positions), k=1)
    other = i // 3 != j // 3
    i, j = i[other], j[other]
    vectors = positions[j] - positions[i]  # (P, 3)
    distance = np.linalg.norm(vectors, axis=1)
    charge = COULOMB * CHARGES[i % 3] * CHARGES[j % 3]
    energy = charge / distance
    slope = -charge / distance**3  # dE/dr / r
    oxygens = (i % 3 == 0) & (j % 3 == 0)
    r = distance[oxygens]
    energy[oxygens] += C12 / r**12 - C6 / r**6
    slope[oxygens] += -12 * C12 / r**14 + 6 * C6 / r**8
    return _from_pairs(i, j, vectors, energy, slope, len(positions))


def _near(positions: np.ndarray, cell: np.ndarray) -> Terms:
    """The real-space parts of both Ewald sums, and the repulsion, up to the cutoff."""
    neighbors = NeighborList(cutoff=CUTOFF, full_list=False)
    i, j, distance, vectors = neighbors.compute(
        points=positions, box=cell, periodic=True, quantities="ijdD"
    )
    a = SPLITTING
    charge = COULOMB * CHARGES[i % 3] * CHARGES[j % 3]
    energy = charge * erfc(a * distance) / distance
    gaussian = charge * 2 * a / np.sqrt(np.pi) * np.exp(-((a * distance) ** 2))
    slope = -(energy + gaussian) / distance**2
    oxygens = (i % 3 == 0) & (j % 3 == 0)
    r = distance[oxygens]
    x = (a * r) ** 2
    screen = np.exp(-x) * (1 + x + x * x / 2)
    energy[oxygens] += C12 / r**12 - C6 * screen / r**6
    slope[oxygens] += -12 * C12 / r**14 + C6 * (6 * screen + x**3 * np.exp(-x)) / r**8
    return _from_pairs(i, j, vectors, energy, slope, len(positions))


def _from_pairs(
    i: np.ndarray,
    j: np.ndarray,
    vectors: np.ndarray,
    energy: np.ndarray,
    slope: np.ndarray,
    count: int,
) -> Terms:
    """Sums over pairs: vectors (P, 3) from i to j, energy (P,), slope (P,) = dE/dr / r."""
    pull = slope[:, None] * vectors  # (P, 3), the force on i
    forces = [np.bincount(i, f, count) - np.bincount(j, f, count) for f in pull.T]
    return energy.sum(), np.stack(forces, axis=1), vectors.T @ pull


def _waves(positions: np.ndarray, cell: np.ndarray) -> Terms:
    """The reciprocal parts of both Ewald sums and their self-energies.

    Coulomb: in surroundings that conduct (tin foil). Dispersion: Williams, Acta Cryst. A 27, 452,
    1971; formulas as in Essmann et al., J. Chem. Phys. 103, 8577, 1995.
    """
    a, volume = SPLITTING, abs(np.linalg.det(cell))
    reach = (WAVE_CUTOFF * np.linalg.norm(cell, axis=1) / (2 * np.pi)).astype(int)  # (3,)
    grid = np.stack(np.meshgrid(*[np.arange(-m, m + 1) for m in reach], indexing="ij"), axis=-1)
    grid = grid.reshape(-1, 3)[grid[..., 0].size // 2 + 1 :]  # one of each pair k, -k; not k = 0
    waves = 2 * np.pi * grid @ np.linalg.inv(cell).T  # (K, 3)
    square = (waves**2).sum(1)
    inside = square < WAVE_CUTOFF**2
    grid, waves, square = grid[inside], waves[inside], square[inside]

    scaled = positions @ np.linalg.inv(cell)
    phase = np.ones((len(grid), len(positions)), complex)  # (K, N): exp(i k·r)
    for axis, m in enumerate(reach):
        powers = np.exp(2j * np.pi * np.outer(np.arange(-m, m + 1), scaled[:, axis]))
        phase *= powers[grid[:, axis] + m]
    charges = np.tile(CHARGES, len(positions) // 3)
    outer = waves[:, :, None] * waves[:, None, :] / square[:, None, None]  # (K, 3, 3)
    forces = np.zeros_like(positions)

    # Coulomb: Σ_k A(k) |Σ_i q_i exp(i k·r_i)|², half of the waves counted twice
    amplitude = 4 * np.pi * COULOMB / volume * np.exp(-square / (4 * a * a)) / square
    structure = phase @ charges
    parts = amplitude * abs(structure) ** 2
    energy = parts.sum() - COULOMB * a / np.sqrt(np.pi) * (charges**2).sum()
    strain = -parts.sum() * np.eye(3)
    strain += np.tensordot(parts * (2 + square / (2 * a * a)), outer, axes=1)
    pull = 2 * (amplitude * structure.conj())[:, None] * phase
    forces += charges[:, None] * (pull.imag.T @ waves)

    # dispersion, between oxygens alone; its k = 0 term does not vanish
    b = np.sqrt(square) / (2 * a)
    decay, tail = np.exp(-b * b), np.sqrt(np.pi) * erfc(b)
    front = -C6 * np.pi**1.5 * a**3 / (3 * volume)
    amplitude = front * ((1 - 2 * b * b) * decay + 2 * b**3 * tail)
    steepness = front * (6 * b * b * tail - 6 * b * decay) * b  # dA/d(log k)
    oxygens = phase[:, ::3]
    structure = oxygens.sum(1)
    number = oxygens.shape[1]
    summed = (amplitude * abs(structure) ** 2).sum() + front * number**2 / 2
    energy += summed + C6 * a**6 / 12 * number
    strain -= summed * np.eye(3)
    strain -= np.tensordot(steepness * abs(structure) ** 2, outer, axes=1)
    pull = 2 * (amplitude * structure.conj())[:, None] * oxygens
    forces[::3] += pull.imag.T @ waves
    return energy, forces, strain
