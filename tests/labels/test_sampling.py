"""Molecules from SMILES: their ions and conformers are those a chemist expects."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from ase import Atoms

pytest.importorskip("tblite")
Chem = pytest.importorskip("rdkit.Chem")

from allscaip_lite.labels import LabelError, sampling
from allscaip_lite.labels.sampling import parse_system

sets = importlib.import_module("data.xtb.sets")
splits = importlib.import_module("data.xtb.splits")
systems = importlib.import_module("data.xtb.systems")


@pytest.mark.parametrize(
    ("molecule", "ions"),
    [
        ("CO", {("C[O-]", -1)}),
        ("CC=O", {("CC=[OH+]", 1)}),
        ("c1c[nH]cn1", {("c1c[nH]c[nH+]1", 1), ("c1c[n-]cn1", -1)}),
        ("CC", set()),
    ],
)
def test_protomers_are_those_a_chemist_writes(molecule, ions):
    canonical = {(Chem.CanonSmiles(smiles), charge) for smiles, charge in ions}
    assert set(systems.protomers(molecule)) == canonical


def test_a_word_may_say_its_charge_and_multiplicity():
    plain, triplet = parse_system("a", "OC.[Na+]"), parse_system("a", "[O][O]|0|3")
    assert (plain.parts, plain.charge, plain.multiplicity) == (("CO", "[Na+]"), 1, 1)
    assert (triplet.charge, triplet.multiplicity) == (0, 3)
    assert plain.name == "CO.[Na+]|1|1" and splits.atom_count(plain) == 7


def test_a_molecule_without_a_conformer_is_an_error():
    with pytest.raises(LabelError, match="no conformer of C1#CC1"):
        sampling.embed("C1#CC1", np.random.default_rng(0), 2)


def test_assembled_molecules_touch_at_the_distance_asked_for():
    rng = np.random.default_rng(0)
    parts = [sampling.embed(smiles, rng, 1)[0] for smiles in ("CCO", "O", "O")]
    whole = sampling.assemble(parts, rng, contact=2.0)
    assert str(whole.symbols) == "C2OH6OH2OH2"
    distances = whole.get_all_distances()
    assert distances[:9, 9:12].min() == pytest.approx(2.0, abs=0.11)
    assert distances[:12, 12:].min() == pytest.approx(2.0, abs=0.11)


def test_relaxing_lowers_the_forces_and_leaves_no_calculator():
    stretched = Atoms("H2", [[0, 0, 0], [0, 0, 0.9]])
    relaxed = sets.relax(stretched, steps=20)
    assert relaxed.calc is None and 0.7 < relaxed.get_distance(0, 1) < 0.85
    assert stretched.get_distance(0, 1) == 0.9


def test_a_share_is_part_of_a_larger_one_and_never_empty():
    jobs = [sets.Job(parse_system("a", "C" * n), 1, "train") for n in range(1, 200)]
    tenth, third, whole = (sets.take_share(jobs, share) for share in (0.1, 0.3, 1.0))
    assert set(tenth) < set(third) < set(whole) == set(jobs)
    assert len(third) == pytest.approx(60, abs=15)
    with pytest.raises(LabelError, match="a number above 0"):
        sets.take_share(jobs, 0.0)


def test_the_split_of_a_name_is_that_of_its_hash():
    found = [splits.by_hash(f"molecule {number}") for number in range(4000)]
    shares = [found.count(split) / len(found) for split in ("train", "val", "test")]
    np.testing.assert_allclose(shares, (0.9, 0.05, 0.05), atol=0.02)
    examples = {3: "train", 6: "val", 23: "test", 40: "val", 62: "test"}
    assert {n: splits.by_hash("C" * n) for n in examples} == examples
