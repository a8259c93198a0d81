"""The set `data/xtb`: its plan, its splits and its structures are those that its card describes."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

pytest.importorskip("tblite")
Chem = pytest.importorskip("rdkit.Chem")

from allscaip_lite.data.aselmdb import SPLITS, Dataset
from allscaip_lite.labels import sampling
from allscaip_lite.labels.xtb import GFN2xTB

make = importlib.import_module("data.xtb.make")
systems_of = importlib.import_module("data.xtb.systems")
sets = importlib.import_module("data.xtb.sets")
hashed = importlib.import_module("data.xtb.splits")
Job, make_set = sets.Job, sets.make_set
plan, sample = make.plan, make.sample


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return plan(60_000)


def job_of(jobs: list[Job], molecule: str, count: int, spin: int = 1) -> Job:
    (system,) = (
        job.system
        for job in jobs
        if (job.system.molecule, job.system.multiplicity) == (molecule, spin)
        and job.system.charge in (0, 1, -1)
    )
    return Job(system, count, "train")


def energy(atoms: Atoms, charge: int = 0, spin: int = 1) -> float:
    atoms = atoms.copy()
    atoms.info = {"charge": charge, "spin": spin}
    atoms.calc = GFN2xTB(accuracy=0.1)
    return atoms.get_potential_energy()


# --- plan and splits ----------------------------------------------------------------------------


def test_every_system_has_electrons_for_its_multiplicity(jobs):
    for job in jobs:
        molecules = [Chem.AddHs(Chem.MolFromSmiles(part)) for part in job.system.parts]
        protons = sum(atom.GetAtomicNum() for m in molecules for atom in m.GetAtoms())
        assert (protons - job.system.charge + job.system.multiplicity) % 2 == 1, job.system


def test_the_plan_covers_what_the_card_says(jobs):
    assert sum(job.count for job in jobs) == pytest.approx(60_000 * 1.05, rel=0.05)
    assert len({job.system.name for job in jobs}) == len(jobs)
    molecules = {job.system.molecule for job in jobs}
    assert set(hashed.HELD_OUT) | hashed.KEPT_IN_TRAIN <= molecules
    assert {job.system.multiplicity for job in jobs} == {1, 2, 3, 4}
    assert {job.system.charge for job in jobs} == {-2, -1, 0, 1, 2}
    sizes = [hashed.atom_count(job.system) for job in jobs]
    assert 30 < max(sizes) <= systems_of.MOST_ATOMS
    fewer = plan(1_000)
    assert [job.split for job in fewer] == [job.split for job in jobs]


def test_splits_share_no_molecule(jobs):
    splits = {split: [job for job in jobs if job.split == split] for split in SPLITS}
    shares = [len(found) / len(jobs) for found in splits.values()]
    np.testing.assert_allclose(shares, (0.87, 0.055, 0.075), atol=0.02)

    whole = {split: {job.system.molecule for job in found} for split, found in splits.items()}
    assert not whole["train"] & (whole["val"] | whole["test"])
    assert not whole["val"] & whole["test"]

    # Nor does a molecule that is held out by its hash take part in a complex that is trained on,
    # be it as its ion.
    inside = {
        split: {hashed.parent(part) for job in found for part in job.system.parts}
        for split, found in splits.items()
    }
    alone = {
        hashed.parent(job.system.molecule)
        for job in splits["test"] + splits["val"]
        if len(job.system.parts) == 1
    }
    assert len(alone) > 80
    assert not alone & inside["train"]


def test_named_molecules_are_where_the_card_says(jobs):
    split = {job.system.molecule: job.split for job in jobs}
    assert split[hashed.CAFFEINE] == split[f"{hashed.CAFFEINE}.O"] == "test"
    assert split["NCC(=O)O.O"] == split["O.O.O.O.O.O.O"] == "test"
    assert split["O.O.O.O.O"] == "val"
    assert split["NCC(=O)O"] == split["CCO"] == split["CCCC"] == split["O"] == "train"


def test_an_acid_goes_with_its_ions():
    assert hashed.parent("CC(=O)[O-]") == hashed.parent("CC(=O)O") == "CC(=O)O"
    assert hashed.parent("C[C@H]([NH3+])C(=O)[O-]") == hashed.parent("CC(N)C(=O)O")
    acids = [f"{'C' * n}(=O)" for n in range(3, 30)]
    splits = [hashed.split_of(sampling.parse_system("ions", f"{acid}[O-]")) for acid in acids]
    assert splits == [
        hashed.split_of(sampling.parse_system("organic", f"{acid}O")) for acid in acids
    ]
    assert len(set(splits)) > 1


def test_the_charged_set_has_what_the_main_one_lacks(jobs):
    charged = plan(30_000, "charged")
    names = [job.system.name for job in charged]
    assert len(names) == len(set(names))
    count = {
        state: sum(job.count for job in charged if wanted(job.system))
        for state, wanted in {
            "neutral singlet": lambda s: (s.charge, s.multiplicity) == (0, 1),
            "open-shell ion": lambda s: s.charge and s.multiplicity > 1,
            "triplet": lambda s: s.multiplicity == 3,
        }.items()
    }
    assert sum(job.count for job in charged) == pytest.approx(30_000, rel=0.15)
    assert count["neutral singlet"] < 3_000  # salts and metals with their anions
    assert min(count["open-shell ion"], count["triplet"]) > 3_000
    # one split for a molecule, its vertical ions and its protomers, in both sets
    split = {hashed.parent(j.system.molecule): j.split for j in jobs if len(j.system.parts) == 1}
    for job in charged:
        if len(job.system.parts) == 1 and job.system.domain in ("vertical", "protomers"):
            assert split.get(hashed.parent(job.system.molecule), job.split) == job.split


# --- sampling -----------------------------------------------------------------------------------


def test_a_sample_is_labelled_described_and_whole(jobs):
    structures = sample(job_of(jobs, "CCO", 12))
    assert len(structures) == 12
    ways = {atoms.info["source"].rpartition("/")[2] for atoms in structures}
    assert ways == {"relaxed", "langevin", "displaced", "turned"}
    for atoms in structures:
        info = atoms.info
        assert (info["charge"], info["spin"], info["num_electrons"]) == (0, 1, 26)
        assert (info["num_atoms"], info["composition"]) == (9, "C2H6O")
        assert (info["molecule"], info["data_id"]) == ("CCO", "organic")
        assert 2 < info["homo_lumo_gap"][0] < 20
        assert np.abs(atoms.get_forces()).max() < make.MAX_FORCE
        assert atoms.get_potential_energy() == pytest.approx(energy(atoms), abs=1e-4)
    energies = [atoms.get_potential_energy() for atoms in structures]
    assert np.ptp(energies) > 0.3
    angles = [atoms.get_dihedral(0, 1, 2, 8) for atoms in structures]
    assert np.ptp(angles) > 90


def test_a_radical_has_a_gap_for_each_spin(jobs):
    structures = sample(job_of(jobs, "[OH]", 4, spin=2))
    assert all(atoms.info["spin"] == 2 for atoms in structures)
    assert all(len(atoms.info["homo_lumo_gap"]) == 2 for atoms in structures)


def test_a_vertical_ion_has_the_geometry_of_the_neutral_molecule(jobs):
    """Formaldehyde's cation, stretched where it would relax: the geometry is the neutral one's."""
    neutral = job_of(jobs, "C=O", 1).system
    cation = replace(neutral, charge=1, multiplicity=2)
    vertical = replace(cation, moves_as=(0, 1))
    kinds = {}
    for name, system in {"neutral": neutral, "cation": cation, "vertical": vertical}.items():
        atoms = sample(Job(system, 4, "train"))[0]
        assert atoms.info["source"].endswith("relaxed")
        kinds[name] = atoms.get_angle(2, 0, 3), atoms.info["charge"], atoms.info["spin"]
        assert atoms.get_potential_energy() == pytest.approx(
            energy(atoms, *kinds[name][1:]), abs=1e-4
        )
    assert kinds["vertical"][1:] == kinds["cation"][1:] == (1, 2)
    assert kinds["vertical"][0] == pytest.approx(kinds["neutral"][0], abs=0.5)
    assert abs(kinds["cation"][0] - kinds["neutral"][0]) > 3


def test_separated_molecules_have_all_distances_and_the_energy_of_two():
    (job,) = (job for job in plan(13_000, "apart") if job.system.molecule == "F.F")
    structures = sample(replace(job, count=40, seed=0))
    gaps, bonds = [], []
    for atoms in structures:
        distances = atoms.get_all_distances()
        bonds += [distances[0, 1], distances[2, 3]]
        gaps.append(distances[:2, 2:].min())
        if gaps[-1] > 9:
            alone = energy(atoms[:2]) + energy(atoms[2:])
            assert atoms.get_potential_energy() == pytest.approx(alone, abs=5e-3)
    assert 0.75 < min(bonds) < max(bonds) < 1.15  # whole molecules, displaced a little
    counts, _ = np.histogram(gaps, [1.2, 2.8, 6, 14.3])
    assert counts.sum() == len(structures) == 40
    assert counts.min() >= 5


def test_separated_molecules_keep_their_charges():
    """GFN2-xTB shares the charge of Mg²⁺ with a molecule 10 Å away, 20 eV below the two alone."""
    (job,) = (job for job in plan(13_000, "apart") if job.system.molecule == "[Mg+2].CO")
    job = replace(job, count=8, seed=0)
    chloride = replace(job.system, parts=("[Cl-]", "CO"), charge=-1)
    widest = {}
    for name, one in {"Mg": job, "Cl": replace(job, system=chloride)}.items():
        structures = sample(one)
        assert len(structures) == 8
        widest[name] = max(atoms.get_all_distances()[0, 1:].min() for atoms in structures)
    assert widest["Mg"] < make.FAR + 0.3 < 7 < widest["Cl"]


def test_the_apart_set_keeps_the_splits_of_the_main_one(jobs):
    apart = plan(13_000, "apart")
    names = [job.system.name for job in apart]
    assert len(names) == len(set(names))
    assert sum(job.count for job in apart) == pytest.approx(13_000, rel=0.15)
    assert all(len(job.system.parts) == 2 for job in apart)
    split = {tuple(sorted(job.system.parts)): job.split for job in jobs}
    shared = [job for job in apart if tuple(sorted(job.system.parts)) in split]
    assert len(shared) > 500
    assert all(split[tuple(sorted(job.system.parts))] == job.split for job in shared)


@pytest.fixture(scope="module")
def ionic() -> list[Job]:
    return plan(4_000, "ionic")


def test_the_ionic_set_holds_ions_out_and_has_no_meeting_twice(jobs, ionic):
    met = [tuple(sorted(job.system.parts)) for job in ionic if job.system.reach]
    assert len(met) == len(set(met)) > 5_000
    split = {job.system.molecule: job.split for job in jobs if len(job.system.parts) == 1}
    ions = [
        make.parse_system("", ion) for ion in systems_of.ANIONS.split() + systems_of.CATIONS.split()
    ]
    held_out = {ion.molecule for ion in ions if hashed.split_of(ion) == "test"}
    assert {"[N-]=[N+]=[N-]", "O=P([O-])(O)O"} < held_out
    for job in ionic:
        for part in job.system.parts:
            if len(job.system.parts) > 1 and split.get(part, job.split) != "train":
                assert job.split != "train", job.system
    tested = Counter(job.system.domain for job in ionic if job.split == "test")
    assert tested["ionic_pairs"] > 500 and tested["ionic_trios"] > 50


def pair(word: str, count: int) -> Job:
    return Job(
        replace(systems_of._system("ionic_pairs", word), reach=systems_of.FARTHEST), count, "train"
    )


def test_like_organic_ions_repel_as_coulomb_says_far_away():
    """Methylammonium and tetramethylammonium: all distances, and two charges from 12 Å on."""
    structures = sample(pair("C[NH3+].C[N+](C)(C)C", 16))
    far = 0
    gaps = [atoms.get_all_distances()[:8, 8:].min() for atoms in structures]
    for gap, atoms in zip(gaps, structures, strict=True):
        if gap > 12:
            far += 1
            alone = energy(atoms[:8], 1) + energy(atoms[8:], 1)
            distance = np.linalg.norm(atoms.positions[1] - atoms.positions[9])
            expected = 14.4 / distance
            assert atoms.get_potential_energy() - alone == pytest.approx(expected, rel=0.06)
    assert min(gaps) < 3 and max(gaps) > 12 and far >= 2


def test_ions_that_lose_their_charge_are_left_out():
    """GFN2-xTB gives acetate's electron back to methylammonium from about 7 Å on."""
    structures = sample(pair("C[NH3+].CC(=O)[O-]", 8))
    gaps = [atoms.get_all_distances()[:8, 8:].min() for atoms in structures]
    assert len(gaps) == 8 and max(gaps) < 9
    magnesium = sample(pair("[Mg+2].CO", 2))[0]
    assert not make._charge_moved(magnesium)
    magnesium.positions[0] += 10 * (magnesium.positions[0] - magnesium.positions[1:].mean(0))
    assert make._charge_moved(magnesium)


