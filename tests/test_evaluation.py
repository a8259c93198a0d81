"""Errors come out right, by domain and in a saved card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from allscaip_lite import AllScAIP, AllScAIPConfig, cli, save_model
from allscaip_lite.checkpoint import read_card
from allscaip_lite.data import Dataset, write_aselmdb
from allscaip_lite.evaluation import by_domain, evaluate, residuals, table

SMALL = AllScAIPConfig(
    hidden_size=16, num_layers=1, num_heads=2, angular_channels=(4, 4), num_distance_basis=16
)


@pytest.fixture
def model() -> AllScAIP:
    torch.manual_seed(0)
    return AllScAIP(SMALL).eval()


@pytest.fixture
def labelled(model: AllScAIP, tmp_path: Path) -> Path:
    """Water and ammonia labelled by the model itself, then moved off by known amounts."""
    structures = []
    for name, shift, push in (("H2O", 0.3, 0.01), ("NH3", -0.4, 0.03), ("H2O", 0.6, 0.0)):
        atoms = molecule(name)
        atoms.info.update(charge=0, spin=1, data_id=name.lower())
        (result,) = model.predict(atoms)
        forces = result.forces - push
        atoms.calc = SinglePointCalculator(atoms, energy=result.energy - shift, forces=forces)
        structures.append(atoms)
    write_aselmdb(tmp_path / "set.aselmdb", structures)
    return tmp_path / "set.aselmdb"


def test_errors_overall(model: AllScAIP, labelled: Path) -> None:
    errors = evaluate(model, Dataset(labelled))
    per_atom = np.array([0.3 / 3, -0.4 / 4, 0.6 / 3]) * 1e3
    pushes = np.repeat([10.0, 30.0, 0.0], [9, 12, 9])
    assert errors["structures"] == 3
    assert errors["energy_mae"] == pytest.approx(np.abs(per_atom).mean(), abs=0.02)
    assert errors["energy_rmse"] == pytest.approx(np.sqrt((per_atom**2).mean()), abs=0.02)
    assert errors["force_mae"] == pytest.approx(pushes.mean(), abs=0.02)
    assert errors["force_rmse"] == pytest.approx(np.sqrt((pushes**2).mean()), abs=0.02)


def test_errors_by_domain(model: AllScAIP, labelled: Path) -> None:
    data = Dataset(labelled)
    rows = by_domain(data, residuals(model, data))
    assert list(rows) == ["h2o", "nh3", "all"]
    assert rows["h2o"]["structures"] == 2
    assert rows["nh3"]["energy_mae"] == pytest.approx(100, abs=0.02)
    assert rows["nh3"]["force_mae"] == pytest.approx(30, abs=0.02)
    assert "| nh3 | 1 | 100.0 | 100.0 | 30.0 | 30.0 |" in table(rows)


def test_errors_of_the_stress(model: AllScAIP, tmp_path: Path) -> None:
    """In bar, of the structures that have one: a wrong pressure of 300 bar, and a wrong shear."""
    crystal = bulk("NaCl", "rocksalt", a=5.5)
    crystal.rattle(0.05, seed=0)
    lone = molecule("H2O")
    structures = []
    for atoms, shift in ((crystal, 300.0 * np.array([1, 1, 1, 0.5, 0, 0])), (lone, None)):
        atoms.info.update(charge=0, spin=1, data_id="salt" if atoms is crystal else "water")
        (result,) = model.predict(atoms)
        labels = {"energy": result.energy, "forces": result.forces}
        if shift is not None:
            labels["stress"] = full_3x3_to_voigt_6_stress(result.stress) - shift * units.bar
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    write_aselmdb(tmp_path / "set.aselmdb", structures)
    data = Dataset(tmp_path / "set.aselmdb")
    rows = by_domain(data, residuals(model, data))
    assert rows["salt"]["pressure_mae"] == pytest.approx(300, abs=1)
    assert rows["all"]["stress_mae"] == pytest.approx((3 * 300 + 2 * 150) / 9, abs=1)
    assert "stress_mae" not in rows["water"]
    assert "| water | 1 | 0.0 | 0.0 | 0.0 | 0.0 | – | – |" in table(rows)


def test_the_command_puts_the_errors_into_the_card(
    model: AllScAIP, labelled: Path, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "model.safetensors", {"about": "a test"})
    command = ["evaluate", str(tmp_path / "model.safetensors"), str(labelled), "--device", "cpu"]
    assert cli.main([*command, "--save", str(tmp_path / "out.safetensors"), "--note", "how"]) == 0
    card = read_card(tmp_path / "out.safetensors")
    assert card["about"] == "a test" and card["trained"] == "how"
    assert card["errors"]["nh3"]["energy_mae"] == pytest.approx(100, abs=0.02)
