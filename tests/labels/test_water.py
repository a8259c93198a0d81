"""SPC/Fw: one potential whatever the box; its data set is repeatable, resumable, leak-free."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from allscaip_lite.data.aselmdb import SPLITS, Dataset
from allscaip_lite.labels import water
from allscaip_lite.labels.water import (
    SPCFw,
    Trajectory,
    WaterError,
    generate,
    molecules,
    plan,
    sample,
    water_box,
)

KCAL = units.kcal / units.mol


def box(waters: int = 8, density: float = 0.8, seed: int = 0, whole: bool = False) -> Atoms:
    """A box whose cell is no cube, molecules bent and stretched, one across its boundary."""
    atoms = water_box(waters, density, seed)
    atoms.rattle(0.05, seed=seed)
    skew = np.eye(3) + [[0, 0.05, -0.03], [0.08, 0.03, 0], [-0.04, 0.06, -0.02]]
    atoms.set_cell(atoms.cell.array @ skew, scale_atoms=False)
    if not whole:
        atoms.positions[1] += atoms.cell[0]
    atoms.calc = SPCFw()
    return atoms


def cluster(waters: int = 4, seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    sites = 3.0 * np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    positions = sites[:waters, None] + molecules(rng, waters, 0.05)
    return Atoms("OH2" * waters, positions.reshape(-1, 3), calculator=SPCFw())


# --- the potential ------------------------------------------------------------------------------


def test_a_relaxed_molecule_has_no_energy_and_no_forces():
    molecule = Atoms("OH2", molecules(np.random.default_rng(0), 1)[0], calculator=SPCFw())
    assert molecule.get_potential_energy() == pytest.approx(0, abs=1e-12)
    assert np.abs(molecule.get_forces()).max() < 1e-9


def test_a_stretched_and_bent_molecule_has_the_energy_of_its_springs():
    angle = np.deg2rad(113.24 + 10)
    far = [1.112 * np.sin(angle), 1.112 * np.cos(angle), 0]
    molecule = Atoms("OH2", [[0, 0, 0], [0, 1.062, 0], far], calculator=SPCFw())
    bonds = 1059.162 / 2 * (0.05**2 + 0.1**2)
    bend = 75.90 / 2 * np.deg2rad(10) ** 2
    assert molecule.get_potential_energy() == pytest.approx((bonds + bend) * KCAL, rel=1e-12)


def test_two_waters_have_the_energy_of_their_charges_and_oxygens():
    pair = cluster(2, seed=3)
    inside = 0.0
    for part in (pair[:3], pair[3:]):
        part.calc = SPCFw()
        inside += part.get_potential_energy()
    charge = np.array([-0.82, 0.41, 0.41])
    distance = np.linalg.norm(pair.positions[:3, None] - pair.positions[None, 3:], axis=2)
    expected = 332.06371 * (charge[:, None] * charge / distance).sum()
    six = (3.165492 / distance[0, 0]) ** 6
    expected += 4 * 0.1554253 * (six**2 - six)
    assert pair.get_potential_energy() - inside == pytest.approx(expected * KCAL, abs=1e-7)


@pytest.mark.parametrize("make", [box, cluster])
def test_forces_are_the_energy_s_derivative(make):
    atoms = make()
    expected = calculate_numerical_forces(atoms, eps=1e-4, iatoms=range(6))
    assert atoms.get_forces()[:6] == pytest.approx(expected, abs=1e-4)
    assert atoms.get_forces().sum(0) == pytest.approx(np.zeros(3), abs=1e-10)


def test_stress_is_the_energy_s_derivative():
    atoms = box()
    # smaller steps see the 1e-7 eV of a wave that comes into the sum or leaves it
    expected = calculate_numerical_stress(atoms, eps=3e-4, voigt=True)
    assert atoms.get_stress() == pytest.approx(expected, abs=3 * units.bar)
    assert np.abs(expected).max() > 500 * units.bar


def test_a_box_and_its_supercell_feel_the_same():
    small = box(whole=True)
    large = small.repeat(2)
    large.calc = SPCFw()
    assert large.get_potential_energy() / 8 == pytest.approx(small.get_potential_energy(), abs=1e-9)
    assert large.get_forces()[: len(small)] == pytest.approx(small.get_forces(), abs=1e-9)
    assert large.get_stress() == pytest.approx(small.get_stress(), abs=1e-6 * units.bar)


def test_the_split_of_the_sums_changes_nothing(monkeypatch):
    energy, forces, strain = water.spcfw(box().positions, box().cell.array)
    monkeypatch.setattr(water, "CUTOFF", 12.0)
    monkeypatch.setattr(water, "SPLITTING", 4.0 / 12.0)
    monkeypatch.setattr(water, "WAVE_CUTOFF", 8.0 * 4.0 / 12.0)
    other = water.spcfw(box().positions, box().cell.array)
    # what is left is the repulsion past 9 Å
    assert other[0] == pytest.approx(energy, abs=2e-6 * 8)
    assert other[1] == pytest.approx(forces, abs=1e-6)
    assert other[2] == pytest.approx(strain, abs=1e-4)


def test_a_wide_empty_box_is_vacuum():
    alone = cluster(2)
    boxed = alone.copy()
    boxed.set_cell([40, 40, 40])
    boxed.center()
    boxed.pbc = True
    boxed.calc = SPCFw()
    # what is left are dipoles with their images, at 40 Å
    assert boxed.get_potential_energy() == pytest.approx(alone.get_potential_energy(), abs=5e-4)
    assert boxed.get_forces() == pytest.approx(alone.get_forces(), abs=5e-4)


def test_rotation_and_translation_change_nothing():
    atoms = box()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    turned = atoms.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    turned.positions += (3.0, -7.0, 11.0)
    turned.wrap()
    turned.calc = SPCFw()
    assert turned.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    assert np.linalg.norm(turned.get_forces(), axis=1) == pytest.approx(
        np.linalg.norm(forces, axis=1), abs=1e-9
    )


def by_openmm(atoms: Atoms, cutoff: float) -> tuple[float, np.ndarray]:
    """Energy in eV and forces in eV/Å."""
    openmm = pytest.importorskip("openmm")
    system = water.openmm_system(atoms, cutoff=cutoff, tolerance=1e-6)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(atoms.positions / 10)
    state = context.getState(getEnergy=True, getForces=True)
    kilojoule = units.kJ / units.mol
    forces = state.getForces(asNumpy=True)._value * kilojoule / 10
    return state.getPotentialEnergy()._value * kilojoule, forces


@pytest.mark.parametrize("small, copies", [(box(whole=True), 4), (cluster(), 1)])
def test_openmm_agrees(small, copies):
    """Its supercell is wide enough for a cutoff of 9 Å, past which it leaves out repulsion."""
    if copies > 1:  # OpenMM wants vectors in its own, lower triangular form
        form, turn = small.cell.standard_form()
        small = Atoms(small.numbers, small.positions @ turn.T, cell=form, pbc=True)
        small.calc = SPCFw()
    large = small.repeat(copies)
    energy, forces = by_openmm(large, cutoff=9.0)
    assert energy / copies**3 / (len(small) // 3) == pytest.approx(
        small.get_potential_energy() / (len(small) // 3), abs=2e-5
    )
    assert forces[: len(small)] == pytest.approx(small.get_forces(), abs=2e-4)


@pytest.mark.parametrize("waters", [32, 48])
def test_the_pressure_that_openmm_leaves_out(waters):
    """In the mean over boxes: minus the slope, by volume, of our energy less OpenMM's."""
    found, expected = [], []
    for frame in Dataset(Path(__file__).resolve().parents[2] / "data/water/train.aselmdb"):
        if len(frame) != 3 * waters or frame.info["data_id"] != "water_npt":
            continue
        missing, volumes = [], []
        for scale in (0.995, 1.005):
            scaled = frame.copy()
            scaled.set_cell(scale * frame.cell, scale_atoms=True)
            scaled.calc = SPCFw()
            energy, _ = by_openmm(scaled, cutoff=water._cutoff(frame))
            missing.append(scaled.get_potential_energy() - energy)
            volumes.append(scaled.get_volume())
        found.append(-np.diff(missing)[0] / np.diff(volumes)[0] / units.bar)
        expected.append(water.missing_pressure(frame))
    assert len(found) >= 5 and np.mean(found) == pytest.approx(np.mean(expected), rel=0.2)