def test_three_molecules_have_gaps_of_their_own(ionic):
    trios = [job for job in ionic if job.system.domain == "ionic_trios"]
    (atoms,) = sample(replace(trios[3], count=1))
    sizes = [hashed.atom_count(make.parse_system("", p)) for p in trios[3].system.parts]
    first, second, third = np.split(np.arange(len(atoms)), np.cumsum(sizes)[:2])
    distances = atoms.get_all_distances()
    one = distances[np.ix_(first, second)].min()
    other = distances[np.ix_(np.r_[first, second], third)].min()
    assert abs(one - other) > 0.3 and max(one, other) < systems_of.FARTHEST + 1


def test_two_atoms_have_a_wall_a_minimum_and_an_end():
    simplest = plan(1_000, "simplest")
    assert {job.count for job in simplest if job.system.domain == "atoms"} == {1}
    hydrogen, nitrogen = (
        next(j for j in simplest if j.system.stretched and j.system.name.startswith(name))
        for name in ("[H][H]|0|1", "N#N|0|1")
    )
    structures = sample(replace(hydrogen, count=24))
    lengths = np.array([atoms.get_distance(0, 1) for atoms in structures])
    energies = np.array([atoms.get_potential_energy() for atoms in structures])
    assert lengths.min() < 0.33 and lengths.max() > 2.5
    best = lengths[energies.argmin()]
    assert 0.6 < best < 0.95
    assert energies[lengths.argmin()] > energies.min() + 3
    assert energies[lengths.argmax()] > energies.min() + 3
    walls = [np.abs(atoms.get_forces()).max() for atoms in sample(replace(nitrogen, count=24))]
    assert make.MAX_FORCE < 100 < max(walls) < make.STRETCHED_MAX_FORCE


