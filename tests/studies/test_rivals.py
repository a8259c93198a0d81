"""The rivals of the study: forces, symmetry and reach of each, and the command on a tiny budget."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule as water
from scipy.spatial.transform import Rotation

from allscaip_lite import AllScAIPCalculator
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.model import AllScAIP
from docs.studies.rivals import run as study

SAMPLE = study.HERE.parents[2] / "data" / "xtb"
INVARIANT = [name for name in study.MODELS if name != "AllScAIP"]
FAR_SIGHTED = ("AllScAIP", "invariant")


def make(name: str) -> AllScAIP:
    pytest.importorskip(study.NEEDED.get(name, "torch"))
    torch.manual_seed(0)
    return study.MODELS[name].make(1.0).double().eval().requires_grad_(False)


def ask(model: AllScAIP, *structures: Atoms) -> tuple[np.ndarray, list[np.ndarray]]:
    found = model.predict(list(structures), outside_training="ignore")
    return np.array([one.energy for one in found]), [one.forces for one in found]


@pytest.fixture(scope="module")
def molecule() -> Atoms:
    data = study.neutral(Dataset(SAMPLE / "test.aselmdb"))
    return study.smallest_of([data[index] for index in range(len(data))], 9)


@pytest.mark.parametrize("name", study.MODELS)
def test_forces_are_the_slope_of_the_energy_and_turn_with_the_molecule(name, molecule):
    model, h = make(name), 1e-3  # Å
    calculator = AllScAIPCalculator(model, outside_training="ignore")
    moved = [molecule.copy() for _ in range(3)]
    for copy, step in zip(moved, (0, h, -h), strict=True):
        copy.positions[2, 1] += step
    energies, forces = ask(model, *moved)
    slope = -(energies[1] - energies[2]) / (2 * h)
    np.testing.assert_allclose(calculator.get_forces(molecule), forces[0], atol=1e-8)
    assert abs(slope - forces[0][2, 1]) < 1e-3 * np.abs(forces[0]).max()
    turn = Rotation.from_euler("xyz", [0.3, 1.1, -0.7])
    turned = molecule.copy()
    turned.positions = turn.apply(molecule.positions)
    (there,), (rotated,) = ask(model, turned)
    assert (abs(there - energies[0]) < 1e-6) == (name in INVARIANT)
    if name in INVARIANT:
        assert np.allclose(rotated, turn.apply(forces[0]), atol=1e-6)


@pytest.mark.parametrize("name", study.MODELS)
def test_only_node_attention_without_a_cut_sees_beyond_the_cutoff(name, molecule):
    def pair(gap: float) -> Atoms:
        other = molecule.copy()
        other.positions[:, 0] += np.ptp(molecule.positions[:, 0]) + gap
        both = molecule + other
        both.info = {"charge": 0, "spin": 1}
        return both

    near, far = ask(make(name), pair(9.0), pair(12.0))[0]
    assert (abs(near - far) > 1e-9) == (name in FAR_SIGHTED)


def test_a_batch_gives_what_single_structures_do(molecule):
    for name in study.AVAILABLE:
        model = make(name)
        other = water("H2O", info={"charge": 0, "spin": 1})
        together, alone = ask(model, molecule, other)[0], ask(model, other)[0]
        assert np.isclose(together[1], alone[0], atol=1e-8), name


@pytest.mark.slow
def test_the_command_goes_on_and_writes_its_table(tmp_path, capsys):
    page, out = tmp_path / "page.md", tmp_path / "found.json"
    arguments = ["--data", str(SAMPLE), "--structures", "20", "--seconds", "0.1", "--seeds", "0"]
    arguments += ["--models", "invariant", "--drift-ps", "0.02", "--page", str(page)]
    arguments += ["--out", str(out)]
    assert study.main([*arguments, "--speed"]) == 0
    first = json.loads(out.read_text())
    assert [row["cell"][1] for row in first["cells"]] == ["usual", "narrow", "wide"]
    assert study.main(arguments) == 0
    assert json.loads(out.read_text()) == first
    assert page.read_text().count("| invariant |") == 3 and "### Found" in page.read_text()
    assert page.with_name("found.png").exists()
    speeds = first["speeds"]["invariant"]
    first["cells"].pop()
    del speeds["wide"]["step"]  # results of before steps were timed
    first["speeds"]["eSEN"] = {"usual": {"atoms": 1.0}}
    out.write_text(json.dumps(first))
    assert study.main(arguments) == 0
    again = json.loads(out.read_text())
    assert len(again["cells"]) == 3 and again["speeds"]["invariant"]["wide"]["step"] > 0
    assert again["speeds"]["eSEN"] == {"usual": {"atoms": 1.0}}  # not asked for