@pytest.mark.parametrize(
    "atoms, words",
    [
        (Atoms("H2O", np.eye(3)), "O, H, H"),
        (Atoms("OH2OH", np.eye(5)[:, :3] * 3), "O, H, H"),
        (Atoms("OH2", np.eye(3), cell=[9, 9, 9], pbc=(True, True, False)), "all directions"),
    ],
)
def test_what_is_not_water_is_refused(atoms, words):
    atoms.calc = SPCFw()
    with pytest.raises(WaterError, match=words):
        atoms.get_potential_energy()


def test_a_cluster_has_no_stress():
    with pytest.raises(PropertyNotImplementedError):
        cluster().get_stress()


# --- the data set -------------------------------------------------------------------------------


def test_the_plan_covers_its_ranges_in_every_split():
    trajectories = plan(4600)
    assert sum(t.frames for t in trajectories) == pytest.approx(4600, rel=0.02)
    assert len({t.name for t in trajectories}) == len(trajectories)
    boxes = [t for t in trajectories if t.kind in ("npt", "nvt")]
    for split in SPLITS:
        assert {t.waters for t in boxes if t.split == split} == set(water.BOX_SIZES)
        assert {t.kind for t in trajectories if t.split == split} == set(water.SETS["main"])
    for values, (low, high) in (
        ([t.temperature for t in boxes], (280, 360)),
        ([t.pressure for t in boxes if t.kind == "npt"], (-1000, 3000)),
    ):
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high >= max(values) > high - 0.1 * (high - low)
    assert 0.7 < sum(t.frames for t in trajectories if t.split == "train") / 4600 < 0.9


