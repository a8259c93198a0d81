"""Long-range data: the formula is exact, splits are apart, states are the intended ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.fd import calculate_numerical_forces

from allscaip_lite import AllScAIP
from allscaip_lite.ablation import MODELS
from allscaip_lite.data.aselmdb import Dataset, checksum
from allscaip_lite.labels import long_range
from allscaip_lite.labels.long_range import (
    CHARGES,
    COULOMB,
    NEAR,
    PAIRS,
    TRAINED_LENGTH,
    LongRangeError,
    PointCharges,
    StateError,
    chain,
    chains,
    ion_pair,
    ions,
    pairs,
    point_charges,
    write_ions,
)
from allscaip_lite.labels.xtb import GFN2xTB


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
    with pytest.raises(LongRangeError, match="Xe"):
        point_charges(["Na", "Xe"], np.zeros((2, 3)))
    box = Atoms("Na", cell=[5, 5, 5], pbc=True, calculator=PointCharges())
    with pytest.raises(LongRangeError, match="vacuum"):
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


def test_the_same_command_makes_the_same_ions_and_no_structure_twice(tmp_path):
    sums = []
    for name in ("a", "b"):
        counts = write_ions(tmp_path / name, 60, seed=1)
        sums.append([checksum(Dataset(tmp_path / name / f"{s}.aselmdb")) for s in counts])
    assert counts == {"train": 48, "val": 6, "test": 6, "curves": 399}
    assert sums[0] == sums[1]
    files = {split: Dataset(tmp_path / "a" / f"{split}.aselmdb") for split in counts}
    found = [files[split][i] for split, count in counts.items() for i in range(count)]
    seen = [str(atoms.symbols).encode() + atoms.positions.tobytes() for atoms in found]
    assert len(set(seen)) == len(seen)


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


def test_only_erope_tells_two_distances_beyond_the_cutoff_apart(seeing):
    for name, model in seeing.items():
        near, far = energies(model, "Na", "Cl", 6.0, 12.0)
        assert (abs(near - far) > 1e-6) == (name == "rotary"), name


def test_erope_is_blind_between_atoms_that_are_alike(seeing):
    # A softmax averages: of equal values, any weights give the same average.
    near, far = energies(seeing["rotary"], "Na", "Na", 6.0, 12.0)
    assert near == pytest.approx(far, abs=1e-10)
    inside, outside = energies(seeing["rotary"], "Na", "Na", 3.0, 6.0)
    assert abs(inside - outside) > 1e-6


# --- GFN2-xTB -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_pairs() -> dict[str, list[Atoms]]:
    pytest.importorskip("tblite")
    chosen = [
        ("Na+", "K+"), ("NH4+", "Cl-"), ("Na+", "Cl-"), ("Na+", "Li+"), ("Cl-", "HF"),
        ("Cl-", "NH3"), ("HF", "HCN"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_range, "PAIRS", [pair for pair in PAIRS if pair[:2] in chosen])
        return pairs(len(chosen) * 20, seed=0)


def test_held_out_pairs_and_distances_are_in_test_alone(few_pairs):
    names = {
        split: {atoms.info["source"].split("/")[0] for atoms in found}
        for split, found in few_pairs.items()
    }
    unseen = {"Cl-...NH3", "HF...HCN"}
    near = {"Na+...Li+", "Cl-...HF"}
    assert not unseen & (names["train"] | names["val"])
    assert unseen <= names["test"]
    for split in ("train", "val"):
        far = [a for a in few_pairs[split] if a.info["source"].split("/")[0] in near]
        assert all(a.info["distance"] <= NEAR for a in far)
    kinds = {a.info["data_id"] for a in few_pairs["test"]}
    assert kinds == {"pairs_seen", "pairs_unseen_pair", "pairs_unseen_distance"}


def test_like_charges_repel_as_coulomb_says(few_pairs):
    # GFN2-xTB's charges repel as k / sqrt(r² + a²), so 1/E² is linear in r² with slope 1/k².
    curve = [a for a in few_pairs["curves"] if a.info["source"] == "Na+...K+"]
    distance = np.array([a.info["distance"] for a in curve])
    apart = 0.0
    for symbol in ("Na", "K"):
        ion = Atoms(symbol, info={"charge": 1, "spin": 1}, calculator=GFN2xTB(accuracy=0.1))
        apart += ion.get_potential_energy()
    energy = np.array([a.get_potential_energy() for a in curve]) - apart
    far = distance >= 8
    slope = np.polyfit(distance[far] ** 2, energy[far] ** -2, 1)[0]
    assert slope**-0.5 == pytest.approx(COULOMB, rel=0.02)


def test_opposite_ions_are_kept_only_where_they_are_ions(few_pairs):
    kept = {a.info["source"] for a in few_pairs["curves"]}
    assert "Na+...Cl-" not in kept  # at GFN2-xTB these share their charge at every distance
    ionic = [a for a in few_pairs["curves"] if a.info["source"] == "NH4+...Cl-"]
    assert ionic and max(a.info["distance"] for a in ionic) < 12


def test_a_chain_s_two_states_share_one_geometry():
    pytest.importorskip("tblite")
    pytest.importorskip("rdkit")
    charged, neutral = (chain(start, 4, "OH", "curve", None) for start in ("NH3+", "NH2"))
    assert len(charged) == len(neutral) + 1
    probe, other = charged.info["probe"], neutral.info["probe"]
    assert sorted(charged.numbers[probe]) == sorted(neutral.numbers[other]) == [1, 8]
    assert np.allclose(charged.positions[probe], neutral.positions[other])
    assert 5 < charged.info["distance"] < 9
    felt = charged.get_forces()[probe].sum(0) - neutral.get_forces()[other].sum(0)
    assert 0.01 < np.linalg.norm(felt) < 1


def test_long_chains_and_the_unseen_end_are_in_test_alone():
    pytest.importorskip("tblite")
    pytest.importorskip("rdkit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_range, "LENGTHS", (3, TRAINED_LENGTH, TRAINED_LENGTH + 1))
        patch.setattr(long_range, "CHARGED", {"S-": ("S", -1), "SH": ("S", 0)})
        found = chains(4 * 9 * 3, seed=0)
    for atoms in found["train"] + found["val"]:
        assert atoms.info["data_id"] == "chain_seen"
        assert (atoms.numbers == 6).sum() <= TRAINED_LENGTH + 1
        assert not (9 in atoms.numbers and atoms.info["charge"])
    assert {"chain_unseen_length", "chain_unseen_end"} <= {a.info["data_id"] for a in found["test"]}
    assert "S-...S-" in {a.info["source"] for a in found["curves"]}
    assert "S-...NH3+" not in {a.info["source"] for a in found["curves"]}


def test_two_charges_of_a_chain_push_each_other_apart():
    pytest.importorskip("tblite")
    pytest.importorskip("rdkit")

    def energy(groups, start, end):
        return chain(start, groups, end, "curve", None).get_potential_energy()

    pushes = []
    for groups in (4, 10):  # what both ends do together and none alone
        both = energy(groups, "NH3+", "NH3+") + energy(groups, "NH2", "OH")
        pushes.append(both - energy(groups, "NH3+", "OH") - energy(groups, "NH2", "NH3+"))
    distances = [chain("NH3+", n, "NH3+", "curve", None).info["distance"] for n in (4, 10)]
    assert chain("NH3+", 4, "NH3+", "curve", None).info["charge"] == 2
    for push, distance in zip(pushes, distances, strict=True):
        assert 0.4 < push * distance / COULOMB < 1.2  # Coulomb's law, screened by the chain


def test_another_state_is_an_error_that_says_so():
    pytest.importorskip("tblite")
    from allscaip_lite.labels.long_range import Fragments

    pair = Atoms("NaCl", [[0, 0, 0], [0, 0, 3.5]], info={"charge": 0, "spin": 1})
    with pytest.raises(StateError, match="not \\+1"):
        Fragments(1, 1).calculate(pair)
