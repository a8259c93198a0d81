"""Point charges: the formula is exact, and only ERoPE sees the distance of two of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.fd import calculate_numerical_forces

from allscaip_lite import AllScAIP
from allscaip_lite.labels import LabelError
from data.long_range.ions import (
    CHARGES,
    COULOMB,
    PointCharges,
    ion_pair,
    ions,
    point_charges,
)
from docs.studies.ablation.run import MODELS


def cloud(seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    symbols = rng.choice(list(CHARGES), 9)
    return Atoms(symbols, rng.uniform(0, 6, (9, 3)), calculator=PointCharges())


# --- point charges ------------------------------------------------------------------------------


def test_forces_are_the_energy_s_finite_differences():
    atoms = cloud()
    numerical = calculate_numerical_forces(atoms, eps=1e-4)
    assert np.abs(atoms.get_forces() - numerical).max() < 1e-6
    assert np.abs(atoms.get_forces()).max() > 0.5


def test_point_charges_push_and_turn_nothing_as_a_whole():
    atoms = cloud(1)
    forces = atoms.get_forces()
    assert np.abs(forces.sum(0)).max() < 1e-12
    assert np.abs(np.cross(atoms.positions, forces).sum(0)).max() < 1e-11


def test_two_ions_far_apart_obey_coulomb_s_law():
    energy, forces = point_charges(["Na", "Cl"], np.array([[0, 0, 0], [0, 0, 100.0]]))
    assert energy == pytest.approx(-COULOMB / 100, rel=1e-4)
    assert forces[1, 2] == pytest.approx(-COULOMB / 100**2, rel=2e-4)
    assert pytest.approx(14.399645, abs=1e-5) == COULOMB


def test_the_core_is_soft():
    energy, forces = point_charges(["Na", "Na"], np.zeros((2, 3)))
    assert energy == pytest.approx(COULOMB)
    assert np.abs(forces).max() == 0


def test_point_charges_know_their_elements_and_no_boxes():
    with pytest.raises(LabelError, match="Xe"):
        point_charges(["Na", "Xe"], np.zeros((2, 3)))
    box = Atoms("Na", cell=[5, 5, 5], pbc=True, calculator=PointCharges())
    with pytest.raises(LabelError, match="vacuum"):
        box.get_potential_energy()


@pytest.mark.parametrize(
    "first, second, power", [("Na", "K", 1), ("Na", "Cl", 1), ("HF", "Na", 2), ("HF", "HF", 3)]
)
def test_curves_have_the_tails_of_their_multipoles(first, second, power):
    far, farther = (ion_pair(first, second, distance) for distance in (50.0, 100.0))
    inside = sum(
        point_charges(["H", "F"], np.array([[0, 0, 0], [0.95, 0, 0]]))[0]
        for part in (first, second)
        if part == "HF"
    )
    ratio = (far.get_potential_energy() - inside) / (farther.get_potential_energy() - inside)
    assert np.log2(ratio) == pytest.approx(power, abs=0.01)


def test_ions_are_two_groups_across_the_gap_they_state():
    found = list(ions(40, seed=3))
    for atoms in found:
        probe = atoms.info["probe"]
        first = [i for i in range(len(atoms)) if i not in probe]
        between = np.linalg.norm(atoms.positions[first][:, None] - atoms.positions[probe], axis=2)
        assert between.min() == pytest.approx(atoms.info["gap"])
        assert 2.0 <= atoms.info["gap"] <= 20.05
        assert atoms.info["charge"] == round(sum(CHARGES[s] for s in atoms.symbols))
        energy, forces = point_charges(list(atoms.symbols), atoms.positions)
        assert atoms.get_potential_energy() == energy
        assert np.array_equal(atoms.get_forces(), forces)
    wide = [a.info["gap"] for a in found if a.info["gap"] > 8]  # twice the cutoff of `small`
    assert len(wide) > 15
    assert {a.info["data_id"] for a in found} == {"ions_pair", "ions_dipole", "ions_cluster"}


# --- what a model can see of them ---------------------------------------------------------------


def energies(model: AllScAIP, first: str, second: str, *distances: float) -> list[float]:
    found = model.predict([ion_pair(first, second, distance) for distance in distances])
    return [result.energy for result in found]


@pytest.fixture
def seeing() -> dict[str, AllScAIP]:
    """A local model, one with node attention, and one with ERoPE; random weights, float64."""
    models = {}
    for name, (node, rotary) in {
        "local": (False, False),
        "node": (True, False),
        "rotary": (True, True),
    }.items():
        torch.manual_seed(0)
        config = MODELS["small"].replace(node_attention=node, rotary=rotary)
        models[name] = AllScAIP(config).double().eval()
    return models


def test_only_erope_distinguishes_two_distances_beyond_the_cutoff(seeing):
    for name, model in seeing.items():
        near, far = energies(model, "Na", "Cl", 6.0, 12.0)
        assert (abs(near - far) > 1e-6) == (name == "rotary"), name


def test_erope_is_blind_between_atoms_that_are_alike(seeing):
    # A softmax averages: of equal values, any weights give the same average.
    near, far = energies(seeing["rotary"], "Na", "Na", 6.0, 12.0)
    assert near == pytest.approx(far, abs=1e-10)
    inside, outside = energies(seeing["rotary"], "Na", "Na", 3.0, 6.0)
    assert abs(inside - outside) > 1e-6