def test_the_liquid_set_stays_near_ambient_conditions_in_every_split():
    trajectories = plan(1500, "liquid")
    assert sum(t.frames for t in trajectories) == pytest.approx(1500, rel=0.03)
    for split in SPLITS:
        runs = [t for t in trajectories if t.split == split]
        assert {t.waters for t in runs} == {32, 48} and {t.kind for t in runs} == {"liquid"}
        assert np.mean([t.temperature for t in runs]) == pytest.approx(298, abs=5)
        assert abs(np.mean([t.pressure for t in runs])) < 250


def test_too_few_structures_for_three_splits_are_refused():
    with pytest.raises(WaterError, match="100 or more"):
        plan(20)
    assert {t.split for t in plan(100)} == set(SPLITS)


def short(name: str, kind: str, waters: int, split: str, frames: int = 3) -> Trajectory:
    return Trajectory(name, kind, waters, 300.0, 1.0, 1.0, frames, split)


@pytest.fixture
def quick(monkeypatch):
    """Short equilibration, and a strained structure in three."""
    pytest.importorskip("openmm")
    monkeypatch.setattr(water, "STEPS_BEFORE", 50)
    monkeypatch.setattr(water, "STEPS_BETWEEN", 10)
    monkeypatch.setattr(water, "STRAINED_EVERY", 3)


@pytest.mark.parametrize("kind, waters", [("npt", 16), ("nvt", 16), ("cluster", 3), ("liquid", 32)])
def test_the_same_seed_yields_the_same_labelled_structures(quick, kind, waters):
    trajectory = short("a", kind, waters, "train")
    first, again, other = (sample(trajectory, seed) for seed in (0, 0, 1))
    for one, two, three in zip(first, again, other, strict=True):
        assert np.array_equal(one.positions, two.positions)
        assert np.array_equal(one.get_forces(), two.get_forces())
        assert not np.allclose(one.positions, three.positions)


def test_labels_are_the_teacher_s_and_say_what_they_are(quick):
    frames = sample(short("a", "npt", 16, "train"), 0) + sample(short("b", "dimer", 2, "val"), 0)
    kinds = [frame.info["data_id"] for frame in frames]
    assert kinds == ["water_npt"] * 2 + ["water_strained"] + ["water_dimer"] * 3
    for frame in frames:
        again = frame.copy()
        again.calc = SPCFw()
        assert frame.get_potential_energy() == again.get_potential_energy()
        assert (frame.info["charge"], frame.info["spin"]) == (0, 1)
        assert ("stress" in frame.calc.results) == bool(frame.pbc.all())
        if frame.pbc.all():
            assert np.array_equal(frame.get_stress(), again.get_stress())


def test_molecules_and_pairs_need_no_sampler():
    frames = sample(short("m", "molecule", 1, "train", 20), 0)
    lengths = np.array([frame.get_distances(0, [1, 2]) for frame in frames])
    assert 0.02 < lengths.std() < 0.15
    pairs = sample(short("d", "dimer", 2, "train", 20), 0)
    apart = np.array([pair.get_distance(0, 3) for pair in pairs])
    assert apart.min() > 2.3 and apart.max() < 9.1
    assert apart.max() - apart.min() > 4


def closest(frames: list, one: str, other: str) -> np.ndarray:
    """Of each frame, the least distance of such atoms of two molecules."""
    found = []
    for frame in frames:
        apart = frame.get_all_distances(mic=True)
        owner = np.arange(len(frame)) // 3
        symbols = np.array(frame.get_chemical_symbols())
        rows, columns = np.flatnonzero(symbols == one), np.flatnonzero(symbols == other)
        between = owner[rows][:, None] != owner[columns]
        found.append(apart[np.ix_(rows, columns)][between].min())
    return np.array(found)


