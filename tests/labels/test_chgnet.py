"""CHGNet's labels are derivatives of its energy, and what it cannot label is refused."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100, molecule
from ase.stress import voigt_6_to_full_3x3_stress

from allscaip_lite.cli import main
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.labels import LabelError
from allscaip_lite.labels.chgnet import REACH, label, label_all, results_of


@pytest.fixture
def crystal() -> Atoms:
    """Two atoms off their sites in a sheared cell."""
    pytest.importorskip("chgnet")
    atoms = bulk("NaCl", "rocksalt", a=5.5)
    shear = [[1, 0.03, 0], [0, 1, 0.05], [0, 0, 0.97]]
    atoms.set_cell(atoms.cell.array @ shear, scale_atoms=True)
    atoms.positions[0] += (0.2, -0.1, 0.1)
    return atoms


def energy(atoms: Atoms) -> float:
    return results_of([atoms])[0]["energy"]


def test_forces_and_stress_are_the_energy_s_derivatives(crystal):
    results, step = results_of([crystal])[0], 1e-3
    stress = voigt_6_to_full_3x3_stress(results["stress"])
    for i, j in ((0, 0), (2, 2), (0, 1), (1, 2)):
        strained = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            moved = crystal.copy()
            moved.set_cell(crystal.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            strained.append(energy(moved))
        slope = (strained[0] - strained[1]) / (2 * step) / crystal.get_volume()
        assert stress[i, j] == pytest.approx(slope, abs=1e-4), (i, j)
    shifted = []
    for sign in (1, -1):
        moved = crystal.copy()
        moved.positions[0, 0] += sign * step
        shifted.append(energy(moved))
    slope = (shifted[0] - shifted[1]) / (2 * step)
    assert results["forces"][0, 0] == pytest.approx(-slope, abs=2e-3)
    assert abs(results["forces"][0, 0]) > 0.1


def test_structures_are_labelled_together_as_alone(crystal):
    others = [crystal, bulk("Cu"), crystal.repeat((2, 1, 1))]
    one, copper, double = label_all(others)
    assert double.get_potential_energy() == pytest.approx(2 * one.get_potential_energy(), abs=1e-4)
    assert copper.get_potential_energy() == pytest.approx(energy(bulk("Cu")), abs=1e-5)
    assert (copper.info["charge"], copper.info["spin"]) == (0, 2)  # 29 electrons
    assert copper.info["label"].startswith("CHGNet 0.3.0")
    assert (one.info["spin"], one.info["composition"]) == (1, "ClNa")


def test_a_slab_has_the_same_labels_whichever_way_it_is_periodic(crystal):
    slab = fcc100("Al", (1, 1, 3), vacuum=5.0)
    layered = label(slab)
    slab.pbc = True
    assert layered.pbc.tolist() == [True, True, False]
    assert layered.get_potential_energy() == pytest.approx(energy(slab), abs=1e-5)
    np.testing.assert_allclose(layered.get_stress(), label(slab).get_stress(), atol=1e-6)


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        (molecule("H2O"), "takes crystals"),
        (fcc100("Al", (1, 1, 3), vacuum=REACH / 2 - 0.1), "5.8 Å of vacuum"),
        (Atoms("Cu", cell=[3, 3, 3], pbc=True, info={"charge": 1}), "neutral"),
    ],
)
def test_what_chgnet_does_not_know_is_refused(atoms, words):
    pytest.importorskip("chgnet")
    with pytest.raises(LabelError, match=words):
        label(atoms)


def test_the_command_labels_crystals(crystal, tmp_path):
    ase.io.write(tmp_path / "salt.extxyz", crystal)
    names = [str(tmp_path / "salt.extxyz"), "--out", str(tmp_path / "salt.aselmdb")]
    assert main(["label", *names, "--method", "chgnet"]) == 0
    [labelled] = Dataset(tmp_path / "salt.aselmdb")
    assert labelled.get_potential_energy() == pytest.approx(energy(crystal), abs=1e-5)
    assert len(labelled.get_stress()) == 6
