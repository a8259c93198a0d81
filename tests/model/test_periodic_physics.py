"""Periodic physics: force constants, elastic constants, cells against supercells, nearest images.

The weights are random, so nothing here holds because a model has learned it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from allscaip_lite import AllScAIP

ModelMaker = Callable[..., AllScAIP]
STEP = 1e-4


def strained(atoms: Atoms, deformation: np.ndarray) -> Atoms:
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    return moved


def test_force_constants_are_symmetric_and_add_up_to_zero(
    make_model: ModelMaker, crystal: Atoms
) -> None:
    """The acoustic sum rule: moving all atoms together costs nothing, so rows add up to zero."""
    moved = []
    for coordinate in range(3 * len(crystal)):
        for sign in (1, -1):
            atoms = crystal.copy()
            atoms.positions.flat[coordinate] += sign * STEP
            moved.append(atoms)
    forces = np.array([result.forces.ravel() for result in make_model().predict(moved)])
    constants = (forces[1::2] - forces[::2]) / (2 * STEP)  # (3N, 3N) eV/Å²
    assert np.abs(constants).max() > 0.1
    np.testing.assert_allclose(constants, constants.T, atol=1e-6)
    np.testing.assert_allclose(constants.reshape(21, 7, 3).sum(1), 0, atol=1e-8)


@pytest.mark.parametrize("name", ["crystal", "slab"])
def test_elastic_constants_of_normal_strains_are_symmetric(
    make_model: ModelMaker, request: pytest.FixtureRequest, name: str
) -> None:
    """The energy's second derivatives by the stretches λ along x, y, z, of which Vσ/λ is the first.

    At a stress of zero they are the volume times C11, C12, ... Shears are left out: two of them
    in a row also turn the crystal, and the energy of random weights changes with that.
    """
    atoms, model = request.getfixturevalue(name), make_model()

    def slope(stretch: np.ndarray) -> np.ndarray:
        under = strained(atoms, np.diag(stretch))
        return under.get_volume() * model.predict(under).stress.diagonal() / stretch

    steps = STEP * np.eye(3)
    second = np.array([slope(1 + step) - slope(1 - step) for step in steps]) / (2 * STEP)
    assert np.abs(second).max() > 0.1
    np.testing.assert_allclose(second, second.T, rtol=1e-5, atol=1e-5)


def test_either_handed_cells_of_a_lattice_have_one_stress(
    make_model: ModelMaker, crystal: Atoms
) -> None:
    other = crystal.copy()
    other.set_cell(crystal.cell.array[[1, 0, 2]])
    assert np.linalg.det(other.cell.array) < 0 < np.linalg.det(crystal.cell.array)
    one, two = make_model().predict([crystal, other])
    assert np.abs(one.stress).max() > 1e-4
    np.testing.assert_allclose(two.stress, one.stress, atol=1e-10)
    np.testing.assert_allclose(two.forces, one.forces, atol=1e-8)


def neutral(atoms: Atoms) -> Atoms:
    """With a multiplicity that every number of copies of magnesium oxide allows."""
    atoms.info.update(charge=0, spin=1)
    return atoms


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("name", ["triclinic", "rock salt"])
def test_a_supercell_is_as_many_cells_without_node_attention_alone(
    make_model: ModelMaker, crystal: Atoms, name: str, local: bool
) -> None:
    """All cells are smaller than the cutoff, so an atom has edges to images of itself.

    Node attention has as many partners as the cell has atoms, each at its nearest image: another
    number for another cell, which training makes small and nothing makes zero.
    """
    salt = bulk("MgO", "rocksalt", a=4.2)
    conventional = neutral(bulk("MgO", "rocksalt", a=4.2, cubic=True))
    pairs = {"triclinic": (crystal, crystal * (1, 2, 1)), "rock salt": (salt, conventional)}
    small, large = map(neutral, pairs[name])
    model = make_model(node_attention=not local)
    one, more = model.predict([small, large])
    copies, mean = len(large) // len(small), float(model.energy_mean)
    difference = (more.energy - mean) / copies - (one.energy - mean)
    if not local:
        assert abs(difference) > 1e-5
        return
    assert difference == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(more.stress, one.stress, atol=1e-10)
    for atoms, result in ((small, one), (large, more)):
        for number in set(small.numbers) if name == "rock salt" else ():
            forces = result.forces[atoms.numbers == number]
            np.testing.assert_allclose(forces - one.forces[small.numbers == number], 0, atol=1e-9)
    if name == "triclinic":
        np.testing.assert_allclose(more.forces, np.tile(one.forces, (copies, 1)), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "kink"),
    [({}, True), ({"rotary": False}, False), ({"node_attention": False}, False)],
    ids=["ERoPE", "node attention", "local"],
)
def test_the_force_jumps_where_a_pair_changes_its_nearest_image(
    make_model: ModelMaker, options: dict, kink: bool
) -> None:
    """The distance to the nearest image has a kink there; its one reader is the rotation."""
    box = 14.0  # beyond the cutoff, where no edge sees the two images change places
    found = []
    model = make_model(**options)
    for side in (-1e-4, 1e-4):  # more than the distance within which two images count as equal
        places = [(0, 0, 0), (0.9, 0.3, 0), (box / 2 + side, 0.1, 0.2), (box / 2 + 1.4, -0.3, 0)]
        atoms = Atoms("OHCN", places, cell=[box, 20, 20], pbc=True)
        found.append(model.predict(neutral(atoms)))
    before, after = found
    assert after.energy == pytest.approx(before.energy, abs=1e-3)
    jump = np.abs(after.forces - before.forces)[[0, 2], 0].max()
    assert (jump > 3e-3) == kink, jump
