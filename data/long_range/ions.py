"""Point charges with a soft core: energies that reach far, and are known exactly.

In: elements of `CHARGES` and positions. Out: energy (eV) and forces (eV/Å) by a formula, an ASE
calculator of it, and structures of two groups of ions and dipoles: the structures of lesson 08 and
of the set `ions`.

Two structures that differ only in a gap wider than what a local model sees look alike to it
(arXiv:2603.06567, on all-to-all node attention).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.labels import LabelError, counts_of

COULOMB = units.Hartree * units.Bohr  # e²/4πε₀ in eV Å
# e. H and F make dipoles. Two ions of each sign, since attention averages: atoms that are alike in
# element and neighbourhood are averaged to the same, whatever the weights and the distance.
CHARGES = {"Na": 1.0, "K": 1.0, "Cl": -1.0, "Br": -1.0, "H": 0.4, "F": -0.4}
CORE = 1.0  # Å
BOND = 0.95  # Å, between the two ends of a dipole
TRAINED_TO = 20.0  # Å: the widest gap of the training structures


def point_charges(symbols: Sequence[str], positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (N, 3) (eV/Å) of E = Σ_{i<j} k q_i q_j / sqrt(r² + CORE²).

    positions (N, 3) in Å, charges by element from `CHARGES`. Exact, of any number of atoms; at
    r much larger than CORE it is Coulomb's law. Raises LabelError for other elements.
    """
    unknown = sorted(set(symbols) - set(CHARGES))
    if unknown:
        raise LabelError(f"{unknown}: point charges are {', '.join(CHARGES)} only")
    charges = np.array([CHARGES[symbol] for symbol in symbols])
    vectors = positions[:, None] - positions[None]  # (N, N, 3), from j to i
    inverse = ((vectors**2).sum(2) + CORE**2) ** -0.5  # (N, N)
    strength = COULOMB * charges[:, None] * charges * (1 - np.eye(len(charges)))
    energy = (strength * inverse).sum() / 2
    forces = (strength[..., None] * inverse[..., None] ** 3 * vectors).sum(1)
    return float(energy), forces


class PointCharges(Calculator):
    """ASE calculator of `point_charges`: energy (eV) and forces (eV/Å), without periodicity."""

    implemented_properties = ["energy", "free_energy", "forces"]

    def calculate(self, *arguments: Any, **named: Any) -> None:
        super().calculate(*arguments, **named)
        atoms = self.atoms
        assert atoms is not None
        if atoms.pbc.any():
            raise LabelError("point charges are summed in vacuum: set pbc to False")
        energy, forces = point_charges(list(atoms.symbols), atoms.positions)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


IONS = ("Na", "K", "Cl", "Br")
PARTICLES = (*IONS, "HF", "HF")


def particle(name: str, direction: np.ndarray) -> Atoms:
    """An ion at the origin, or a dipole centred there whose positive end is at `direction`."""
    if name != "HF":
        return Atoms(name, [[0.0, 0.0, 0.0]])
    half = BOND / 2 * np.asarray(direction) / np.linalg.norm(direction)
    return Atoms("HF", [half, -half])


def join(first: Atoms, second: Atoms, kind: str, name: str, method: Calculator) -> Atoms:
    """Two groups of atoms as one labelled structure.

    `info` says which atoms are the second group's (`probe`), the direction towards it (`axis`), the
    distance of the groups' centres (`distance`) and of their closest atoms (`gap`), in Å.

    Args:
        first: A group of atoms with its charge in `info`.
        second: The other group.
        kind: The `data_id` of the structure.
        name: Its `source`.
        method: The calculator that labels it.
    """
    atoms = first + second
    axis = second.positions.mean(0) - first.positions.mean(0)
    distance = float(np.linalg.norm(axis))
    between = np.linalg.norm(first.positions[:, None] - second.positions, axis=2)
    charge = sum(int(part.info["charge"]) for part in (first, second))
    atoms.info = {
        "charge": charge,
        "spin": 1,
        **counts_of(atoms, charge),
        "reference_source": "allscaip-lite, data/long_range/make.py",
        "data_id": kind,
        "source": name,
        "distance": distance,
        "gap": float(between.min()),
        "axis": (axis / distance).tolist(),
        "probe": list(range(len(first), len(atoms))),
    }
    return labelled(atoms, method)