def test_what_is_unfit_for_training_is_rejected(jobs):
    system = job_of(jobs, "CCO", 1).system
    good = sets.relax(sample(job_of(jobs, "CCO", 2))[0], steps=3)
    assert make._label(good, system) is not None
    # another electronic state than the run's
    assert make._label(good, system, expected=energy(good) + 0.1) is None
    broken, squeezed, strained = good.copy(), good.copy(), good.copy()
    broken.positions[-1] += 5.0
    squeezed.positions[1] = squeezed.positions[0] + [0.3, 0, 0]
    strained.set_distance(0, 1, 0.93, fix=0)  # no overlap yet, but forces beyond the limit
    for atoms in (broken, squeezed, strained):
        assert make._label(atoms, system) is None


def test_rotating_a_bond_moves_one_side_and_keeps_lengths(jobs):
    butane = sample(job_of(jobs, "CCCC", 2))[0]
    bonds = {(i, j): side for i, j, side in make._rotatable_bonds("CCCC")}
    assert {(0, 1), (1, 2), (2, 3)} == set(bonds)
    before = butane.copy()
    make._rotate(butane, 1, 2, bonds[1, 2], np.pi / 3)
    assert butane.get_dihedral(0, 1, 2, 3) == pytest.approx(
        (before.get_dihedral(0, 1, 2, 3) + 60) % 360
    )
    for i, j in ((0, 1), (1, 2), (2, 3)):
        assert butane.get_distance(i, j) == pytest.approx(before.get_distance(i, j))


