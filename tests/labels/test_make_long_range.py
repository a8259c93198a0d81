"""The sets of `data/long_range`: splits share nothing, states are the intended ones."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from ase import Atoms

from allscaip_lite.data.aselmdb import Dataset, checksum
from allscaip_lite.labels import LabelError
from data.long_range.ions import COULOMB

pytest.importorskip("tblite")

from allscaip_lite.labels.xtb import GFN2xTB

make = importlib.import_module("data.long_range.make")
NEAR, PAIRS, TRAINED_LENGTH = make.NEAR, make.PAIRS, make.TRAINED_LENGTH
chain, chains, pairs, write_ions = make.chain, make.chains, make.pairs, make.write_ions


def test_the_same_command_makes_the_same_ions_and_no_structure_twice(tmp_path):
    sums = []
    for name in ("a", "b"):
        counts = write_ions(tmp_path / name, 60, seed=1)
        sums.append([checksum(Dataset(tmp_path / name / f"{s}.aselmdb")) for s in counts])
    assert counts == {"train": 48, "val": 6, "test": 6, "curves": 399}
    assert sums[0] == sums[1]
    files = {split: Dataset(tmp_path / "a" / f"{split}.aselmdb") for split in counts}
    found = [files[split][i] for split, count in counts.items() for i in range(count)]
    seen = [str(atoms.symbols).encode() + atoms.positions.tobytes() for atoms in found]
    assert len(set(seen)) == len(seen)


# --- GFN2-xTB -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_pairs() -> dict[str, list[Atoms]]:
    chosen = [
        ("Na+", "K+"), ("NH4+", "Cl-"), ("Na+", "Cl-"), ("Na+", "Li+"), ("Cl-", "HF"),
        ("Cl-", "NH3"), ("HF", "HCN"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "PAIRS", [pair for pair in PAIRS if pair[:2] in chosen])
        return pairs(len(chosen) * 20, seed=0)


def test_held_out_pairs_and_distances_are_in_test_alone(few_pairs):
    names = {
        split: {atoms.info["source"].split("/")[0] for atoms in found}
        for split, found in few_pairs.items()
    }
    unseen = {"Cl-...NH3", "HF...HCN"}
    near = {"Na+...Li+", "Cl-...HF"}
    assert not unseen & (names["train"] | names["val"])
    assert unseen <= names["test"]
    for split in ("train", "val"):
        far = [a for a in few_pairs[split] if a.info["source"].split("/")[0] in near]
        assert all(a.info["distance"] <= NEAR for a in far)
    kinds = {a.info["data_id"] for a in few_pairs["test"]}
    assert kinds == {"pairs_seen", "pairs_unseen_pair", "pairs_unseen_distance"}


def test_like_charges_repel_as_coulomb_says(few_pairs):
    # GFN2-xTB's charges repel as k / sqrt(r² + a²), so 1/E² is linear in r² with slope 1/k².
    curve = [a for a in few_pairs["curves"] if a.info["source"] == "Na+...K+"]
    distance = np.array([a.info["distance"] for a in curve])
    alone = 0.0
    for symbol in ("Na", "K"):
        ion = Atoms(symbol, info={"charge": 1, "spin": 1}, calculator=GFN2xTB(accuracy=0.1))
        alone += ion.get_potential_energy()
    energy = np.array([a.get_potential_energy() for a in curve]) - alone
    far = distance >= 8
    slope = np.polyfit(distance[far] ** 2, energy[far] ** -2, 1)[0]
    assert slope**-0.5 == pytest.approx(COULOMB, rel=0.02)


def test_opposite_ions_are_kept_only_where_they_are_ions(few_pairs):
    kept = {a.info["source"] for a in few_pairs["curves"]}
    assert "Na+...Cl-" not in kept  # at GFN2-xTB these share their charge at every distance
    ionic = [a for a in few_pairs["curves"] if a.info["source"] == "NH4+...Cl-"]
    assert ionic and max(a.info["distance"] for a in ionic) < 12


def test_a_chain_s_two_states_share_one_geometry():
    pytest.importorskip("rdkit")
    charged, neutral = (chain(start, 4, "OH", "curve", None) for start in ("NH3+", "NH2"))
    assert len(charged) == len(neutral) + 1
    probe, other = charged.info["probe"], neutral.info["probe"]
    assert sorted(charged.numbers[probe]) == sorted(neutral.numbers[other]) == [1, 8]
    assert np.allclose(charged.positions[probe], neutral.positions[other])
    assert 5 < charged.info["distance"] < 9
    felt = charged.get_forces()[probe].sum(0) - neutral.get_forces()[other].sum(0)
    assert 0.01 < np.linalg.norm(felt) < 1


def test_long_chains_and_the_unseen_end_are_in_test_alone():
    pytest.importorskip("rdkit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "LENGTHS", (3, TRAINED_LENGTH, TRAINED_LENGTH + 1))
        patch.setattr(make, "CHARGED", {"S-": ("S", -1), "SH": ("S", 0)})
        found = chains(4 * 9 * 3, seed=0)
    for atoms in found["train"] + found["val"]:
        assert atoms.info["data_id"] == "chain_seen"
        assert (atoms.numbers == 6).sum() <= TRAINED_LENGTH + 1
        assert not (9 in atoms.numbers and atoms.info["charge"])
    assert {"chain_unseen_length", "chain_unseen_end"} <= {a.info["data_id"] for a in found["test"]}
    assert "S-...S-" in {a.info["source"] for a in found["curves"]}
    assert "S-...NH3+" not in {a.info["source"] for a in found["curves"]}


def test_two_charges_of_a_chain_repel_each_other():
    pytest.importorskip("rdkit")

    def energy(groups, start, end):
        return chain(start, groups, end, "curve", None).get_potential_energy()

    pushes = []
    for groups in (4, 10):  # what both ends do together and none alone
        both = energy(groups, "NH3+", "NH3+") + energy(groups, "NH2", "OH")
        pushes.append(both - energy(groups, "NH3+", "OH") - energy(groups, "NH2", "NH3+"))
    distances = [chain("NH3+", n, "NH3+", "curve", None).info["distance"] for n in (4, 10)]
    assert chain("NH3+", 4, "NH3+", "curve", None).info["charge"] == 2
    for push, distance in zip(pushes, distances, strict=True):
        assert 0.4 < push * distance / COULOMB < 1.2  # Coulomb's law, screened by the chain


def test_another_state_is_an_error_that_says_so():
    pair = Atoms("NaCl", [[0, 0, 0], [0, 0, 3.5]], info={"charge": 0, "spin": 1})
    with pytest.raises(LabelError, match="not \\+1"):
        make.Fragments(1, 1).calculate(pair)


def test_the_command_replaces_a_set_only_when_told_to(tmp_path, capsys):
    command = ["ions", "--out", str(tmp_path), "--structures", "40"]
    assert make.main(command) == 0
    assert "train: 32 structures" in capsys.readouterr().out
    assert make.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert make.main([*command, "--overwrite"]) == 0
    assert make.main(["ions", "--out", str(tmp_path / "new"), "--structures", "5"]) == 2
    assert "20 or more" in capsys.readouterr().err
