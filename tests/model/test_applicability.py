"""What a model saw in training is kept, and what is outside of it is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from conftest import state

from allscaip_lite import (
    AllScAIP,
    AllScAIPCalculator,
    AllScAIPConfig,
    StructureError,
    cli,
    load_model,
    save_model,
    structures_from_atoms,
)
from allscaip_lite.applicability import Seen
from allscaip_lite.checkpoints import native, save_official
from allscaip_lite.errors import StructureWarning


def seen() -> Seen:
    """Of water, an ion and an ethanol."""
    found = Seen()
    batch = [state(molecule("H2O")), state(molecule("OH"), -1), state(molecule("CH3CH2OH"))]
    found.add(structures_from_atoms(batch))
    return found


@pytest.fixture
def model() -> AllScAIP:
    torch.manual_seed(0)
    model = AllScAIP(AllScAIPConfig(hidden_size=32, num_heads=1, num_layers=1)).eval()
    model.seen = seen()
    return model


def test_what_is_noted() -> None:
    found = seen().to_dict()
    assert (found["elements"], found["charges"], found["multiplicities"]) == (
        ["H", "C", "O"],
        [-1, 0],
        [1],
    )
    assert (found["atoms"], found["kinds"]) == (9, ["molecules"])
    ethanol = molecule("CH3CH2OH")
    assert found["farthest"] == pytest.approx(ethanol.get_all_distances().max(), abs=1e-4)
    assert found["closest"] == pytest.approx(0.969 / (0.31 + 0.66), abs=0.02)  # O-H
    assert Seen.from_dict(json.loads(json.dumps(found))).to_dict() == found


def test_images_count_in_a_cell() -> None:
    argon = state(Atoms("Ar", cell=[1.2, 9, 9], pbc=True))
    found = Seen()
    found.add(structures_from_atoms(argon))
    assert found.closest == pytest.approx(1.2 / (2 * 1.06), rel=1e-6)
    assert found.kinds == {"periodic systems"} and found.farthest == 0


def squeezed() -> Atoms:
    atoms = state(molecule("H2O"))
    atoms.set_distance(0, 1, 0.6, fix=0)
    return atoms


def stretched() -> Atoms:
    atoms = state(molecule("H2O") + molecule("H2O"))
    atoms.positions[3:] += 30
    return atoms


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        (state(Atoms("Xe")), "element: Xe: Xe"),
        (state(molecule("H2O"), 4), r"charge: H2O: \+4 \(seen: -1, \+0\)"),
        (state(molecule("CH2_s3B1d"), 0, 3), r"multiplicity: CH2: 3 \(seen: 1\)"),
        (state(molecule("C6H6")), "size: C6H6: 12 atoms .seen: at most 9"),
        (state(bulk("C")), "periodicity: C2: one of periodic systems .seen: molecules"),
        (squeezed(), "closest atoms: H2O: 0.60 Å, 0.62 of the sum .*seen: 0.99 or more"),
        (stretched(), r"farthest atoms: H4O2: \d+\.\d Å \(seen: at most"),
    ],
)
def test_each_kind_that_is_outside_is_said_once_or_refused(
    model: AllScAIP, atoms: Atoms, words: str
) -> None:
    with pytest.warns(StructureWarning, match=words):
        model.predict(atoms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(atoms)  # it was said
        AllScAIPCalculator(model, outside_training="ignore").get_potential_energy(atoms)
    with pytest.raises(StructureError, match=words):
        AllScAIPCalculator(model, outside_training="error").get_potential_energy(atoms)


def test_nothing_is_said_of_what_training_saw(model: AllScAIP) -> None:
    moved = state(molecule("CH3CH2OH"))
    moved.rattle(0.02, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict([moved, state(molecule("OH"), -1)])
        model.seen = None  # not known
        model.predict(state(Atoms("Xe")))


def test_a_file_keeps_what_was_seen(model: AllScAIP, tmp_path: Path, capsys) -> None:
    path = save_model(model, tmp_path / "mine.safetensors")
    kept = load_model(path).seen
    assert kept is not None and kept.to_dict() == seen().to_dict()
    assert cli.main(["info", str(path)]) == 0
    assert "elements: [H, C, O]" in capsys.readouterr().out
    model.seen = None
    assert load_model(save_model(model, tmp_path / "old.safetensors")).seen is None


def test_released_checkpoints_have_what_omol25_has(tmp_path: Path) -> None:
    config = AllScAIPConfig(hidden_size=32, num_heads=1, num_layers=1, smooth_bond_order=False)
    name = Path(native.OFFICIAL_FILES["allscaip-md-conserving-all-omol"]).name
    found = load_model(save_official(AllScAIP(config), tmp_path / name)).seen
    assert found is not None and len(found.elements) == 83
    outside = found.outside(structures_from_atoms(state(molecule("H2O"), 4)))
    assert not outside
    (kind,) = found.outside(structures_from_atoms(state(Atoms("U"))))
    assert kind[1:] == ("element", "U")
    mine = load_model(save_official(AllScAIP(config), tmp_path / "mine.pt"))
    assert mine.seen is None


def test_merged_what_one_does_not_know_is_not_known() -> None:
    both = seen()
    both.merge(native.OMOL25)
    assert both.atoms == 350 and both.closest is None and np.isclose(len(both.elements or ()), 83)