# --- the data set ------------------------------------------------------------------------------


def few_jobs() -> list[Job]:
    words = ["N", "[OH]", "O.O", "[Li+].O", "CO", "[O][O]|0|3", "CCO", "C=C"]
    splits = ["train", "val", "train", "test", "train", "train", "train", "test"]
    systems = [systems_of._system("organic", word) for word in words]
    return [Job(system, 5, split, 3) for system, split in zip(systems, splits, strict=True)]


def test_any_number_of_workers_makes_the_same_data(tmp_path):
    impossible = systems_of.SampledSystem("organic", ("C1#CC1",), charge=0, multiplicity=2)
    jobs = [Job(impossible, 4, "train", 3), *few_jobs()]
    one, two = tmp_path / "one", tmp_path / "two"
    make_set(one, jobs, sample, workers=1)
    make_set(two, jobs, sample, workers=2)
    for split, count in (("train", 25), ("val", 5), ("test", 10)):
        first, second = (Dataset(folder / f"{split}.aselmdb") for folder in (one, two))
        assert len(first) == len(second) == count
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.get_forces(), b.get_forces())
            assert a.get_potential_energy() == b.get_potential_energy()
            assert a.info == b.info
    references = json.loads((one / "references.json").read_text())
    assert list(references) == ["H", "Li", "C", "N", "O"]
    failed = json.loads((one / "failed.json").read_text())
    assert list(failed) == [impossible.name] and "no conformer" in failed[impossible.name]

    with pytest.raises(ValueError, match="another data set"):
        make_set(one, [replace(job, seed=4) for job in jobs], sample)


