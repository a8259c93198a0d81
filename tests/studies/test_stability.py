"""Stability: molecules that hold and that do not, the drift of the energy, and rotation."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite import AllScAIP, AllScAIPConfig, save_model
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.errors import InputError
from allscaip_lite.files import locked
from allscaip_lite.spcfw import SPCFw
from docs.studies.stability.run import (
    Trial,
    changed_bond,
    choose,
    main,
    rotation_errors,
    run_trial,
    table,
    try_molecule,
)

SHORT = Trial(
    molecules=2, smallest=3, largest=9, warming=50.0, duration=200.0, timestep=0.5, rotations=4
)
NAMES = ("H2O", "CH4", "CH3OH", "C2H6", "CH3CH2OH")


@pytest.fixture(scope="module")
def model() -> AllScAIP:
    torch.manual_seed(0)
    config = AllScAIPConfig(hidden_size=16, num_layers=1, num_heads=2, angular_channels=(4, 2, 2))
    model = AllScAIP(config)
    model.energy_scale.fill_(1e-3)  # so weak that atoms hardly notice
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five molecules, and three structures that are none."""
    structures = [molecule(name) for name in NAMES]
    apart = molecule("H2O") + Atoms("Ar", [[8.0, 0, 0]])
    radical = molecule("CH3")
    complex_ = molecule("CH3Cl")
    for atoms in [*structures, apart, radical, complex_]:
        atoms.info |= {"charge": 0, "spin": 2 if atoms is radical else 1}
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    complex_.info["molecule"] = "[CH3+].[Cl-]"
    file = tmp_path_factory.mktemp("data") / "test.aselmdb"
    write_aselmdb(file, [*structures, apart, radical, complex_])
    return file


