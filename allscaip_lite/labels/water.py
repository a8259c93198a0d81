"""SPC/Fw water as a teacher, and `allscaip-lite data water`, the command that makes a data set.

Comes in: nothing but the model's parameters below. Goes out: `{train,val,test}.aselmdb` with
energies (eV), forces (eV/Å) and, of periodic boxes, stresses (eV/Å³), split by trajectory, and
`references.json`. Energies are zero for relaxed molecules far apart.

Teacher: SPC/Fw (Wu, Tepper and Voth, J. Chem. Phys. 124, 024503, 2006), every interaction summed to
infinity: in vacuum over all pairs, in a box over all images, Coulomb and dispersion alike by Ewald
sums. So a box, its supercell and a cluster feel one and the same potential. Structures are sampled
with OpenMM, whose cutoff has to fit into the box; labels do not come from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import (
    Calculator,
    PropertyNotImplementedError,
    all_changes,
)
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from scipy.spatial.transform import Rotation
from scipy.special import erfc
from tqdm import tqdm
from vesin import NeighborList

from allscaip_lite.data.aselmdb import SPLITS, Dataset, write_aselmdb
from allscaip_lite.files import store_text
from allscaip_lite.labels.workers import in_processes

# --- The teacher -----------------------------------------------------------------------------

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


class WaterError(ValueError):
    """A structure or a request that this room cannot serve; the message says what to change."""


def are_waters(numbers: np.ndarray) -> bool:
    """Whether atoms of these elements (N,) are whole waters in a row, each as O, H, H."""
    return np.array_equal(numbers, np.tile([8, 1, 1], len(numbers) // 3))


class SPCFw(Calculator):
    """ASE calculator of flexible SPC/Fw water, in vacuum or periodic in all directions.

    Atoms come as O, H, H, one molecule after the other; a molecule may lie across the boundary.
    Results: energy (eV), forces (N, 3) (eV/Å), stress (6,) (eV/Å³, Voigt) of a periodic box, all
    analytic, in double precision. Raises WaterError for other structures.
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
        if not are_waters(atoms.numbers):
            raise WaterError(
                f"{atoms.symbols}: SPC/Fw takes whole waters, atoms in the order O, H, H"
            )
        if atoms.pbc.any() and not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise WaterError("SPC/Fw takes vacuum (pbc False) or a cell periodic in all directions")
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
    """Bonds and angles; in a box also what the Ewald sums count inside molecules, taken away."""
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
    apart = i // 3 != j // 3
    i, j = i[apart], j[apart]
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


# --- What is sampled -------------------------------------------------------------------------

SETS = {  # kinds: of 4,600 structures how many; structures a trajectory
    "main": {
        "npt": (1680, 28),
        "nvt": (1120, 28),
        "cluster": (600, 15),
        "dimer": (300, 20),
        "molecule": (300, 20),
        "contact": (200, 20),
        "squeezed": (400, 20),
    },
    "liquid": {"liquid": (4600, 40)},
}
SIZES = {
    "cluster": tuple(range(2, 21)),
    "dimer": (2,),
    "molecule": (1,),
    "contact": (2,),
    "squeezed": (16, 24, 32),
    "liquid": (32, 48),
}
BOX_SIZES = (16, 24, 32, 48, 64)
TEMPERATURES = {"cluster": (150.0, 350.0), "liquid": (290.0, 310.0)}  # K, of others 280 to 360
PRESSURES = {"npt": (-1000.0, 3000.0), "liquid": (-500.0, 500.0)}  # bar
DENSITIES = (0.90, 1.12)  # g/cm³, of boxes of constant volume
MAX_FORCE = 15.0  # eV/Å: harder collisions teach little
# What a model may meet in dynamics of its own and the teacher's hardly show: atoms of two molecules
# this close, in Å. A model that has seen none may take them for a minimum.
CONTACTS = {("H", "H"): (0.4, 2.0), ("O", "H"): (1.2, 1.9), ("O", "O"): (2.2, 2.7)}
STRAINED_EVERY = 7  # of a box's structures, one in so many is strained and displaced
STEP, STEPS_BETWEEN, STEPS_BEFORE = 1.0, 200, 2500  # fs; two structures are 0.2 ps apart


@dataclass(frozen=True)
class Trajectory:
    """One run of the sampler; its structures stay together in one split.

    kind is one of SETS'; temperature in K; pressure in bar (NPT) and density in g/cm³ (start of
    boxes, and fixed in NVT) are read only where the kind has them.
    """

    name: str
    kind: str
    waters: int
    temperature: float
    pressure: float
    density: float
    frames: int
    split: str