def labelled(atoms: Atoms, method: Calculator) -> Atoms:
    """A copy of the structure with energy and forces by a calculator."""
    atoms = atoms.copy()
    method.calculate(atoms)
    results = {name: method.results[name] for name in ("energy", "forces")}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def ion_group(rng: np.random.Generator, particles: Sequence[str]) -> Atoms:
    """Particles 2.3 to 3.5 Å from their nearest neighbour, turned at random; charge in `info`."""
    group = Atoms()
    for name in particles:
        while True:
            new = particle(name, rng.normal(size=3))
            if len(group) == 0:
                break
            anchor = group.positions[rng.integers(len(group))]
            new.positions += anchor + _sphere(rng) * rng.uniform(2.3, 3.5)
            nearest = np.linalg.norm(new.positions[:, None] - group.positions, axis=2).min()
            if nearest >= 2.0:
                break
        group += new
    group.positions -= group.positions.mean(0)
    group.info["charge"] = round(sum(CHARGES[symbol] for symbol in group.symbols))
    return group


def _sphere(rng: np.random.Generator) -> np.ndarray:
    direction = rng.normal(size=3)
    return direction / np.linalg.norm(direction)


def _separate(first: Atoms, second: Atoms, direction: np.ndarray, gap: float) -> Atoms:
    """The second group moved along `direction` until its closest atom is `gap` Å away."""
    moved = second.copy()
    for distance in np.arange(gap, gap + 40.0, 0.02):
        moved.positions = second.positions + distance * direction
        between = np.linalg.norm(moved.positions[:, None] - first.positions, axis=2)
        if between.min() >= gap:
            break
    moved.info = dict(second.info)
    return moved


def ions(count: int, seed: int) -> Iterator[Atoms]:
    """`count` structures of two groups of point charges, gaps even between 2 and 20 Å.

    `data_id`: three in ten are two different single ions (`ions_pair`), three in ten have a single
    dipole on one side or both (`ions_dipole`), the others two groups of 2 or 3 particles
    (`ions_cluster`).
    """
    rng = np.random.default_rng([seed, 5])
    for index in range(count):
        share = index % 10
        if share < 3:
            kind = "ions_pair"
            parts = list(rng.choice(IONS, (2, 1), replace=False))
        elif share < 6:
            kind = "ions_dipole"
            parts = [np.array(["HF"]), rng.choice(PARTICLES, 1)]
        else:
            kind = "ions_cluster"
            parts = [rng.choice(PARTICLES, rng.integers(2, 4)) for _ in range(2)]
        first, second = (ion_group(rng, part) for part in parts)
        second = _separate(first, second, _sphere(rng), rng.uniform(2.0, TRAINED_TO))
        name = f"{'+'.join(parts[0])}...{'+'.join(parts[1])}/{index}"
        yield join(first, second, kind, name, PointCharges())


def ion_pair(first: str, second: str, distance: float) -> Atoms:
    """Two particles of `PARTICLES` on the x axis, so many Å between their centres, labelled.

    Dipoles lie along the axis, the negative end to a positive ion or another's positive end.
    """
    towards = -1.0 if {"Cl", "Br"} & {first, second} else 1.0
    groups = []
    for place, name in ((0.0, first), (distance, second)):
        away = np.array([towards if place else -towards, 0.0, 0.0])
        if first == second == "HF":
            away = np.array([1.0, 0.0, 0.0])  # head to tail
        group = particle(name, away)
        group.positions[:, 0] += place
        group.info["charge"] = round(sum(CHARGES[symbol] for symbol in group.symbols))
        groups.append(group)
    return join(groups[0], groups[1], "curve", f"{first}...{second}", PointCharges())


ION_CURVES = (
    ("Na", "K"),
    ("Na", "Cl"),
    ("Cl", "Br"),
    ("HF", "Na"),
    ("HF", "Cl"),
    ("HF", "HF"),
    ("Na", "Na"),  # in no training structure
)


def ion_curves() -> Iterator[Atoms]:
    """The pairs of `ION_CURVES` in 57 steps from 2 to 30 Å: the last third is beyond training."""
    for first, second in ION_CURVES:
        for distance in np.arange(2.0, 30.01, 0.5):
            yield ion_pair(first, second, float(distance))
