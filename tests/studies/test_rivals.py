"""The rivals of the study see one structure in the same way from all sides, and share one loop."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from allscaip_lite.data.aselmdb import Dataset, Subset
from docs.studies.rivals import run as study

pytestmark = pytest.mark.slow  # each model takes two steps of training


@pytest.fixture(scope="module")
def ethanol() -> Subset:
    whole = Dataset(study.ROOT / "data" / "xtb" / "ethanol" / "train.aselmdb")
    return Subset(whole, np.arange(0, 200, 10))


@pytest.mark.parametrize("name", study.MODELS)
def test_forces_are_the_slope_of_the_energy_and_turn_with_the_molecule(name, ethanol):
    if name == "eSEN":
        pytest.importorskip("fairchem.core")
    predict, parameters = study.MODELS[name](ethanol, 0, 2)
    atoms, h = ethanol[0], 1e-2  # Å; in float32
    moved = [atoms.copy() for _ in range(3)]
    for copy, step in zip(moved, (0, h, -h), strict=True):
        copy.positions[2, 1] += step
    energies, forces = predict(moved)
    assert parameters > 10_000 and forces.shape == (3, len(atoms), 3)
    slope = -(energies[1] - energies[2]) / (2 * h)
    assert abs(slope - forces[0, 2, 1]) < 0.02 * np.abs(forces[0]).max() + 5e-3
    turn = Rotation.from_euler("xyz", [0.3, 1.1, -0.7])
    turned = atoms.copy()
    turned.positions = turn.apply(atoms.positions)
    there, rotated = predict([turned])
    invariant = abs(there[0] - energies[0]) < 1e-3
    assert invariant == (name != "AllScAIP")
    if invariant:
        assert np.allclose(rotated[0], turn.apply(forces[0]), atol=1e-3)
