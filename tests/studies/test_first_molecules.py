"""The study of first molecules: analytic answers, labels that are kept, the page."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.units import _amu, _c, _e

from docs.studies.first_molecules import run as study


class Pair(Calculator):
    """Two atoms with a spring, or with two charges."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, stiffness: float = 0.0, length: float = 1.1, charges: float = 0.0) -> None:
        super().__init__()
        self.stiffness, self.length, self.charges = stiffness, length, charges

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, list(properties), list(system_changes))
        energy, forces = 0.0, np.zeros((len(atoms), 3))
        if len(atoms) == 2:
            arm = atoms.positions[1] - atoms.positions[0]
            distance = np.linalg.norm(arm)
            energy = self.stiffness / 2 * (distance - self.length) ** 2 - self.charges / distance
            slope = self.stiffness * (distance - self.length) + self.charges / distance**2
            forces = slope * np.array([arm, -arm]) / distance
        self.results = {"energy": energy, "forces": forces}


def test_a_frequency_is_that_of_a_spring(monkeypatch):
    monkeypatch.setattr(study, "VIBRATING", ("N2",))
    (wave,) = study.frequencies(Pair(stiffness=140.0))["N2"]
    reduced = 14.007 / 2 * _amu
    wanted = np.sqrt(140.0 * _e * 1e20 / reduced) / (2 * np.pi * _c * 100)
    assert wave == pytest.approx(wanted, rel=1e-4)


def test_two_charges_attract_each_other_by_coulombs_law(monkeypatch):
    monkeypatch.setattr(study, "TAILS", {"salt": ("[Na+]", "[Cl-]")})
    energies = study.tails(Pair(charges=study.COULOMB))["salt"]
    np.testing.assert_allclose(energies, -study.COULOMB / np.array(study.SEPARATIONS))


def test_what_does_not_depend_on_direction_has_no_spread(monkeypatch):
    monkeypatch.setattr(study, "TURNED", ("N2",))
    assert max(study.rotation(Pair(stiffness=140.0), turns=5)["N2"]) < 1e-9


def test_a_dihedral_angle_is_what_is_asked_for():
    pytest.importorskip("rdkit")
    pytest.importorskip("tblite")
    turned = list(study._turned(*study.TORSIONS["hydrogen peroxide"]))
    hydrogens = [np.flatnonzero(atoms.numbers == 1) for atoms in turned]
    first, last = turned[0], turned[-1]
    near = first.get_distance(*hydrogens[0])
    far = last.get_distance(*hydrogens[-1])
    assert near < far  # cis, then trans
    for atoms in turned:
        assert atoms.get_distance(0, 1) == pytest.approx(first.get_distance(0, 1))


def test_labels_are_computed_once_and_survive_a_cut(tmp_path):
    asked = []

    def answer(atoms):
        asked.append(len(atoms))
        return 1.5, np.ones((len(atoms), 3))

    file = tmp_path / "labels.jsonl"
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], info={"charge": 0, "spin": 1})
    for _ in range(2):
        (result,) = study.answers_of([atoms], study.Remembered(answer, file))
        assert result[0] == 1.5
    assert len(asked) == 1
    triplet = atoms.copy()
    triplet.info["spin"] = 3
    study.answers_of([triplet], study.Remembered(answer, file))
    assert len(asked) == 2, "another multiplicity is another state"
    file.write_text(file.read_text()[:-5])  # the last line was cut short
    study.answers_of([atoms, triplet], study.Remembered(answer, file))
    assert len(asked) == 3


def test_a_wall_rises_all_the_way():
    wall = [100.0, 40, 20, 10, 5, 2, 0, 1, 2, 3, 4, 5, 6, 7]
    assert study._has_wall(wall)
    assert not study._has_wall([3.0, 4, 20, 10, 5, 2, 0, 1, 2, 3, 4, 5, 6, 7])
    assert study._has_wall([None, *wall[1:]])


def test_the_page_has_every_method_and_the_errors_of_models(tmp_path):
    pytest.importorskip("matplotlib")
    curve = [(stretch - 1) ** 2 * 10 for stretch in study.STRETCHES]
    truth = {
        "method": study.XTB,
        "machine": "here",
        "diatomics": dict.fromkeys(study.DIATOMICS, curve),
        "frequencies": {"CO2": [600.0, 600.0, 1400.0, 2600.0]},
        "torsions": {"ethane": [0.1, 0.05, 0.0, 0.05, 0.1, 0.05, 0.0]},
        "proton": [0.0, 0.1, 0.2, 0.3, 0.2, 0.1, 0.0],
        "tails": {"salt": [-3.0, None, -1.8, -1.2, -0.7, -0.3]},
    }
    model = truth | {
        "frequencies": {"CO2": [660.0, 600.0, 1400.0, 2600.0]},
        "rotation": {"CO2": [0.002, 0.0137]},
    }
    for name, result in ((study.XTB, truth), ("lite-xtb", model)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    study.write_page(page, tmp_path)
    text = page.read_text()
    assert "| | gfn2-xtb | lite-xtb |" in text
    assert "| mean and largest error | – | 2.5%, 10% |" in text
    assert "-3.00, –, -1.80" in text
    assert "| CO2 | 2.0, 13.7 |" in text
    assert (tmp_path / "diatomics.png").stat().st_size > 1000