def test_the_command_makes_a_share_of_the_same_set(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(make, "make_set", lambda folder, jobs, *rest: calls.append((jobs, rest)))
    command = ["--out", str(tmp_path), "--structures", "60000"]
    for share in ("0.1", "0.3", "1"):
        assert make.main([*command, "--share", share]) == 0
    assert make.main([*command, "--share", "0"]) == 2
    tenth, third, whole = (set(jobs) for jobs, _ in calls)
    assert tenth < third < whole == set(plan(60_000))
    assert len(third) / len(whole) == pytest.approx(0.3, abs=0.03)
    assert {job.split for job in tenth} == {"train", "val", "test"}
    assert {rest for _, rest in calls} == {(sample, 1)}

    make.main(["--out", str(tmp_path), "--set", "apart", "--structures", "13000", "--seed", "2"])
    assert calls[-1][0] == plan(13_000, "apart", 2)
    assert {job.seed for job in calls[-1][0]} == {2_000_002}


def test_the_sample_in_the_repository_is_of_the_plan(jobs):
    """Its structures are of systems of the plan, in their splits, with GFN2-xTB's energies."""
    splits = {job.system.molecule: job.split for job in jobs}
    folder = Path(__file__).resolve().parents[2] / "data" / "xtb"
    for split in SPLITS:
        for number, atoms in enumerate(Dataset(folder / f"{split}.aselmdb")):
            assert splits[atoms.info["molecule"]] == split
            if number % 30 == 0:
                state = atoms.info["charge"], atoms.info["spin"]
                assert atoms.get_potential_energy() == pytest.approx(
                    energy(atoms, *state), abs=1e-4
                )


def test_runs_of_ethanol_are_split_whole_and_independent(monkeypatch):
    monkeypatch.setattr(make, "RUN_START", 5)  # fs; shorter than in the set
    runs = plan(240, "ethanol")
    assert [(job.split, job.count) for job in runs] == [("train", 50)] * 4 + [("val", 50)]
    first, other = (sample(replace(runs[number], count=2)) for number in (0, 4))
    (again, *_) = sample(replace(runs[0], count=1))
    assert again.positions.tolist() == first[0].positions.tolist()  # more snapshots, the same ones
    assert np.array_equal(first[0].positions, first[0].positions.round(4))
    assert not np.allclose(first[0].get_all_distances(), first[1].get_all_distances(), atol=1e-2)
    assert not np.allclose(first[0].get_all_distances(), other[0].get_all_distances(), atol=1e-2)
    fresh = Atoms(first[1].numbers, first[1].positions, info={"charge": 0, "spin": 1})
    fresh.calc = GFN2xTB(accuracy=0.1)
    assert fresh.get_potential_energy() == pytest.approx(first[1].get_potential_energy(), abs=1e-6)
    assert np.allclose(fresh.get_forces(), first[1].get_forces(), atol=1e-4)
