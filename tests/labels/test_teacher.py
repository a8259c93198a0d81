"""The teacher's labels are physical, and making a data set is repeatable, resumable, leak-free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculatorError

pytest.importorskip("tblite")
Chem = pytest.importorskip("rdkit.Chem")

from allscaip_lite.cli import main  # noqa: E402
from allscaip_lite.data.aselmdb import SPLITS, Dataset  # noqa: E402
from allscaip_lite.labels import (
    omol_mini,  # noqa: E402
    species,  # noqa: E402
)
from allscaip_lite.labels import xtb as teacher  # noqa: E402
from allscaip_lite.labels.species import Job, plan  # noqa: E402
from allscaip_lite.labels.xtb import GFN2xTB, free_atom_energies, sample  # noqa: E402


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


# --- labels -------------------------------------------------------------------------------------


def energy(atoms: Atoms, charge: int = 0, spin: int = 1) -> float:
    atoms = atoms.copy()
    atoms.info = {"charge": charge, "spin": spin}
    atoms.calc = GFN2xTB(accuracy=0.1)
    return atoms.get_potential_energy()


def test_triplet_oxygen_lies_below_singlet():
    oxygen = molecule("O2")
    assert energy(oxygen, spin=3) < energy(oxygen, spin=1) - 0.3


def test_triplet_methylene_lies_below_singlet():
    assert energy(molecule("CH2_s3B1d"), spin=3) < energy(molecule("CH2_s1A1d"), spin=1) - 0.1


def test_forces_are_the_energy_s_derivative():
    radical = molecule("CH3O", info={"charge": 0, "spin": 2})
    radical.rattle(0.05, seed=1)
    radical.calc = GFN2xTB(accuracy=0.01)
    forces, step = radical.get_forces(), 1e-3
    for atom, axis in ((0, 0), (1, 1), (2, 2)):
        shifted = []
        for sign in (1, -1):
            moved = radical.copy()
            moved.positions[atom, axis] += sign * step
            moved.calc = GFN2xTB(accuracy=0.01)
            shifted.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx(
            -(shifted[0] - shifted[1]) / (2 * step), abs=1e-3
        )


def test_stress_is_the_energy_s_derivative():
    chain = Atoms("HF", [[0, 0, 0], [0.9, 0.1, 0]], cell=np.diag([2.6, 6, 6]), pbc=True)
    chain.calc = GFN2xTB(accuracy=0.01)
    stress, step, strained = chain.get_stress(), 1e-3, []
    for sign in (1, -1):
        moved = chain.copy()
        moved.set_cell(moved.cell * [[1 + sign * step], [1], [1]], scale_atoms=True)
        moved.calc = GFN2xTB(accuracy=0.01)
        strained.append(moved.get_potential_energy())
    derivative = (strained[0] - strained[1]) / (2 * step * chain.get_volume())
    assert stress[0] == pytest.approx(derivative, abs=1e-4)


def test_charge_and_spin_count_in_a_repeated_call():
    water = molecule("H2O")
    water.calc = GFN2xTB()
    neutral = water.get_potential_energy()
    water.info = {"charge": 1, "spin": 2}
    assert water.get_potential_energy() > neutral + 5
    water.info = {}
    assert water.get_potential_energy() == pytest.approx(neutral, abs=1e-5)


def test_a_multiplicity_that_the_electrons_forbid_is_refused():
    with pytest.raises(CalculatorError, match="OH2, charge 0, multiplicity 2"):
        energy(molecule("H2O"), spin=2)


def test_free_atoms_are_in_their_ground_states():
    energies = free_atom_energies(["H", "C", "O"])
    assert energies["C"] == pytest.approx(energy(Atoms("C"), spin=3))
    assert energies["O"] == pytest.approx(energy(Atoms("O"), spin=3))
    atomization = 2 * energies["H"] + energies["O"] - energy(molecule("H2O"))
    assert 8 < atomization < 14  # eV; experiment 10.1


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
    assert set(species.HELD_OUT) | species.KEPT_IN_TRAIN <= molecules
    assert {job.system.multiplicity for job in jobs} == {1, 2, 3, 4}
    assert {job.system.charge for job in jobs} == {-2, -1, 0, 1, 2}
    sizes = [species.atom_count(job.system) for job in jobs]
    assert 30 < max(sizes) <= species.MOST_ATOMS
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
        split: {species.parent(part) for job in found for part in job.system.parts}
        for split, found in splits.items()
    }
    alone = {
        species.parent(job.system.molecule)
        for job in splits["test"] + splits["val"]
        if len(job.system.parts) == 1
    }
    assert len(alone) > 80
    assert not alone & inside["train"]


def test_named_molecules_are_where_the_card_says(jobs):
    split = {job.system.molecule: job.split for job in jobs}
    assert split[species.CAFFEINE] == split[f"{species.CAFFEINE}.O"] == "test"
    assert split["NCC(=O)O.O"] == split["O.O.O.O.O.O.O"] == "test"
    assert split["O.O.O.O.O"] == "val"
    assert split["NCC(=O)O"] == split["CCO"] == split["CCCC"] == split["O"] == "train"


def test_an_acid_goes_with_its_ions():
    assert species.parent("CC(=O)[O-]") == species.parent("CC(=O)O") == "CC(=O)O"
    assert species.parent("C[C@H]([NH3+])C(=O)[O-]") == species.parent("CC(N)C(=O)O")
    acids = [f"{'C' * n}(=O)" for n in range(3, 30)]
    splits = [species.split_of(species._system("ions", f"{acid}[O-]")) for acid in acids]
    assert splits == [species.split_of(species._system("organic", f"{acid}O")) for acid in acids]
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
    split = {species.parent(j.system.molecule): j.split for j in jobs if len(j.system.parts) == 1}
    for job in charged:
        if len(job.system.parts) == 1 and job.system.domain in ("vertical", "protomers"):
            assert split.get(species.parent(job.system.molecule), job.split) == job.split


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
    assert set(species.protomers(molecule)) == canonical


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
        assert np.abs(atoms.get_forces()).max() < teacher.MAX_FORCE
        assert atoms.get_potential_energy() == pytest.approx(energy(atoms), abs=1e-4)
    energies = [atoms.get_potential_energy() for atoms in structures]
    assert np.ptp(energies) > 0.3
    angles = [atoms.get_dihedral(0, 1, 2, 8) for atoms in structures]
    assert np.ptp(angles) > 90


def test_a_radical_has_a_gap_for_each_spin(jobs):
    structures = sample(job_of(jobs, "[OH]", 4, spin=2))
    assert all(atoms.info["spin"] == 2 for atoms in structures)
    assert all(len(atoms.info["homo_lumo_gap"]) == 2 for atoms in structures)


def test_a_vertical_ion_stands_as_the_neutral_molecule_does(jobs):
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


def test_molecules_apart_stand_at_all_distances_and_end_up_as_two():
    (job,) = (job for job in plan(13_000, "apart") if job.system.molecule == "F.F")
    structures = sample(replace(job, count=40))
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


def test_molecules_apart_keep_their_charges():
    """GFN2-xTB shares the charge of Mg²⁺ with a molecule 10 Å away, 20 eV below the two alone."""
    (job,) = (job for job in plan(13_000, "apart") if job.system.molecule == "[Mg+2].CO")
    job = replace(job, count=8)
    chloride = replace(job.system, parts=("[Cl-]", "CO"), charge=-1)
    widest = {}
    for name, one in {"Mg": job, "Cl": replace(job, system=chloride)}.items():
        structures = sample(one)
        assert len(structures) == 8
        widest[name] = max(atoms.get_all_distances()[0, 1:].min() for atoms in structures)
    assert widest["Mg"] < teacher.FAR + 0.3 < 7 < widest["Cl"]


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


def test_what_is_unfit_for_training_is_rejected(jobs):
    system = job_of(jobs, "CCO", 1).system
    good = teacher._relax(sample(job_of(jobs, "CCO", 2))[0], steps=3)
    assert teacher._label(good, system) is not None
    # another electronic state than the run's
    assert teacher._label(good, system, expected=energy(good) + 0.1) is None
    broken, squeezed, strained = good.copy(), good.copy(), good.copy()
    broken.positions[-1] += 5.0
    squeezed.positions[1] = squeezed.positions[0] + [0.3, 0, 0]
    strained.set_distance(0, 1, 0.93, fix=0)  # no overlap yet, but forces beyond the limit
    for atoms in (broken, squeezed, strained):
        assert teacher._label(atoms, system) is None


def test_turning_a_bond_turns_one_side_and_keeps_lengths(jobs):
    butane = sample(job_of(jobs, "CCCC", 2))[0]
    bonds = {(i, j): side for i, j, side in teacher._turnable("CCCC")}
    assert {(0, 1), (1, 2), (2, 3)} == set(bonds)
    before = butane.copy()
    teacher._turn(butane, 1, 2, bonds[1, 2], np.pi / 3)
    assert butane.get_dihedral(0, 1, 2, 3) == pytest.approx(
        (before.get_dihedral(0, 1, 2, 3) + 60) % 360
    )
    for i, j in ((0, 1), (1, 2), (2, 3)):
        assert butane.get_distance(i, j) == pytest.approx(before.get_distance(i, j))


# --- the command --------------------------------------------------------------------------------

SCRIPT = """
import sys
from tests.test_teacher import few_jobs
from allscaip_lite.labels import xtb as teacher
if __name__ == "__main__":
    teacher.generate(sys.argv[1], few_jobs(), seed=3)