def test_contacts_are_closer_than_the_liquid_s_and_never_closer_than_said(quick):
    pairs = sample(short("c", "contact", 2, "train", 40), 0)
    boxes = sample(short("s", "squeezed", 16, "train", 12), 0)
    liquid = sample(short("l", "nvt", 16, "train", 6), 0)
    usual = {kind: closest(liquid, *kind).min() for kind in water.CONTACTS}
    for frames in (pairs, boxes):
        assert {frame.info["data_id"] for frame in frames} <= {"water_contact", "water_squeezed"}
        for (one, other), (low, _) in water.CONTACTS.items():
            assert closest(frames, one, other).min() > low - 1e-6
        closer = [closest(frames, *kind) < least for kind, least in usual.items()]
        assert np.any(closer, axis=0).mean() > 0.4
        assert max(np.abs(frame.get_forces()).max() for frame in frames) < water.MAX_FORCE
    assert not any(frame.pbc.any() for frame in pairs) and all(f.pbc.all() for f in boxes)


def test_older_kinds_stay_as_they_were_when_kinds_are_added(monkeypatch):
    names = {trajectory.name for trajectory in plan(4600)}
    kinds = ("npt", "nvt", "cluster", "dimer", "molecule")
    few = {kind: water.SETS["main"][kind] for kind in kinds}
    monkeypatch.setitem(water.SETS, "main", few)
    assert names > {trajectory.name for trajectory in plan(4000)}


LISTED = [
    short("cluster-0", "cluster", 2, "train", 2),
    short("molecule-0", "molecule", 1, "train", 2),
    short("dimer-0", "dimer", 2, "val", 2),
    short("dimer-1", "dimer", 2, "test", 2),
]
SCRIPT = f"""
import sys
from pathlib import Path
from allscaip_lite.labels.water import Trajectory, generate
if __name__ == "__main__":
    generate(Path(sys.argv[1]), {LISTED!r}, seed=0)
"""


def here(stop_after: int | None = None):
    """Stands for the worker processes; Ctrl-C comes after some trajectories."""

    def in_this_process(work, tasks, workers):
        for number, task in enumerate(tasks):
            if number == stop_after:
                raise KeyboardInterrupt
            yield work(task)

    return in_this_process


def contents(folder: Path) -> list[tuple]:
    return [
        (split, atoms.info["source"], atoms.positions.tobytes(), atoms.get_forces().tobytes())
        for split in SPLITS
        for atoms in Dataset(folder / f"{split}.aselmdb")
    ]


def test_a_stopped_run_goes_on_to_the_same_data(tmp_path, monkeypatch):
    pytest.importorskip("openmm")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, str(script), str(whole)], check=True, capture_output=True)
    assert json.loads((whole / "references.json").read_text()) == {"H": 0.0, "O": 0.0}

    monkeypatch.setattr(water, "in_processes", here(stop_after=2))
    with pytest.raises(KeyboardInterrupt):
        generate(stopped, LISTED)
    assert len(list(stopped.glob("trajectories/*.aselmdb"))) == 2
    assert not (stopped / "train.aselmdb").exists()
    monkeypatch.setattr(water, "in_processes", here())
    assert generate(stopped, LISTED) == {"train": 4, "val": 2, "test": 2}
    assert contents(stopped) == contents(whole)

    with pytest.raises(WaterError, match="choose a new --out"):
        generate(whole, LISTED, seed=1)


def test_the_sample_in_the_repository_has_the_teacher_s_labels():
    folder = Path(__file__).resolve().parents[2] / "data" / "water"
    trajectories: dict[str, set[str]] = {}
    for split in SPLITS:
        data = Dataset(folder / f"{split}.aselmdb")
        trajectories[split] = {data[index].info["trajectory"] for index in range(len(data))}
        for index in range(0, len(data), 5):
            atoms = data[index]
            fresh = atoms.copy()
            fresh.calc = SPCFw()
            assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy())
            assert atoms.get_forces() == pytest.approx(fresh.get_forces(), abs=1e-9)
            if atoms.pbc.any():
                assert atoms.get_stress() == pytest.approx(fresh.get_stress(), abs=1e-9)
    assert not trajectories["train"] & (trajectories["val"] | trajectories["test"])
    assert not trajectories["val"] & trajectories["test"]
