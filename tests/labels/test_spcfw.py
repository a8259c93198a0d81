"""SPC/Fw: one potential whatever the box."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from allscaip_lite import spcfw
from allscaip_lite.errors import InputError
from allscaip_lite.labels import LabelError
from allscaip_lite.labels.spcfw import label
from allscaip_lite.spcfw import SPCFw
from data.water.boxes import molecules, water_box

KCAL = units.kcal / units.mol


def box(waters: int = 8, density: float = 0.8, seed: int = 0, whole: bool = False) -> Atoms:
    """A box whose cell is no cube, molecules bent and stretched, one across its boundary."""
    atoms = water_box(waters, density, seed)
    atoms.rattle(0.05, seed=seed)
    skew = np.eye(3) + [[0, 0.05, -0.03], [0.08, 0.03, 0], [-0.04, 0.06, -0.02]]
    atoms.set_cell(atoms.cell.array @ skew, scale_atoms=False)
    if not whole:
        atoms.positions[1] += atoms.cell[0]
    atoms.calc = SPCFw()
    return atoms


def cluster(waters: int = 4, seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    sites = 3.0 * np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    positions = sites[:waters, None] + molecules(rng, waters, 0.05)
    return Atoms("OH2" * waters, positions.reshape(-1, 3), calculator=SPCFw())


# --- the potential ------------------------------------------------------------------------------


def test_a_relaxed_molecule_has_no_energy_and_no_forces():
    molecule = Atoms("OH2", molecules(np.random.default_rng(0), 1)[0], calculator=SPCFw())
    assert molecule.get_potential_energy() == pytest.approx(0, abs=1e-12)
    assert np.abs(molecule.get_forces()).max() < 1e-9


def test_a_stretched_and_bent_molecule_has_the_energy_of_its_springs():
    angle = np.deg2rad(113.24 + 10)
    far = [1.112 * np.sin(angle), 1.112 * np.cos(angle), 0]
    molecule = Atoms("OH2", [[0, 0, 0], [0, 1.062, 0], far], calculator=SPCFw())
    bonds = 1059.162 / 2 * (0.05**2 + 0.1**2)
    bend = 75.90 / 2 * np.deg2rad(10) ** 2
    assert molecule.get_potential_energy() == pytest.approx((bonds + bend) * KCAL, rel=1e-12)


def test_two_waters_have_the_energy_of_their_charges_and_oxygens():
    pair = cluster(2, seed=3)
    inside = 0.0
    for part in (pair[:3], pair[3:]):
        part.calc = SPCFw()
        inside += part.get_potential_energy()
    charge = np.array([-0.82, 0.41, 0.41])
    distance = np.linalg.norm(pair.positions[:3, None] - pair.positions[None, 3:], axis=2)
    expected = 332.06371 * (charge[:, None] * charge / distance).sum()
    six = (3.165492 / distance[0, 0]) ** 6
    expected += 4 * 0.1554253 * (six**2 - six)
    assert pair.get_potential_energy() - inside == pytest.approx(expected * KCAL, abs=1e-7)


@pytest.mark.parametrize("make", [box, cluster])
def test_forces_are_the_energy_s_derivative(make):
    atoms = make()
    expected = calculate_numerical_forces(atoms, eps=1e-4, iatoms=range(6))
    assert atoms.get_forces()[:6] == pytest.approx(expected, abs=1e-4)
    assert atoms.get_forces().sum(0) == pytest.approx(np.zeros(3), abs=1e-10)


def test_stress_is_the_energy_s_derivative():
    atoms = box()
    # smaller steps see the 1e-7 eV of a wave that comes into the sum or leaves it
    expected = calculate_numerical_stress(atoms, eps=3e-4, voigt=True)
    assert atoms.get_stress() == pytest.approx(expected, abs=3 * units.bar)
    assert np.abs(expected).max() > 500 * units.bar


def test_a_box_and_its_supercell_feel_the_same():
    small = box(whole=True)
    large = small.repeat(2)
    large.calc = SPCFw()
    assert large.get_potential_energy() / 8 == pytest.approx(small.get_potential_energy(), abs=1e-9)
    assert large.get_forces()[: len(small)] == pytest.approx(small.get_forces(), abs=1e-9)
    assert large.get_stress() == pytest.approx(small.get_stress(), abs=1e-6 * units.bar)


def test_the_split_of_the_sums_changes_nothing(monkeypatch):
    energy, forces, strain = spcfw.spcfw(box().positions, box().cell.array)
    monkeypatch.setattr(spcfw, "CUTOFF", 12.0)
    monkeypatch.setattr(spcfw, "SPLITTING", 4.0 / 12.0)
    monkeypatch.setattr(spcfw, "WAVE_CUTOFF", 8.0 * 4.0 / 12.0)
    other = spcfw.spcfw(box().positions, box().cell.array)
    # what is left is the repulsion past 9 Å
    assert other[0] == pytest.approx(energy, abs=2e-6 * 8)
    assert other[1] == pytest.approx(forces, abs=1e-6)
    assert other[2] == pytest.approx(strain, abs=1e-4)


def test_a_wide_empty_box_is_vacuum():
    alone = cluster(2)
    boxed = alone.copy()
    boxed.set_cell([40, 40, 40])
    boxed.center()
    boxed.pbc = True
    boxed.calc = SPCFw()
    # what is left are dipoles with their images, at 40 Å
    assert boxed.get_potential_energy() == pytest.approx(alone.get_potential_energy(), abs=5e-4)
    assert boxed.get_forces() == pytest.approx(alone.get_forces(), abs=5e-4)


def test_rotation_and_translation_change_nothing():
    atoms = box()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    turned = atoms.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    turned.positions += (3.0, -7.0, 11.0)
    turned.wrap()
    turned.calc = SPCFw()
    assert turned.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    assert np.linalg.norm(turned.get_forces(), axis=1) == pytest.approx(
        np.linalg.norm(forces, axis=1), abs=1e-9
    )


@pytest.mark.parametrize(
    "atoms, words",
    [
        (Atoms("H2O", np.eye(3)), "O, H, H"),
        (Atoms("OH2OH", np.eye(5)[:, :3] * 3), "O, H, H"),
        (Atoms("OH2", np.eye(3), cell=[9, 9, 9], pbc=(True, True, False)), "all directions"),
    ],
)
def test_what_is_not_water_is_refused(atoms, words):
    atoms.calc = SPCFw()
    with pytest.raises(InputError, match=words):
        atoms.get_potential_energy()


def test_a_cluster_has_no_stress():
    with pytest.raises(PropertyNotImplementedError):
        cluster().get_stress()


def test_a_label_says_what_it_is_and_ions_are_refused():
    pair, periodic = label(cluster(2)), label(box())
    assert pair.get_potential_energy() == cluster(2).get_potential_energy()
    assert "stress" not in pair.calc.results and periodic.get_stress().shape == (6,)
    assert (pair.info["charge"], pair.info["spin"], pair.info["num_electrons"]) == (0, 1, 20)
    ion = cluster(1)
    ion.info = {"charge": 1}
    with pytest.raises(LabelError, match="neutral"):
        label(ion)