"""


def few_jobs() -> list[Job]:
    words = ["N", "[OH]", "O.O", "[Li+].O", "CO", "[O][O]|0|3", "CCO", "C=C"]
    splits = ["train", "val", "train", "test", "train", "train", "train", "test"]
    systems = [species._system("organic", word) for word in words]
    return [Job(system, 5, split) for system, split in zip(systems, splits, strict=True)]


def test_a_killed_run_goes_on_to_the_same_data(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(killed)], cwd=root, start_new_session=True
    )
    while not list((killed / "jobs").glob("*.aselmdb")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = {path.name: path.stat().st_mtime_ns for path in (killed / "jobs").glob("*.aselmdb")}
    assert 0 < len(first) < len(few_jobs())
    assert not (killed / "train.aselmdb").exists()

    teacher.generate(killed, few_jobs(), seed=3, workers=2)
    teacher.generate(whole, few_jobs(), seed=3, workers=1)
    for name, modified in first.items():  # taken as they were, not made again
        assert (killed / "jobs" / name).stat().st_mtime_ns == modified
    for split, count in (("train", 25), ("val", 5), ("test", 10)):
        resumed, straight = (Dataset(folder / f"{split}.aselmdb") for folder in (killed, whole))
        assert len(resumed) == len(straight) == count
        for a, b in zip(resumed, straight, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.get_forces(), b.get_forces())
            assert a.get_potential_energy() == b.get_potential_energy()
            assert a.info == b.info
    references = json.loads((killed / "references.json").read_text())
    assert list(references) == ["H", "Li", "C", "N", "O"]
    assert json.loads((killed / "failed.json").read_text()) == {}

    with pytest.raises(ValueError, match="another data set"):
        teacher.generate(killed, few_jobs(), seed=4)


def test_a_job_that_fails_is_recorded_and_skipped(tmp_path, capsys):
    good = few_jobs()[0]
    impossible = species.System("organic", ("C1#CC1",), charge=0, multiplicity=2)
    teacher.generate(tmp_path, [Job(impossible, 4, "train"), good])
    assert "JobFailed: " in json.loads((tmp_path / "failed.json").read_text())[impossible.name]
    assert len(Dataset(tmp_path / "train.aselmdb")) == good.count
    text = capsys.readouterr().err
    assert "2 of 2 systems" in text
    assert "1 of 2 systems failed" in text


def test_a_share_of_the_systems_is_a_part_of_the_same_set(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(teacher, "generate", lambda folder, jobs, *rest: asked.append((jobs, rest)))
    command = ["data", "xtb", "--out", str(tmp_path), "--structures", "60000"]
    for share in ("0.1", "0.3", "1"):
        assert main([*command, "--share", share]) == 0
    tenth, third, whole = (set(jobs) for jobs, _ in asked)
    assert tenth < third < whole == set(species.plan(60_000))
    assert len(third) / len(whole) == pytest.approx(0.3, abs=0.03)
    assert {job.split for job in tenth} == {"train", "val", "test"}
    assert len({rest for _, rest in asked}) == 1  # seed, workers and sampler are the same

    assert main([*command, "--share", "0"]) == 2


def test_the_set_reactive_is_sampled_by_its_own_rules(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(teacher, "generate", lambda *rest: asked.append(rest))
    assert main(["data", "xtb", "--set", "reactive", "--out", str(tmp_path), "--seed", "2"]) == 0
    [(_, jobs, seed, _, sampler)] = asked
    assert jobs == omol_mini.jobs(60_000)
    assert (seed, sampler) == (3_000_002, omol_mini.sample)
