"""Differences of energy: what is made, and what is measured, against cases known by hand."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.cli import main
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.evaluation import physics
from allscaip_lite.evaluation.physics import Difference, Group
from allscaip_lite.labels import species
from allscaip_lite.model import AllScAIP


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = AllScAIPConfig(hidden_size=16, num_layers=1, num_heads=2, angular_channels=None)
    return AllScAIP(config).eval().requires_grad_(False)


def pair(distance, energy, group="H.H", **info):
    atoms = Atoms("OH", [[0, 0, 0], [distance, 0, 0]])
    atoms.info = {"charge": 0, "spin": 2, "data_id": "short_range", "group": group, **info}
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((2, 3)))
    return atoms


def test_differences_are_against_the_first_of_the_group(model, tmp_path):
    structures = [pair(0.9, -5.0), pair(1.5, 1.0, "other")]
    structures += [pair(1.1, -4.5), pair(1.7, 3.0, "other")]
    write_aselmdb(tmp_path / "a.aselmdb", structures)
    found = physics.differences(model, Dataset(tmp_path / "a.aselmdb"), max_atoms=5)
    assert [(one.group, one.truth) for one in found] == [("H.H", 0.5), ("other", 2.0)]
    for one, (first, second) in zip(found, [(0, 2), (1, 3)], strict=True):
        energies = []
        for index in (first, second):
            atoms = structures[index].copy()
            atoms.calc = AllScAIPCalculator(model)
            energies.append(atoms.get_potential_energy())
        assert one.predicted == pytest.approx(energies[1] - energies[0], abs=1e-5)
        assert np.isnan(one.xtb)


def test_data_without_groups_say_how_to_make_some(model, tmp_path):
    structure = pair(1.0, 0.0)
    del structure.info["group"]
    write_aselmdb(tmp_path / "a.aselmdb", [structure])
    with pytest.raises(physics.PhysicsError, match="data physics"):
        physics.differences(model, Dataset(tmp_path / "a.aselmdb"))
    write_aselmdb(tmp_path / "b.aselmdb", [pair(1.0, 0.0)])
    with pytest.raises(physics.PhysicsError, match="one structure.*H.H"):
        physics.differences(model, Dataset(tmp_path / "b.aselmdb"))


def test_summary_and_table():
    found = [
        Difference("spin_gap", "a", truth=1.0, predicted=1.1, xtb=0.8),
        Difference("spin_gap", "b", truth=-2.0, predicted=-2.3, xtb=-2.0),
        Difference("conformers", "a", truth=0.1, predicted=0.1, xtb=0.1),
    ]
    rows = physics.summary(found)
    assert rows["spin_gap"] == pytest.approx(
        {"groups": 2, "differences": 2, "size": 1500, "mae": 200, "xtb_mae": 100}
    )
    assert "xtb_mae" not in rows["conformers"]  # the truth is GFN2-xTB's own
    text = physics.table(rows)
    assert "| spin_gap | 2 | 2 | 1500 | 200 | 100 |" in text
    assert "| conformers | 1 | 1 | 100 | 0 | – |" in text


# --- Making ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    pytest.importorskip("tblite")
    pytest.importorskip("rdkit")
    from allscaip_lite.labels import xtb as teacher

    return teacher


def test_conformers_are_minima_the_lowest_first(teacher):
    made = Group("conformers", "CCSC").structures()
    energies = [atoms.get_potential_energy() for atoms in made]
    assert len(made) > 1 and energies == sorted(energies)
    assert all(np.abs(atoms.get_forces()).max() < 0.05 for atoms in made)
    assert len({atoms.get_chemical_formula() for atoms in made}) == 1


@pytest.mark.parametrize(
    ("molecule", "charges"),
    [("C#CS", [0, -1]), ("NCC", [0, 1]), ("NC=O", [0, 1]), ("CC(=O)O", [0, 1, -1])],
)
def test_a_proton_more_or_less(teacher, molecule, charges):
    made = Group("protonation", molecule).structures()
    assert [atoms.info["charge"] for atoms in made] == charges
    hydrogens = [list(atoms.symbols).count("H") for atoms in made]
    assert [count - hydrogens[0] for count in hydrogens] == charges
    neutral, *ions = (atoms.get_potential_energy() for atoms in made)
    for charge, energy in zip(charges[1:], ions, strict=True):
        # a proton is welcome or about so, and its loss costs much
        assert (energy - neutral < 1.0) if charge > 0 else (energy - neutral > 4.0)


def test_charge_and_spin_alone_change(teacher):
    ionised = Group("ionisation", "C=O").structures()
    assert [(a.info["charge"], a.info["spin"]) for a in ionised] == [(0, 1), (1, 2), (-1, 2)]
    spins = Group("spin_gap", "C=O").structures()
    assert [a.info["spin"] for a in spins] == [1, 3]
    for atoms in (*ionised[1:], spins[1]):
        np.testing.assert_array_equal(atoms.positions, ionised[0].positions)
    assert spins[1].get_potential_energy() > spins[0].get_potential_energy() + 1


def test_distance_goes_from_the_minimum_outwards(teacher):
    made = Group("distance", "C.F").structures()
    tasks = [atoms.info["data_id"] for atoms in made]
    near = [atoms for atoms, task in zip(made, tasks, strict=True) if task == "short_range"]
    far = [atoms for atoms, task in zip(made, tasks, strict=True) if task == "long_range"]
    assert len(near) + len(far) == len(made)
    np.testing.assert_array_equal(near[0].positions, far[0].positions)  # both: the minimum
    gaps = [[physics._gap(atoms, 5) for atoms in group[1:]] for group in (near, far)]
    assert max(gaps[0]) <= physics.CUTOFF < min(gaps[1])
    for group, gap in zip((near, far), gaps, strict=True):
        assert gap == sorted(gap)
        lowest, *others = (atoms.get_potential_energy() for atoms in group)
        assert all(0 < energy - lowest < 0.3 for energy in others)


def test_molecules_are_those_held_out_and_the_plan_is_the_same_again(teacher):
    before = physics._candidates(0)
    for names in before.values():
        assert len(names) > 20 and len(names) == len(set(names))
        for name in names:
            assert species.split_of(species._system("", name)) == "test"
    physics._candidates.cache_clear()
    assert physics._candidates(0) == before
    assert physics._candidates(1) != before


def test_a_molecule_that_cannot_be_made_gives_no_group(teacher):
    assert Group("conformers", "O").structures() == []
    assert Group("protonation", "CC").structures() == []


def test_commands(teacher, tmp_path, capsys, monkeypatch):
    candidates = {"molecule": ["O=CO", "CCSC"], "complex": ["C.F"]}
    monkeypatch.setattr(physics, "_candidates", lambda seed: candidates)
    assert main(["data", "physics", "--out", str(tmp_path), "--groups", "1"]) == 0
    first = capsys.readouterr().out
    physics._structures.cache_clear()
    assert main(["data", "physics", "--out", str(tmp_path), "--groups", "1"]) == 0
    assert capsys.readouterr().out == first
    assert main(["evaluate", "lite", str(tmp_path / "test.aselmdb"), "--physics"]) == 0
    text = capsys.readouterr().out
    for task in (*list(physics._MAKERS)[:-1], "short_range", "long_range"):
        assert f"| {task} | 1 |" in text
    assert "GFN2-xTB" not in text  # its own error against itself is none
    some = ["--groups", "1", "--tasks", "spin_gap", "conformers"]
    assert main(["data", "physics", "--out", str(tmp_path / "some"), *some]) == 0
    found = [atoms.info["data_id"] for atoms in Dataset(tmp_path / "some" / "test.aselmdb")]
    assert found == ["spin_gap"] * 2 + ["conformers"] * (len(found) - 2)


def test_nothing_to_collect_without_dft(tmp_path, capsys):
    assert main(["data", "physics", "--out", str(tmp_path), "--collect"]) == 2
    assert "--collect and --known go with --dft" in capsys.readouterr().err


def test_dft_labels_the_same_structures_and_gfn2_xtb_stands_beside(
    teacher, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("pyscf")
    pytest.importorskip("numba")
    candidates = {"molecule": ["[H][H]"], "complex": []}
    monkeypatch.setattr(physics, "_candidates", lambda seed: candidates)
    assert main(["data", "physics", "--out", str(tmp_path), "--groups", "1", "--dft"]) == 0
    data = Dataset(tmp_path / "test.aselmdb")
    partial = ["data", "physics", "--out", str(tmp_path), "--groups", "2", "--dft", "--collect"]
    assert main(partial) == 0  # what is there of more groups
    assert "5 structures" in capsys.readouterr().out
    tasks = [atoms.info["data_id"] for atoms in data]
    assert sorted(tasks) == ["ionisation"] * 3 + ["spin_gap"] * 2
    assert all("wb97m_v" in atoms.info["label"] for atoms in data)
    assert main(["evaluate", "lite", str(tmp_path / "test.aselmdb"), "--physics"]) == 0
    assert "GFN2-xTB's MAE" in capsys.readouterr().out
    singlet, triplet = (atoms for atoms in data if atoms.info["data_id"] == "spin_gap")
    gap = triplet.get_potential_energy() - singlet.get_potential_energy()
    assert 9 < gap < 11.5  # H2's lowest triplet at the bond length of the singlet, about 10.6 eV
    positive = data[tasks.index("ionisation") + 1]
    neutral = data[tasks.index("ionisation")]
    ionisation = positive.get_potential_energy() - neutral.get_potential_energy()
    assert ionisation == pytest.approx(16.4, abs=0.4)  # measured, vertical: about 16.4 eV


def test_a_bare_proton_costs_energy_in_gfn2_xtb(model, tmp_path):
    """H2 and H3+ by DFT: GFN2-xTB's own proton is taken off its proton affinity."""
    pytest.importorskip("tblite")
    from allscaip_lite.labels.xtb import GFN2xTB

    proton = Atoms("H", info={"charge": 1, "spin": 1})
    proton.calc = GFN2xTB()
    assert proton.get_potential_energy() == pytest.approx(physics.GFN2_PROTON, abs=1e-3)
    side = 0.87
    triangle = [[0, 0, 0], [side, 0, 0], [side / 2, side * 0.75**0.5, 0]]
    structures = []
    for positions, charge, energy in (([[0, 0, 0], [0.74, 0, 0]], 0, -31.9), (triangle, 1, -36.4)):
        atoms = Atoms("H" * len(positions), positions)
        atoms.info = {"charge": charge, "spin": 1, "data_id": "protonation", "group": "[H][H]"}
        atoms.calc = GFN2xTB()
        atoms.info["xtb_energy"] = atoms.get_potential_energy()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=0 * atoms.positions)
        structures.append(atoms)
    write_aselmdb(tmp_path / "a.aselmdb", structures)
    data = Dataset(tmp_path / "a.aselmdb")
    (plain,), (shifted,) = (
        physics.differences(model, data, proton=value) for value in (0.0, physics.GFN2_PROTON)
    )
    assert plain.truth == pytest.approx(-4.5) and abs(plain.xtb + 4.5) < 2
    assert shifted.predicted == pytest.approx(plain.predicted - physics.GFN2_PROTON)