class Torn(Calculator):
    """Atoms that push each other apart with a force of 5 eV/Å, and no end."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=None, system_changes=()):
        super().calculate(atoms, properties, system_changes)
        away = self.atoms.positions - self.atoms.positions.mean(axis=0)
        lengths = np.linalg.norm(away, axis=1, keepdims=True)
        self.results = {"energy": -5.0 * lengths.sum(), "forces": 5.0 * away / lengths}


# --- molecules ----------------------------------------------------------------------------------


def test_single_closed_shell_molecules_are_chosen_by_size(data):
    chosen = choose(Dataset(data), dataclasses.replace(SHORT, molecules=5))
    assert [len(atoms) for atoms in chosen] == [3, 5, 6, 8, 9]
    assert [len(atoms) for atoms in choose(Dataset(data), SHORT)] == [3, 9]
    with pytest.raises(InputError, match="5 molecules of 3 to 9 atoms, and 6"):
        choose(Dataset(data), dataclasses.replace(SHORT, molecules=6))


def test_a_stretched_bond_and_a_new_contact_are_changed_bond():
    start = molecule("CH3CH2OH")
    assert changed_bond(start, start) is None
    shaken = start.copy()
    shaken.rattle(0.05, seed=1)
    assert changed_bond(start, shaken) is None
    torn, closed = start.copy(), start.copy()
    carbons = [atom.index for atom in start if atom.symbol == "C"]
    torn.positions[carbons[0]] += 3 * (start.positions[carbons[0]] - start.positions[carbons[1]])
    assert changed_bond(start, torn).startswith("bond broken")
    hydrogens = [atom.index for atom in start if atom.symbol == "H"]
    closed.positions[hydrogens[-1]] = closed.positions[hydrogens[0]] + [0.5, 0, 0]
    lost = changed_bond(start, closed)
    assert lost is not None and "H" in lost
    near = Atoms("He2", [[0, 0, 0], [0, 0, 3.0]])
    met = Atoms("He2", [[0, 0, 0], [0, 0, 0.4]])
    assert changed_bond(near, met) == "bond formed: He0-He1, 3.00 → 0.40 Å"


# --- measuring ----------------------------------------------------------------------------------


def test_rotation_errors_are_measured_from_the_mean(model):
    """In float64: a float32 product's rounding depends on a row's place in the batch."""
    exact, atoms = copy.deepcopy(model).double(), molecule("CH3OH")
    changes = rotation_errors(exact, atoms, rotations=6)
    assert changes.shape == (6,)
    assert changes.mean() == pytest.approx(0, abs=1e-12)
    assert np.abs(changes).max() > 1e-4
    single = Atoms("Ne", info={"charge": 0, "spin": 1})
    assert np.abs(rotation_errors(exact, single, rotations=3)).max() < 1e-12
    shifted = atoms.copy()
    shifted.positions += 5.0
    assert rotation_errors(exact, shifted, 6) == pytest.approx(changes, abs=1e-10)


def test_water_by_its_force_field_holds_and_keeps_its_energy(tmp_path):
    trial = dataclasses.replace(SHORT, duration=500.0)
    row = try_molecule(SPCFw(), molecule("H2O"), trial, tmp_path)
    assert row["broken"] is None
    assert row["picoseconds"] == pytest.approx(0.5)
    assert 30 < row["temperature"] < 1500  # six vibrating and turning degrees of freedom
    assert abs(row["drift"]) < 20 and row["drift_error"] > 0
    again = try_molecule(SPCFw(), molecule("H2O"), trial, tmp_path)
    assert again == row


def test_what_flies_apart_is_said_to(tmp_path):
    row = try_molecule(Torn(), molecule("H2O"), SHORT, tmp_path)
    assert row["broken"] is not None
    assert "drift" not in row
    rotated = {"rotation_rms": 0.0, "rotation_worst": 0.0}
    assert row["broken"] in table([row | rotated])


def test_what_breaks_at_once_is_a_row_too(tmp_path, model, make_colliding):
    atoms = molecule("CH3OH", info={"charge": 0, "spin": 1})
    row = try_molecule(make_colliding(model, 1), atoms, SHORT, tmp_path)
    assert row["formula"] == "CH4O" and "exploded at step 0" in row["broken"]


def test_the_command_goes_on_and_writes_its_rows(model, data, tmp_path, capsys):
    save_model(model, tmp_path / "tiny.safetensors")
    command = [str(tmp_path / "tiny.safetensors"), str(data)]
    command += ["--out", str(tmp_path / "run"), "--molecules", "2", "--smallest", "3"]
    command += ["--largest", "9", "--warming", "20", "--duration", "100"]
    assert main(command) == 0
    first = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "stability.json").read_text())
    assert [row["atoms"] for row in result["rows"]] == [3, 9]
    assert result["rows"][1]["rotation_worst"] >= result["rows"][1]["rotation_rms"] > 0
    assert main(command) == 0
    assert capsys.readouterr().out == first
    shared = tmp_path / "shared"
    assert main([*command, "--out", str(shared), "--workers", "2"]) == 0
    capsys.readouterr()
    # Another batch rounds differently, and the dynamics of a random model amplify that.
    for row, twin in zip(
        json.loads((shared / "stability.json").read_text())["rows"], result["rows"], strict=True
    ):
        assert (row["formula"], row["picoseconds"]) == (twin["formula"], twin["picoseconds"])
        assert row["rotation_rms"] == pytest.approx(twin["rotation_rms"], rel=0.5)
    assert main([*command, "--timestep", "0.25"]) == 2
    assert "another folder" in capsys.readouterr().err
    with locked(shared):
        assert main([*command, "--out", str(shared)]) == 2
    assert "another process works in" in capsys.readouterr().err
    assert main([*command[:2], "--out", str(tmp_path / "b"), "--largest", "12"]) == 2
    assert "ask for fewer" in capsys.readouterr().err


def test_rows_are_those_of_the_molecules(model, data, tmp_path):
    molecules = choose(Dataset(data), SHORT)
    rows = run_trial(model, molecules, SHORT, tmp_path, progress=False)
    assert [row["formula"] for row in rows] == [a.get_chemical_formula() for a in molecules]
    settings = SHORT.equilibration()
    assert settings.temperature * units.kB == pytest.approx(0.025852, rel=1e-4)
    assert SHORT.production().ensemble == "nve" and SHORT.production().relax == 0
