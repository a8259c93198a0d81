"""Waters to start from: single molecules, periodic boxes, clusters.

In: how many, and a seed. Out: positions or `ase.Atoms`, atoms as O, H, H. The maker of
`data/water`, studies and lessons share them.
"""

from __future__ import annotations

import math

import numpy as np
from ase import Atoms, units
from scipy.spatial.transform import Rotation

from allscaip_lite.spcfw import ANGLE, BOND_LENGTH


def molecules(rng: np.random.Generator, count: int, spread: float = 0.0) -> np.ndarray:
    """Waters (count, 3, 3) in Å, turned at random, oxygen at the origin.

    `spread` is the standard deviation of both bond lengths in Å; the angle's is 3 rad/Å times that.
    """
    lengths = BOND_LENGTH + spread * rng.normal(size=(count, 2))
    half = (ANGLE + 3 * spread * rng.normal(size=count)) / 2
    placed = np.zeros((count, 3, 3))
    placed[:, 1, 0], placed[:, 1, 1] = lengths[:, 0] * np.sin(half), lengths[:, 0] * np.cos(half)
    placed[:, 2, 0], placed[:, 2, 1] = -lengths[:, 1] * np.sin(half), lengths[:, 1] * np.cos(half)
    turns = Rotation.random(count, rng=rng).as_matrix()
    return np.einsum("wab,wcb->wca", turns, placed)


def water_box(waters: int, density: float = 1.0, seed: int = 0) -> Atoms:
    """A periodic cube of waters on a lattice, turned at random.

    A start for a simulation, to be relaxed first: neighbours may touch.

    Args:
        waters: how many.
        density: in g/cm³.
        seed: of the orientations, and of the sites where there are more than waters.
    """
    rng = np.random.default_rng(seed)
    mass = waters * Atoms("OH2").get_masses().sum()
    edge = (mass / (density * units.kg / 1000 * 1e-24)) ** (1 / 3)
    per_edge = next(n for n in range(1, waters + 1) if n**3 >= waters)
    grid = np.stack(np.meshgrid(*[np.arange(per_edge)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    sites = grid[np.sort(rng.permutation(len(grid))[:waters])] * edge / per_edge
    positions = sites[:, None] + molecules(rng, waters)
    return Atoms("OH2" * waters, positions.reshape(-1, 3), cell=[edge] * 3, pbc=True)


def water_cluster(waters: int, seed: int = 0) -> Atoms:
    """A ball of water molecules at the density of the liquid, neutral singlet; positions in Å.

    Molecules stand near the points of a cubic lattice nearest to its middle, turned at random;
    hydrogens of neighbours stay more than 1 Å apart.
    """
    random = np.random.default_rng(seed)
    spacing = 0.0334 ** (-1 / 3)  # Å between molecules at 0.997 g/cm³
    side = math.ceil(1.5 * waters ** (1 / 3)) + 2
    points = np.stack(np.meshgrid(*[np.arange(side) - side / 2] * 3), -1).reshape(-1, 3)
    points = points[np.argsort(np.linalg.norm(points, axis=1), kind="stable")][:waters]
    angle = math.radians(104.5) / 2
    hydrogens = 0.96 * np.array(
        [[math.sin(angle), 0, math.cos(angle)], [-math.sin(angle), 0, math.cos(angle)]]
    )
    positions: list[np.ndarray] = []
    for point in points * spacing:
        placed = np.reshape(positions, (-1, 3))
        for _ in range(1000):
            oxygen = point + random.normal(scale=0.1, size=3)
            molecule = np.vstack([oxygen, oxygen + Rotation.random(rng=random).apply(hydrogens)])
            gaps = np.linalg.norm(placed[:, None] - molecule, axis=-1)
            if gaps.size == 0 or gaps.min() > 1.5:
                break
        positions.extend(molecule)
    cluster = Atoms("OH2" * waters, positions=positions)
    cluster.info.update(charge=0, spin=1)
    return cluster
