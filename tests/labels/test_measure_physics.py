"""Differences of energy, against cases known by hand."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.errors import DataError
from allscaip_lite.model import AllScAIP

physics = importlib.import_module("data.physics.measure")
Difference = physics.Difference


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
    with pytest.raises(DataError, match="data/physics/make.py"):
        physics.differences(model, Dataset(tmp_path / "a.aselmdb"))
    write_aselmdb(tmp_path / "b.aselmdb", [pair(1.0, 0.0)])
    with pytest.raises(DataError, match="one structure.*H.H"):
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
