"""The set `data/crystals`: right prototypes, no test system trained on, repeatable."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list

from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.labels import LabelError

make = importlib.import_module("data.crystals.make")
prototypes = importlib.import_module("data.crystals.prototypes")
CRYSTALS = prototypes.crystals()

# Of the atom named first: how many nearest neighbours (within 5 %), and of which site.
NEIGHBOURS = {
    "fcc": (0, 12, 0),
    "bcc": (0, 8, 0),
    "hcp": (0, 12, 0),
    "diamond": (0, 4, 0),
    "rock salt": (0, 6, 1),
    "zinc blende": (0, 4, 1),
    "fluorite": (0, 8, 1),
    "perovskite": (1, 6, 2),
    "rutile": (0, 6, 1),
    "ordered rock salt": (0, 6, 2),
    "ordered zinc blende": (0, 4, 2),
    "ordered fluorite": (0, 8, 2),
    "ordered antifluorite": (0, 4, 2),
    "ordered rutile": (0, 6, 2),
    "half-Heusler": (0, 4, 2),
    "Heusler": (2, 8, None),  # 4 of each other kind
    "ordered L1_2": (0, 12, None),
    "B2": (0, 8, 1),
    "L1_2": (0, 12, 1),
    "L1_0": (0, 12, None),  # 4 like, 8 unlike
}


@pytest.mark.parametrize("prototype", prototypes.PROTOTYPES)
@pytest.mark.parametrize("primitive", [True, False])
def test_prototypes_have_their_coordination(prototype, primitive):
    kind, count, of = NEIGHBOURS[prototype]
    elements = ("Na", "Ti", "O")
    atoms = prototypes.built(prototype, elements, 4.0, primitive)
    i, j, distance = neighbor_list("ijd", atoms, 4.5)
    symbols = np.array(atoms.get_chemical_symbols())
    for atom in np.flatnonzero(symbols == elements[kind]):
        near = distance[i == atom]
        found = near < 1.05 * near.min()
        assert found.sum() == count
        if of is not None:
            assert set(symbols[j[i == atom][found]]) == {elements[of]}


@pytest.mark.parametrize("prototype", prototypes.PROTOTYPES)
def test_the_conventional_cell_of_a_strained_crystal_is_the_same_crystal(prototype):
    rng = np.random.default_rng(0)
    one = prototypes.displaced(prototypes.built(prototype, ("Na", "Ti", "O"), 4.0), rng, 0.1)
    one = prototypes.strained(one, rng, 0.05)
    centring = prototypes.PROTOTYPES[prototype].centring
    whole = prototypes.conventional(one, centring)
    copies = {"P": 1, "I": 2, "F": 4}[centring]
    assert len(whole) == copies * len(one)
    assert whole.get_volume() == pytest.approx(copies * one.get_volume())
    seen = [np.sort(neighbor_list("d", atoms, 5.0)) for atoms in (one, whole)]
    np.testing.assert_allclose(np.repeat(seen[0], copies), seen[1], atol=1e-9)


def test_each_chemical_system_is_in_one_split_and_its_elements_are_trained_on():
    trained = {e for c in CRYSTALS if c.split == "train" for e in c.elements}
    for split, systems in prototypes.HELD_OUT.items():
        for system in systems.split():
            own = [c for c in CRYSTALS if set(c.elements) == set(system.split("-"))]
            assert own and {c.split for c in own} == {split}
            assert set(system.split("-")) <= trained
    assert len({c.name for c in CRYSTALS}) == len(CRYSTALS)
    assert 15 <= len(trained) <= 30


def drawn(make_crystals, least):
    """Crystals drawn at random, after the test of what holds of all: the same ones each time, none
    twice, in the tables or held out.
    """
    found = make_crystals()
    assert [vars(c) for c in found] == [vars(c) for c in make_crystals()]
    names = [c.name for c in found]
    assert len(set(names)) == len(names) > least
    assert not set(names) & {c.name for c in CRYSTALS}
    assert {c.split for c in found} == {"train"} and not any(c.natural for c in found)
    return found


def test_pairs_are_new_compounds_of_the_elements_and_none_is_held_out():
    pairs = drawn(prototypes.pairs, 300)
    metals, anions = set(prototypes.METALS.split()), set(prototypes.ANIONS.split())
    for crystal in pairs:
        alloy = set(crystal.elements) <= metals
        assert alloy or len(set(crystal.elements) & anions) == 1
        assert crystal.prototype in prototypes.PAIRED["metals" if alloy else "anions"]
    systems = {frozenset(c.elements) for c in pairs}
    assert len({element for system in systems for element in system}) == 23
    assert frozenset({"Cu", "Pt"}) in systems and frozenset({"Cu", "Au"}) not in systems


def test_in_triples_elements_of_held_out_pairs_meet_and_no_triple_is_held_out_or_twice():
    triples = drawn(prototypes.triples, 700)
    assert all(len(set(c.elements)) == 3 for c in triples)
    assert {c.prototype for c in triples} == set().union(*prototypes.TRIPLED.values())
    met = {frozenset(two) for c in triples for two in itertools.combinations(c.elements, 2)}
    held_out = {elements for elements in prototypes.SPLIT_OF if len(elements) == 2}
    assert held_out <= met


def test_elements_of_a_mixture_share_their_sites_alike(monkeypatch):
    monkeypatch.setattr(prototypes, "_relax", lambda atoms, fmax, steps: True)
    mixtures = drawn(prototypes.mixtures, 2900)
    assert len(mixtures) == 2914 and mixtures[-1].name == "Al+Ti-F+Cl B2"  # in any process
    assert {c.prototype for c in mixtures} == {name for name, _ in prototypes.MIXED}
    rng = np.random.default_rng(0)
    for crystal in mixtures[:100]:
        groups = [shared.split("+") for shared in crystal.elements]
        kinds = prototypes.PROTOTYPES[crystal.prototype].kinds
        cell = prototypes.mixture(crystal, rng)
        symbols = cell.get_chemical_symbols()
        assert 4 <= len(cell) <= prototypes.MOST_ATOMS
        for kind, group in enumerate(groups):
            counts = [symbols.count(symbol) for symbol in group]
            assert sum(counts) == len(cell) * kinds.count(kind) // len(kinds)
            assert max(counts) - min(counts) <= 1


def test_no_structure_of_a_mixture_is_of_a_system_that_is_held_out(quick):
    crystal = prototypes.Crystal("perovskite", ("K+Na", "Mg", "F"), 4.0, natural=False)
    assert crystal.split == "train"
    made = [atoms for seed in range(3) for atoms in make.sample(crystal, 0, seed)]
    systems = {atoms.info["system"] for atoms in made}
    assert "F-Mg-Na" in systems and "F-K-Mg" not in systems
    assert {atoms.info["data_id"] for atoms in made} > {"crystal_strained", "crystal_displaced"}


@pytest.mark.parametrize("prototype", prototypes.PROTOTYPES)
def test_a_pair_starts_where_its_atoms_touch(prototype):
    elements = ("K", "Cl", "Cl")
    a = prototypes._start(prototype, elements)
    atoms = prototypes.built(prototype, elements, a)
    i, j, distance = neighbor_list("ijd", atoms, 5.0)
    radii = covalent_radii[atoms.numbers]
    assert (distance / (radii[i] + radii[j])).min() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name", ["Cu fcc", "K fcc", "Pd fcc", "Na-Cl rock salt", "Ag-Mg B2", "C diamond"]
)
def test_defects_stay_in_the_split_of_their_crystal(name):
    [crystal] = [c for c in CRYSTALS if c.name == name]
    cell = prototypes.built(crystal.prototype, crystal.elements, crystal.a).repeat(2)
    rng = np.random.default_rng(0)
    made = [prototypes.with_defect(cell, rng, crystal.split) for _ in range(200)]
    assert {prototypes.split_of(set(atoms.symbols)) for atoms in made} == {crystal.split}
    assert len(cell) - 1 in {len(atoms) for atoms in made}
    if crystal.split == "train":
        assert len({frozenset(atoms.symbols) for atoms in made}) > 2


@pytest.mark.parametrize("name", ["Cu fcc", "Fe bcc", "Mg hcp", "Si diamond", "Na-Cl rock salt"])
def test_slabs_have_a_vacuum_and_the_crystal_s_density(name):
    [crystal] = [c for c in CRYSTALS if c.name == name]
    cell = prototypes.built(crystal.prototype, crystal.elements, crystal.a)
    rng = np.random.default_rng(1)
    cuts = [cut for _ in range(20) if (cut := make.slab(crystal, cell, rng)) is not None]
    assert {bool(cut.pbc[2]) for cut in cuts} == {True, False}
    for cut in cuts:
        assert len(cut) <= prototypes.MOST_ATOMS
        assert prototypes.nearest(cut) == pytest.approx(prototypes.nearest(cell), rel=0.08)
        thickness = np.ptp(cut.positions[:, 2])
        assert cut.cell[2, 2] - thickness == pytest.approx(make.VACUUM)


@pytest.fixture
def quick(monkeypatch):
    pytest.importorskip("chgnet")
    few = {"strained": 2, "displaced": 1, "defect": 1, "slab": 1, "hot": 1}
    monkeypatch.setattr(make, "COUNTS", few)
    monkeypatch.setattr(make, "STEPS_BEFORE", 1)
    monkeypatch.setattr(make, "STEPS_BETWEEN", 1)


def test_the_same_seed_yields_the_same_structures_and_another_round_others(quick):
    [crystal] = [c for c in CRYSTALS if c.name == "Al fcc"]
    first, again, other = (make.sample(crystal, number) for number in (0, 0, 1))
    assert len(first) == len(other) + 1 == 7
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.positions, two.positions)
        assert one.get_potential_energy() == two.get_potential_energy()
    kinds = [atoms.info["data_id"] for atoms in first]
    assert set(kinds) == {f"crystal_{kind}" for kind in make.COUNTS}
    assert np.abs(first[0].get_stress()).max() < 2e-3 and len(first[0]) == 1
    assert not np.allclose(first[1].cell, other[0].cell)
    for atoms in first:
        assert prototypes.nearest(atoms) > prototypes.CLOSEST * prototypes.nearest(first[0])


def test_a_folder_takes_more_rounds_and_no_other_seed(quick, monkeypatch, tmp_path):
    [crystal] = [c for c in CRYSTALS if c.name == "Si diamond"]
    monkeypatch.setattr(make, "crystals", lambda: [crystal])
    make.make(tmp_path, 1)
    before = len(Dataset(tmp_path / "train.aselmdb"))
    make.make(tmp_path, 2)
    after = Dataset(tmp_path / "train.aselmdb")
    assert len(after) > before
    assert {atoms.info["system"] for atoms in after} >= {"Si"}
    with pytest.raises(LabelError, match="another data set"):
        make.make(tmp_path, 2, seed=1)
    with pytest.raises(LabelError, match="1 or more"):
        make.make(tmp_path, 0)
