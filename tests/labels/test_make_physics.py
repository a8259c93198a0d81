"""The set `data/physics`: its groups differ in the one thing that they are to differ in."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tblite")
Chem = pytest.importorskip("rdkit.Chem")

from allscaip_lite.data.aselmdb import Dataset

make = importlib.import_module("data.physics.make")
measure = importlib.import_module("data.physics.measure")
splits = importlib.import_module("data.xtb.splits")
Group, main = make.Group, make.main
FOLDER = Path(__file__).resolve().parents[2] / "data" / "physics"


def test_conformers_are_minima_the_lowest_first():
    made = Group("conformers", "CCSC").structures()
    energies = [atoms.get_potential_energy() for atoms in made]
    assert len(made) > 1 and energies == sorted(energies)
    assert all(np.abs(atoms.get_forces()).max() < 0.05 for atoms in made)
    assert len({atoms.get_chemical_formula() for atoms in made}) == 1


@pytest.mark.parametrize(
    ("molecule", "charges"),
    [("C#CS", [0, -1]), ("NCC", [0, 1]), ("NC=O", [0, 1]), ("CC(=O)O", [0, 1, -1])],
)
def test_a_proton_more_or_less(molecule, charges):
    made = Group("protonation", molecule).structures()
    assert [atoms.info["charge"] for atoms in made] == charges
    hydrogens = [list(atoms.symbols).count("H") for atoms in made]
    assert [count - hydrogens[0] for count in hydrogens] == charges
    neutral, *ions = (atoms.get_potential_energy() for atoms in made)
    for charge, energy in zip(charges[1:], ions, strict=True):
        # a proton is welcome or about so, and its loss costs much
        assert (energy - neutral < 1.0) if charge > 0 else (energy - neutral > 4.0)


def test_charge_and_spin_alone_change():
    ionised = Group("ionisation", "C=O").structures()
    assert [(a.info["charge"], a.info["spin"]) for a in ionised] == [(0, 1), (1, 2), (-1, 2)]
    spins = Group("spin_gap", "C=O").structures()
    assert [a.info["spin"] for a in spins] == [1, 3]
    for atoms in (*ionised[1:], spins[1]):
        np.testing.assert_array_equal(atoms.positions, ionised[0].positions)
    assert spins[1].get_potential_energy() > spins[0].get_potential_energy() + 1


def test_distance_goes_from_the_minimum_outwards():
    made = Group("distance", "C.F").structures()
    tasks = [atoms.info["data_id"] for atoms in made]
    near = [atoms for atoms, task in zip(made, tasks, strict=True) if task == "short_range"]
    far = [atoms for atoms, task in zip(made, tasks, strict=True) if task == "long_range"]
    assert len(near) + len(far) == len(made)
    np.testing.assert_array_equal(near[0].positions, far[0].positions)  # both: the minimum
    gaps = [[make._gap(atoms, 5) for atoms in group[1:]] for group in (near, far)]
    assert max(gaps[0]) <= make.CUTOFF < min(gaps[1])
    for group, gap in zip((near, far), gaps, strict=True):
        assert gap == sorted(gap)
        lowest, *others = (atoms.get_potential_energy() for atoms in group)
        assert all(0 < energy - lowest < 0.3 for energy in others)


def test_molecules_are_the_small_ones_that_data_xtb_tests_on():
    found = {"molecule": set(), "complex": set()}
    for system in importlib.import_module("data.xtb.systems").main_systems():
        if splits.split_of(system) != "test" or system.multiplicity != 1:
            continue
        heavy = [Chem.MolFromSmiles(part).GetNumHeavyAtoms() for part in system.parts]
        if splits.atom_count(system) > 12 or sum(heavy) > 6:
            continue
        if len(system.parts) == 2:
            found["complex"].add(".".join(sorted(system.parts)))
        elif len(system.parts) == 1 and system.charge == 0 and heavy[0] > 2:
            found["molecule"].add(system.molecule)
    listed = (FOLDER / "molecules.txt").read_text().split()
    assert listed == [*sorted(found["molecule"]), *sorted(found["complex"])]
    first, other = make._candidates(0), make._candidates(1)
    assert {kind: set(names) for kind, names in first.items()} == found
    assert first != other


def test_the_set_in_the_repository_is_of_these_molecules():
    names = (FOLDER / "molecules.txt").read_text().split()
    for file in (FOLDER / "test.aselmdb", FOLDER / "dft" / "test.aselmdb"):
        assert {atoms.info["group"] for atoms in Dataset(file)} <= set(names)
    pairs = [a for a in Dataset(FOLDER / "test.aselmdb") if a.info["data_id"] == "spin_gap"]
    made = Group("spin_gap", pairs[0].info["group"]).structures()
    for atoms, again in zip(pairs[:2], made, strict=True):
        energy = again.get_potential_energy()
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-3)


def test_a_molecule_that_cannot_be_made_gives_no_group():
    assert Group("conformers", "O").structures() == []
    assert Group("protonation", "CC").structures() == []


def test_the_command_makes_the_same_groups_again(tmp_path, capsys, monkeypatch):
    candidates = {"molecule": ["O=CO", "CCSC"], "complex": ["C.F"]}
    monkeypatch.setattr(make, "_candidates", lambda seed: candidates)
    assert main(["--out", str(tmp_path), "--groups", "1"]) == 0
    first = capsys.readouterr().out
    make._structures.cache_clear()
    assert main(["--out", str(tmp_path), "--groups", "1"]) == 0
    assert capsys.readouterr().out == first
    assert measure.main(["lite", str(tmp_path / "test.aselmdb")]) == 0
    text = capsys.readouterr().out
    for task in (*list(make._MAKERS)[:-1], "short_range", "long_range"):
        assert f"| {task} | 1 |" in text
    assert "GFN2-xTB" not in text  # its own error against itself is none
    some = ["--groups", "1", "--tasks", "spin_gap", "conformers"]
    assert main(["--out", str(tmp_path / "some"), *some]) == 0
    found = [atoms.info["data_id"] for atoms in Dataset(tmp_path / "some" / "test.aselmdb")]
    assert found == ["spin_gap"] * 2 + ["conformers"] * (len(found) - 2)


def test_nothing_to_collect_without_dft(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--collect"]) == 2
    assert "--collect and --known go with --dft" in capsys.readouterr().err


def test_dft_labels_the_same_structures_and_keeps_gfn2_xtb_s_energies(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("pyscf")
    pytest.importorskip("numba")
    candidates = {"molecule": ["[H][H]"], "complex": []}
    monkeypatch.setattr(make, "_candidates", lambda seed: candidates)
    assert main(["--out", str(tmp_path), "--groups", "1", "--dft"]) == 0
    data = Dataset(tmp_path / "test.aselmdb")
    assert (
        main(["--out", str(tmp_path), "--groups", "2", "--dft", "--collect"]) == 0
    )  # some of more groups
    assert "test: 5 structures" in capsys.readouterr().out
    tasks = [atoms.info["data_id"] for atoms in data]
    assert sorted(tasks) == ["ionisation"] * 3 + ["spin_gap"] * 2
    assert all("wb97m_v" in atoms.info["label"] for atoms in data)
    assert measure.main(["lite", str(tmp_path / "test.aselmdb")]) == 0
    assert "GFN2-xTB's MAE" in capsys.readouterr().out
    singlet, triplet = (atoms for atoms in data if atoms.info["data_id"] == "spin_gap")
    gap = triplet.get_potential_energy() - singlet.get_potential_energy()
    assert 9 < gap < 11.5  # H2's lowest triplet at the bond length of the singlet, about 10.6 eV
    positive = data[tasks.index("ionisation") + 1]
    neutral = data[tasks.index("ionisation")]
    ionisation = positive.get_potential_energy() - neutral.get_potential_energy()
    assert ionisation == pytest.approx(16.4, abs=0.4)  # measured, vertical: about 16.4 eV
