"""GFN2-xTB's labels are physical, and those that cannot be had are refused."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculatorError

pytest.importorskip("tblite")

from allscaip_lite.labels import LabelError, xtb
from allscaip_lite.labels.xtb import GFN2xTB


def energy(atoms: Atoms, charge: int = 0, spin: int = 1) -> float:
    atoms = atoms.copy()
    atoms.info = {"charge": charge, "spin": spin}
    atoms.calc = GFN2xTB(accuracy=0.1)
    return atoms.get_potential_energy()


def test_triplet_oxygen_lies_below_singlet():
    oxygen = molecule("O2")
    assert energy(oxygen, spin=3) < energy(oxygen, spin=1) - 0.3


def test_triplet_methylene_lies_below_singlet():
    assert energy(molecule("CH2_s3B1d"), spin=3) < energy(molecule("CH2_s1A1d"), spin=1) - 0.1


def test_forces_are_the_energy_s_derivative():
    radical = molecule("CH3O", info={"charge": 0, "spin": 2})
    radical.rattle(0.05, seed=1)
    radical.calc = GFN2xTB(accuracy=0.01)
    forces, step = radical.get_forces(), 1e-3
    for atom, axis in ((0, 0), (1, 1), (2, 2)):
        shifted = []
        for sign in (1, -1):
            moved = radical.copy()
            moved.positions[atom, axis] += sign * step
            moved.calc = GFN2xTB(accuracy=0.01)
            shifted.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx(
            -(shifted[0] - shifted[1]) / (2 * step), abs=1e-3
        )


def test_stress_is_the_energy_s_derivative():
    chain = Atoms("HF", [[0, 0, 0], [0.9, 0.1, 0]], cell=np.diag([2.6, 6, 6]), pbc=True)
    chain.calc = GFN2xTB(accuracy=0.01)
    stress, step, strained = chain.get_stress(), 1e-3, []
    for sign in (1, -1):
        moved = chain.copy()
        moved.set_cell(moved.cell * [[1 + sign * step], [1], [1]], scale_atoms=True)
        moved.calc = GFN2xTB(accuracy=0.01)
        strained.append(moved.get_potential_energy())
    derivative = (strained[0] - strained[1]) / (2 * step * chain.get_volume())
    assert stress[0] == pytest.approx(derivative, abs=1e-4)


def test_charge_and_spin_count_in_a_repeated_call():
    water = molecule("H2O")
    water.calc = GFN2xTB()
    neutral = water.get_potential_energy()
    water.info = {"charge": 1, "spin": 2}
    assert water.get_potential_energy() > neutral + 5
    water.info = {}
    assert water.get_potential_energy() == pytest.approx(neutral, abs=1e-5)


def test_a_multiplicity_that_the_electrons_forbid_is_refused():
    with pytest.raises(CalculatorError, match="OH2, charge 0, multiplicity 2"):
        energy(molecule("H2O"), spin=2)


def test_free_atoms_are_in_their_ground_states():
    energies = importlib.import_module("data.xtb.sets").free_atom_energies(["H", "C", "O"])
    assert energies["C"] == pytest.approx(energy(Atoms("C"), spin=3))
    assert energies["O"] == pytest.approx(energy(Atoms("O"), spin=3))
    atomization = 2 * energies["H"] + energies["O"] - energy(molecule("H2O"))
    assert 8 < atomization < 14  # eV; experiment 10.1


def test_a_label_is_that_of_a_fresh_calculation_and_says_what_it_is():
    hydroxyl = Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], info={"molecule": "[OH]"})
    labelled = xtb.label(hydroxyl)
    assert labelled.get_potential_energy() == pytest.approx(energy(hydroxyl, spin=2), abs=1e-6)
    info = labelled.info
    assert (info["charge"], info["spin"], info["num_electrons"]) == (0, 2, 9)
    assert (info["molecule"], info["composition"], info["num_atoms"]) == ("[OH]", "HO", 2)
    assert len(info["homo_lumo_gap"]) == 2 and info["label"].startswith("GFN2-xTB")
    assert "spin" not in hydroxyl.info

    box = molecule("H2O", cell=[4, 4, 4], pbc=True)
    assert xtb.label(box).get_stress().shape == (6,) and xtb.label(box).pbc.all()


def test_what_cannot_be_labelled_is_refused():
    with pytest.raises(LabelError, match="multiplicity 2"):
        xtb.label(molecule("H2O", info={"spin": 2}))
    with pytest.raises(LabelError, match="a force of"):
        xtb.label(Atoms("H2", [[0, 0, 0], [0, 0, 0.4]]), max_force=5.0)