def plan(structures: int, chosen: str = "main") -> list[Trajectory]:
    """Trajectories of about that many structures; conditions are spread evenly over their ranges.

    `chosen` is one of SETS: main has boxes, clusters and molecules of every kind; liquid has what
    the teacher's water looks like near 298 K and 1 bar. Raises WaterError below 100 structures,
    where some split would stay empty.
    """
    if structures < 100:
        raise WaterError(
            f"{structures} structures: give 100 or more, so that every split gets some"
        )
    trajectories = []
    kinds = SETS[chosen]
    whole = sum(share for share, _ in kinds.values())
    for kind, (share, frames) in kinds.items():
        sizes = SIZES.get(kind, BOX_SIZES)
        frames = min(frames, max(1, share * structures // (3 * whole)))
        for index in range(round(share * structures / whole / frames)):
            # multiples of these irrational numbers fill the square evenly (the R2 sequence)
            x, y = (0.5 + (index + 1) * np.array([0.7548776662466927, 0.5698402909980532])) % 1
            low, high = TEMPERATURES.get(kind, (280.0, 360.0))
            least, most = PRESSURES.get(kind, PRESSURES["npt"])
            # 11 has no divisor in common with the number of sizes: each size gets into each split
            split = {0: "test", 1: "val"}.get(index % 11, "train")
            trajectories.append(
                Trajectory(
                    name=f"{kind}-{index:03d}",
                    kind=kind,
                    waters=sizes[index % len(sizes)],
                    temperature=round(low + (high - low) * x, 1),
                    pressure=round(least + (most - least) * y),
                    density=round(DENSITIES[0] + (DENSITIES[1] - DENSITIES[0]) * y, 3)
                    if kind == "nvt"
                    else 1.0,
                    frames=frames,
                    split=split,
                )
            )
    return trajectories


def sample(trajectory: Trajectory, seed: int) -> list[Atoms]:
    """The labelled structures of one trajectory; the same arguments give the same structures."""
    rng = np.random.default_rng([seed, *trajectory.name.encode()])
    kind = trajectory.kind
    if kind in ("dimer", "molecule"):
        frames = _random(trajectory, rng)
    elif kind == "contact":
        frames = (_contact(rng) for _ in range(trajectory.frames))
    else:
        frames = _dynamics(trajectory, rng)
    kept = []
    for number, frame in enumerate(frames):
        data_id = f"water_{kind}"
        if kind == "squeezed":
            frame = _squeezed(frame, rng)
        elif kind in ("npt", "nvt") and number % STRAINED_EVERY == STRAINED_EVERY - 1:
            frame, data_id = _strained(frame, rng), "water_strained"
        labelled = _label(frame)
        if np.abs(labelled.get_forces()).max() < MAX_FORCE:
            labelled.info |= {
                "source": f"{trajectory.name}, {trajectory.temperature:g} K, structure {number}",
                "reference_source": "allscaip-lite data water",
                "data_id": data_id,
                "trajectory": trajectory.name,
            }
            kept.append(labelled)
    return kept


def _label(frame: Atoms) -> Atoms:
    labelled = frame.copy()
    teacher = SPCFw()
    teacher.calculate(labelled)
    names = ("energy", "forces", "stress") if labelled.pbc.any() else ("energy", "forces")
    labels = {name: teacher.results[name] for name in names}
    labelled.calc = SinglePointCalculator(labelled, **labels)
    labelled.info = {
        "charge": 0,
        "spin": 1,
        "num_atoms": len(labelled),
        "num_electrons": int(labelled.numbers.sum()),
        "composition": labelled.get_chemical_formula("hill"),
        "label": "SPC/Fw, Ewald sums for Coulomb and dispersion",
    }
    return labelled


def molecules(rng: np.random.Generator, count: int, spread: float = 0.0) -> np.ndarray:
    """Waters (count, 3, 3) in Å, turned at random, oxygen at the origin.

    `spread` (Å) is the standard deviation of both bond lengths; the angle's is 3 rad/Å times that.
    """
    lengths = BOND_LENGTH + spread * rng.normal(size=(count, 2))
    half = (ANGLE + 3 * spread * rng.normal(size=count)) / 2
    placed = np.zeros((count, 3, 3))
    placed[:, 1, 0], placed[:, 1, 1] = lengths[:, 0] * np.sin(half), lengths[:, 0] * np.cos(half)
    placed[:, 2, 0], placed[:, 2, 1] = -lengths[:, 1] * np.sin(half), lengths[:, 1] * np.cos(half)
    turns = Rotation.random(count, rng=rng).as_matrix()
    return np.einsum("wab,wcb->wca", turns, placed)


def water_box(waters: int, density: float = 1.0, seed: int = 0) -> Atoms:
    """A cube of waters on a lattice, turned at random, at a density in g/cm³.

    A start for a simulation, to be relaxed first: neighbours may touch.
    """
    rng = np.random.default_rng(seed)
    mass = waters * Atoms("OH2").get_masses().sum()
    edge = (mass / (density * units.kg / 1000 * 1e-24)) ** (1 / 3)
    per_edge = next(n for n in range(1, waters + 1) if n**3 >= waters)
    grid = np.stack(np.meshgrid(*[np.arange(per_edge)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    sites = grid[np.sort(rng.permutation(len(grid))[:waters])] * edge / per_edge
    positions = sites[:, None] + molecules(rng, waters)
    return Atoms("OH2" * waters, positions.reshape(-1, 3), cell=[edge] * 3, pbc=True)


def _random(trajectory: Trajectory, rng: np.random.Generator) -> Iterator[Atoms]:
    """Single molecules with strong vibrations, or pairs 2.4 to 9 Å apart with weaker ones."""
    made = 0
    while made < trajectory.frames:
        single = trajectory.kind == "molecule"
        spread = rng.choice([0.02, 0.05, 0.1]) if single else rng.choice([0.01, 0.03])
        placed = molecules(rng, trajectory.waters, spread)
        if not single:
            direction = rng.normal(size=3)
            placed[1] += rng.uniform(2.4, 9.0) * direction / np.linalg.norm(direction)
            between = np.linalg.norm(placed[0][:, None] - placed[1], axis=2)
            if between.min() < 1.5:
                continue
        made += 1
        yield Atoms("OH2" * trajectory.waters, placed.reshape(-1, 3))


def _closest() -> np.ndarray:
    """The least distance in Å of two molecules' atoms, (3, 3), that any contact has."""
    names = ("O", "H", "H")
    pairs = [[tuple(sorted((one, other), reverse=True)) for other in names] for one in names]
    return np.array([[CONTACTS[pair][0] for pair in row] for row in pairs])


def _touching(rng: np.random.Generator) -> tuple[int, int, float]:
    """Which atom of one molecule comes how close (Å) to which atom of another; half are H and H."""
    kinds = list(CONTACTS)
    kind = kinds[rng.choice(3, p=(0.5, 0.25, 0.25))]
    first, second = (0 if name == "O" else int(rng.integers(1, 3)) for name in kind)
    return first, second, float(rng.uniform(*CONTACTS[kind]))


def _contact(rng: np.random.Generator) -> Atoms:
    """Two waters in vacuum, turned at random, that touch."""
    while True:
        placed = molecules(rng, 2, rng.choice([0.01, 0.03]))
        first, second, distance = _touching(rng)
        direction = rng.normal(size=3)
        direction *= distance / np.linalg.norm(direction)
        placed[1] += placed[0, first] + direction - placed[1, second]
        if (np.linalg.norm(placed[0][:, None] - placed[1], axis=2) > _closest() - 1e-9).all():
            return Atoms("OH2OH2", placed.reshape(-1, 3))


def _squeezed(frame: Atoms, rng: np.random.Generator) -> Atoms:
    """A box in which one molecule is moved along the line of two atoms until they touch."""
    waters = len(frame) // 3
    while True:
        first, second, distance = _touching(rng)
        still = int(rng.integers(waters))
        others = np.delete(np.arange(waters), still)
        apart = frame.get_distances(3 * still + first, 3 * others + second, mic=True, vector=True)
        nearest = int(np.linalg.norm(apart, axis=1).argmin())
        line, moving = apart[nearest], int(others[nearest])
        squeezed = frame.copy()
        squeezed.positions[3 * moving : 3 * moving + 3] += line * (
            distance / np.linalg.norm(line) - 1
        )
        rest = np.delete(np.arange(len(frame)), range(3 * moving, 3 * moving + 3))
        around = np.stack(
            [squeezed.get_distances(3 * moving + k, rest, mic=True) for k in range(3)]
        )
        if (around > np.tile(_closest(), waters - 1) - 1e-9).all():
            return squeezed


def _strained(frame: Atoms, rng: np.random.Generator) -> Atoms:
    """Molecules moved apart or together by a random strain of some per cent, atoms displaced."""
    noise = rng.normal(size=(3, 3)) * 0.015
    deformation = np.eye(3) + (noise + noise.T) / 2 + np.eye(3) * rng.normal() * 0.01
    strained = frame.copy()
    whole = frame.positions.reshape(-1, 3, 3)
    moved = whole + (whole[:, :1] @ deformation - whole[:, :1])
    strained.positions = moved.reshape(-1, 3) + rng.normal(size=frame.positions.shape) * 0.02
    strained.set_cell(frame.cell.array @ deformation)
    return strained


# --- Sampling with OpenMM --------------------------------------------------------------------


def _dynamics(trajectory: Trajectory, rng: np.random.Generator) -> Iterator[Atoms]:
    """Structures of one run at constant temperature, after minimisation and a hotter start."""
    import openmm

    if trajectory.kind == "cluster":
        atoms = _droplet(trajectory.waters, rng)
    else:
        atoms = water_box(trajectory.waters, trajectory.density, int(rng.integers(2**31)))
    if trajectory.kind == "nvt":  # a cell that is no cube, of the same volume
        skew = np.tril(rng.normal(size=(3, 3))) * 0.06
        skew = np.eye(3) + np.clip(skew, -0.12, 0.12)
        atoms.set_cell(atoms.cell.array @ skew / np.linalg.det(skew) ** (1 / 3))
        shift = atoms.get_scaled_positions()[::3] @ atoms.cell.array - atoms.positions[::3]
        atoms.positions += np.repeat(shift, 3, axis=0)
    system = openmm_system(atoms)
    temperature = trajectory.temperature
    if trajectory.kind in PRESSURES:
        pressure = trajectory.pressure
        if trajectory.kind == "liquid":
            pressure -= missing_pressure(atoms)
        barostat = openmm.MonteCarloBarostat(pressure, temperature, 25)
        barostat.setRandomNumberSeed(int(rng.integers(1, 2**31)))
        system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(1.25 * temperature, 2.0, STEP / 1000)
    integrator.setRandomNumberSeed(int(rng.integers(1, 2**31)))
    # one thread: sums over several depend on their order
    platform = openmm.Platform.getPlatformByName("CPU")
    properties = {"Threads": "1", "DeterministicForces": "true"}
    context = openmm.Context(system, integrator, platform, properties)
    context.setPositions(atoms.positions / 10)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
    context.setVelocitiesToTemperature(temperature, int(rng.integers(1, 2**31)))
    integrator.step(STEPS_BEFORE)
    integrator.setTemperature(temperature)
    integrator.step(STEPS_BEFORE)
    for _ in range(trajectory.frames):
        integrator.step(STEPS_BETWEEN)
        state = context.getState(getPositions=True, enforcePeriodicBox=bool(atoms.pbc.any()))
        frame = atoms.copy()
        frame.positions = 10 * state.getPositions(asNumpy=True)._value
        if frame.pbc.any():
            frame.set_cell(10 * state.getPeriodicBoxVectors(asNumpy=True)._value)
        else:
            frame.positions -= frame.positions.mean(0)
        yield frame


def _droplet(waters: int, rng: np.random.Generator) -> Atoms:
    """Waters on the sites of a cubic lattice that are next to a random point, 3.1 Å apart."""
    grid = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    distance = np.linalg.norm(grid - rng.uniform(-0.5, 0.5, 3), axis=1)
    sites = 3.1 * grid[np.argsort(distance)[:waters]]
    positions = sites[:, None] + molecules(rng, waters)
    return Atoms("OH2" * waters, positions.reshape(-1, 3))


def openmm_system(atoms: Atoms, cutoff: float | None = None, tolerance: float = 5e-4):
    """The same water as an `openmm.System`: no cutoff in vacuum, in a box Coulomb and dispersion by
    particle mesh Ewald (LJPME), within a relative error `tolerance`.

    `cutoff` (Å) is that of repulsion and real-space sums; by default 0.42 of the box's narrowest
    width, so that a fluctuating box stays wider than twice the cutoff, and 9 Å at most.
    """
    import openmm

    system = openmm.System()
    nonbonded, bonds = openmm.NonbondedForce(), openmm.HarmonicBondForce()
    angles = openmm.HarmonicAngleForce()
    kilojoule = units.kJ / units.mol
    for first in range(0, len(atoms), 3):
        for atom, mass in enumerate(atoms.get_masses()[first : first + 3]):
            system.addParticle(mass)
            well = EPSILON / kilojoule if atom == 0 else 0.0
            nonbonded.addParticle(CHARGES[atom], SIGMA / 10, well)
        for hydrogen in (first + 1, first + 2):
            constant = 100 * BOND_CONSTANT / kilojoule
            bonds.addBond(first, hydrogen, BOND_LENGTH / 10, constant)
            nonbonded.addException(first, hydrogen, 0, 1, 0)
        nonbonded.addException(first + 1, first + 2, 0, 1, 0)
        angles.addAngle(first + 1, first, first + 2, ANGLE, ANGLE_CONSTANT / kilojoule)
    if atoms.pbc.any():
        nonbonded.setNonbondedMethod(openmm.NonbondedForce.LJPME)
        nonbonded.setCutoffDistance((cutoff or _cutoff(atoms)) / 10)
        nonbonded.setEwaldErrorTolerance(tolerance)
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    for force in (nonbonded, bonds, angles):
        system.addForce(force)
    return system


def _cutoff(atoms: Atoms) -> float:
    widths = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    return min(9.0, 0.42 * widths.min())


def missing_pressure(atoms: Atoms) -> float:
    """The mean pressure (bar) of the repulsion that OpenMM leaves out of a box of water: that of
    oxygens beyond its cutoff, were they spread evenly there (g_OO = 1). 400 bar for 32 waters.

    2π/3 ρ² ∫ r³ · 12 C12 / r¹³ dr from the cutoff on (Allen and Tildesley, Computer Simulation of
    Liquids, section 2.8), and of LJPME's dispersion nothing is left out.
    """
    oxygens = len(atoms) // 3 / atoms.get_volume()  # Å⁻³
    return 8 / 9 * np.pi * oxygens**2 * C12 / _cutoff(atoms) ** 9 / units.bar


# --- The command -----------------------------------------------------------------------------


def generate(
    folder: str | os.PathLike, trajectories: Sequence[Trajectory], seed: int = 0, workers: int = 1
) -> dict[str, int]:
    """Sample and label, write `{train,val,test}.aselmdb` and `references.json`, count structures.

    Each trajectory is stored under `folder/trajectories` as it is done; a run that was stopped goes
    on from there, and yields what an uninterrupted one does, as does any number of workers. Raises
    WaterError where `folder` holds another plan or seed. The workers are new processes: a script
    that calls this needs the usual `if __name__ == "__main__"`.
    """
    import openmm  # noqa: F401  a missing one is to be said before any work

    folder = Path(folder)
    store = folder / "trajectories"
    store.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"seed": seed, "trajectories": [vars(t) for t in trajectories]}, indent=0)
    listing = folder / "plan.json"
    if listing.exists() and listing.read_text() != text:
        raise WaterError(f"{folder} holds another data set (its plan.json): choose a new --out")
    store_text(listing, text)

    files = [store / f"{trajectory.name}.aselmdb" for trajectory in trajectories]
    waiting = [
        (trajectory, seed, file)
        for trajectory, file in zip(trajectories, files, strict=True)
        if not file.exists()
    ]
    total = sum(trajectory.frames for trajectory in trajectories)
    done = total - sum(trajectory.frames for trajectory, *_ in waiting)
    with tqdm(total=total, initial=done, unit="structures", mininterval=1) as bar:
        for frames in in_processes(_work, waiting, workers):
            bar.update(frames)

    counts = {}
    for split in SPLITS:
        structures = [
            atoms
            for trajectory, file in zip(trajectories, files, strict=True)
            if trajectory.split == split
            for atoms in Dataset(file)
        ]
        counts[split] = write_aselmdb(folder / f"{split}.aselmdb", structures, overwrite=True)
    store_text(folder / "references.json", json.dumps({"H": 0.0, "O": 0.0}, indent=1))
    return counts


def _work(task: tuple[Trajectory, int, Path]) -> int:
    trajectory, seed, file = task
    write_aselmdb(file, sample(trajectory, seed))
    return trajectory.frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data water`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--set",
        choices=tuple(SETS),
        default="main",
        help="main; liquid: boxes near 298 K and 1 bar, the liquid of docs/water.md",
    )
    parser.add_argument("--structures", type=int, default=4600, help="about how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data water`: make the data set, or go on making one; the exit status."""
    counts = generate(args.out, plan(args.structures, args.set), args.seed, args.workers)
    for split, count in counts.items():
        print(f"{split}: {count} structures", file=sys.stderr)
    return 0
